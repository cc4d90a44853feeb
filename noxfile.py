"""The test command. `nox` runs what CI runs; `nox -s tests -- -k parity` one session, with arguments for pytest."""

import json
import os
import shutil
import time
from pathlib import Path
from xml.etree import ElementTree

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"  # all sessions share uv's cache: torch is fetched once
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "tests", "tests_oldest", "tests_hub1", "across_versions", "transformers_own", "wheel"]

# Each transformers with the peft and huggingface_hub of its day, the oldest with the lower bounds of pyproject.toml.
PINS = {
    "4.57.6": ("peft==0.18.0", "huggingface_hub==0.36.0", "torch==2.6.0", "torchvision==0.21.0"),
    "5.0.0": ("peft==0.18.1", "huggingface_hub==1.3.4"),
    "5.5.4": ("peft==0.18.1", "huggingface_hub==1.10.1"),
    "5.11.0": ("peft==0.19.1", "huggingface_hub==1.18.0"),
    "5.17.0": ("peft==0.20.0", "huggingface_hub==1.30.0"),
    "newest": (),
}
OLDEST, *_, NEWEST = PINS

# Two processes of one thread: two cores are common in CI, and a test of ViT-B's size needs up to 6 GB.
PYTEST = ("-m", "pytest", "--numprocesses=2", "--dist=worksteal", "--durations=15")
# What no version of transformers or peft changes, or takes long, is run on the newest alone: files by folder.
NEWEST_ONLY = {
    "conversion": "bad_commands command_line demo faults faults_fuzz folder image_size key_map segment_ray trainers",
    "hub": "card push push_faults push_folder",
    "model": "gpu loss memory mutations parity_vit_b quantised",
    "project": "benchmarks changelog floors",
    "training": "bad_examples examples lora_dropout training training_equal",
}
OFFLINE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
MATRIX = Path("tests/matrix.md")


@nox.session
def lint(session):
    """Style and types. Minor versions are fixed, because the next one may see another way."""
    session.install("ruff~=0.17.6", "mypy~=2.4.1")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session
def tests(session):
    """All tests on the newest versions that PyPI has."""
    _run(session, NEWEST, *PYTEST, *session.posargs)


@nox.session(default=False)
def quick(session):
    """What to run while working: the tests on the newest versions, without the slow ones."""
    _run(session, NEWEST, *PYTEST, "-m", "not slow and not network", *session.posargs)


@nox.session
def tests_oldest(session):
    """The tests on the oldest transformers, peft, huggingface_hub and torch that pyproject.toml admits."""
    _run(session, OLDEST, *PYTEST, *_ignored(), *session.posargs)


@nox.session
def tests_hub1(session):
    """The Hub tests with huggingface_hub 1.x, which the newest transformers accepts as well."""
    session.install("--upgrade", "--editable", ".[test]", "huggingface_hub==1.31.0")
    files = [f"tests/hub/test_{name}.py" for name in ("push", "push_faults")]
    session.run("python", *PYTEST, *files, *session.posargs, env=OFFLINE)


@nox.session
def across_versions(session):
    """What one version writes gives the same numbers with every other; `-- 5.0.0 5.17.0` names versions."""
    _across(session, session.posargs or [OLDEST, NEWEST])


@nox.session
def transformers_own(session):
    """transformers' own common model tests on ours and on stock, from the sdist of the newest; `-- 4.57.6` for it."""
    folder, (version,) = _empty_folder(session), session.posargs or [NEWEST]
    session.install("pip", "setuptools", "wheel")  # to read a source distribution's name, nothing is built
    release = _versions(session, version)["transformers"]
    download = "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary=transformers"
    session.run("python", "-m", *download, "--dest", str(folder), f"transformers=={release}")
    shutil.unpack_archive(folder / f"transformers-{release}.tar.gz", folder, filter="data")
    _run(session, version, "tests/transformers_own.py", str(folder / f"transformers-{release}"))


