"""The changelog, the package and its metadata agree on the version, and README's table is the matrix's."""

import ast
import re
from pathlib import Path

import sam_split

ROOT = Path(__file__).parents[2]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_last_release_is_the_version():
    (version,) = re.findall(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)
    released = [name for name in re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE) if name != "Unreleased"]
    assert released[0] == version == sam_split.__version__


def test_table_is_the_matrix():
    """`nox -s matrix` writes both, a row for each of its versions, and none without tests or with a failure."""
    table, noxfile = read("tests/matrix.md"), read("noxfile.py")
    assert table in read("README.md")
    rows = [[cell.strip() for cell in row.strip("| ").split("|")] for row in table.splitlines()[2:]]
    pinned = re.findall(r'^    "([\d.]+)": \(', noxfile, re.MULTILINE)
    assert [row[0] for row in rows][:-1] == pinned, "and the newest"
    assert all(re.fullmatch(r"[1-9]\d+ passed, \d+ skipped", row[4]) for row in rows)
    for row in rows[:-1]:
        for name, version in zip(("peft", "huggingface_hub"), row[1:3], strict=True):
            assert f'"{name}=={version}"' in noxfile


def test_files_for_the_newest_alone_exist():
    """A file that was renamed would be run on every version, and nobody would notice but the clock."""
    (table,) = re.findall(r"^NEWEST_ONLY = (\{.*?^\})", read("noxfile.py"), re.MULTILINE | re.DOTALL)
    for folder, names in ast.literal_eval(table).items():
        for name in names.split():
            assert (ROOT / "tests" / folder / f"test_{name}.py").is_file(), (folder, name)


def test_contributing_names_what_exists():
    text = read("CONTRIBUTING.md")
    sessions = re.findall(r"nox -s (\w+)", text + read("README.md"))
    paths = re.findall(r"`((?:tests|conversion|examples|benchmarks|sam_split|hub_card)/[\w/.]*)`", text)
    tests = re.findall(r"`(test_\w+)`", text)
    assert len(sessions) > 5
    assert len(paths) > 5
    assert tests
    for session in sessions:
        assert f"\ndef {session}(session):" in read("noxfile.py"), session
    for path in paths:
        assert (ROOT / path).exists(), path
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for test in tests:
        assert f"def {test}(" in source, test
