"""The changelog, the package and its metadata agree on the version, and the table of versions is the matrix's."""

import ast
import re
from pathlib import Path

from pages import PAGES

import sam_split

ROOT = Path(__file__).parents[2]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_last_release_is_the_version():
    (version,) = re.findall(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)
    unreleased, *released = re.findall(r"^## \[(\S+)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert unreleased == "Unreleased"
    assert released[0] == version == sam_split.__version__


def test_changes_are_kept_as_keep_a_changelog_has_them():
    """Newcomers and tools know these headings; each stands once in a version, above at least one line."""
    _, *versions = re.split(r"^## \[", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert versions
    for version in versions:
        _, *groups = re.split(r"^### ", version, flags=re.MULTILINE)
        kinds = [group.split("\n", 1)[0] for group in groups]
        assert len(kinds) == len(set(kinds)) > 0
        assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
        assert all(re.match(r"\w+\n\n- ", group) for group in groups)


def test_table_is_the_matrix():
    """`nox -s matrix` writes it: a row for each of its versions, and none without tests or with a failure."""
    table, noxfile = read("docs/versions.md").split("| seconds |\n")[1].split("\n\n")[0], read("noxfile.py")
    rows = [[cell.strip() for cell in row.strip("| ").split("|")] for row in table.splitlines()[1:]]
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
    sessions = re.findall(r"nox -s (\w+)", text + "".join(PAGES.values()))
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