@nox.session(default=False)
def matrix(session):
    """The tests on every version, all files across all versions, and README's table of them; `-- 5.0.0` runs one."""
    rows = [_row(session, version) for version in session.posargs or PINS]
    session.log("\n".join(rows))
    if not session.posargs:
        _across(session, PINS)
        table = "\n".join(
            ["| transformers | peft | huggingface_hub | torch | tests | seconds |", "|---" * 6 + "|", *rows]
        )
        readme = Path("README.md")
        readme.write_text(readme.read_text(encoding="utf-8").replace(MATRIX.read_text(encoding="utf-8"), table + "\n"))
        MATRIX.write_text(table + "\n", encoding="utf-8")


@nox.session(default=False)
def mutants(session):
    """How many of 120 random one-line mutants the tests catch; `-- 40 7` takes 40 of them by seed 7."""
    session.install("cosmic-ray~=8.7")
    python = Path(_python(session, NEWEST))
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    session.run("python", "tests/mutants.py", str(python), *session.posargs, env={"PATH": path})


@nox.session
def wheel(session):
    """The main job from an installed wheel, out of the checkout's sight."""
    folder = _empty_folder(session)
    session.run("uv", "build", "--wheel", "--clear", "--out-dir", str(folder / "dist"))
    (built,) = (folder / "dist").glob("*.whl")
    session.install("--reinstall-package", "sam-split", f"{built}[demo]")
    session.chdir(folder)
    session.run("sam-split", "--help")
    session.run("sam-split", "demo", env={"HF_HUB_OFFLINE": "1"})


def _python(session, version: str) -> str:
    """The interpreter of that version's environment, which all sessions share."""
    folder = Path(session.virtualenv.location).resolve().parent / f"transformers-{version}"
    python = next((path for path in folder.glob("*/python*") if path.stem == "python"), None)
    if python is None:
        session.run("uv", "venv", "--python", "python", str(folder))
        python = next(path for path in folder.glob("*/python*") if path.stem == "python")
    wanted = [".[test]", f"transformers=={version}", *PINS[version]]
    if version == NEWEST:
        wanted = [".[test,quantised,ray]", "--upgrade"]
    session.run("uv", "pip", "install", "--quiet", "--python", str(python), "--editable", *wanted)
    return str(python)


def _run(session, version: str, *arguments: str, **options) -> None:
    python = _python(session, version)
    path = os.pathsep.join([str(Path(python).parent), os.environ["PATH"]])
    session.run(python, *arguments, env={**OFFLINE, "PATH": path}, external=True, **options)


def _versions(session, version: str) -> dict[str, str]:
    """What is installed in that version's environment."""
    found = "{d.name.replace('-', '_'): d.version for d in m.distributions()}"
    script = f"import json, importlib.metadata as m; print(json.dumps({found}))"
    printed = session.run(_python(session, version), "-c", script, silent=True, external=True)
    return json.loads(printed.splitlines()[-1])


def _ignored() -> list[str]:
    files = (f"{folder}/test_{name}.py" for folder, names in NEWEST_ONLY.items() for name in names.split())
    return [f"--ignore=tests/{file}" for file in files]


def _row(session, version: str) -> str:
    """Run the tests on a version: its row of the matrix."""
    report, started = Path(session.create_tmp()) / f"{version}.xml", time.monotonic()
    _run(session, version, *PYTEST, *_ignored(), f"--junitxml={report}")
    suite, installed = ElementTree.parse(report).find("testsuite").attrib, _versions(session, version)
    names = [installed[name] for name in ("transformers", "peft", "huggingface_hub", "torch")]
    tests = f"{int(suite['tests']) - int(suite['skipped'])} passed, {suite['skipped']} skipped"
    return f"| {' | '.join(names)} | {tests} | {time.monotonic() - started:.0f} |"


def _across(session, versions) -> None:
    folder = _empty_folder(session)
    folders = {version: str(folder / version) for version in versions}
    for version in versions:
        _run(session, version, "tests/across_versions.py", "write", folders[version])
    for version in versions:
        _run(session, version, "tests/across_versions.py", "read", *folders.values())


def _empty_folder(session) -> Path:
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder)
    folder.mkdir()
    return folder
