"""The test command. `nox` runs every session; `nox -s tests -- -k parity` one of them, with arguments for pytest."""

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"  # all sessions share uv's cache: torch is fetched once
nox.options.reuse_venv = "yes"

# The lower bounds of pyproject.toml. This transformers brings the huggingface_hub of its day, below 1.0.
OLDEST = ("transformers==4.57.6", "peft==0.18.0")

# Two processes of one thread: two cores are common in CI, and a test of ViT-B's size needs up to 6 GB.
PYTEST = ("pytest", "--numprocesses=2", "--dist=worksteal", "--durations=15")
# What no version of transformers or peft changes, or takes long, is run on the newest alone.
NEWEST = "benchmarks card demo examples faults faults_fuzz hub_server image_size key_map loss memory mutations"
NEWEST_ONLY = (*NEWEST.split(), "parity_vit_b", "push", "push_faults", "push_folder", "training")
OFFLINE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@nox.session
def lint(session):
    """Style. The minor version of ruff is fixed, because the next one may format in another way."""
    session.install("ruff~=0.17.6")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def tests(session):
    """All tests on the newest versions that PyPI has."""
    session.install("--upgrade", "--editable", ".[test]")
    session.run(*PYTEST, *session.posargs, env=OFFLINE)


@nox.session
def tests_oldest(session):
    """The tests on the oldest transformers and peft that pyproject.toml admits."""
    session.install("--editable", ".[test]", *OLDEST)
    ignored = [f"--ignore=tests/test_{name}.py" for name in NEWEST_ONLY]
    session.run(*PYTEST, *ignored, *session.posargs, env=OFFLINE)


@nox.session
def tests_hub1(session):
    """The Hub tests with huggingface_hub 1.x, which the newest transformers accepts as well."""
    session.install("--upgrade", "--editable", ".[test]", "huggingface_hub==1.31.0")
    files = [f"tests/test_{name}.py" for name in ("hub_server", "push_faults")]
    session.run(*PYTEST, *files, *session.posargs, env=OFFLINE)


@nox.session
def across_versions(session):
    """What one version writes gives the same numbers with the other, both ways."""
    folder = _empty_folder(session)
    session.install("--upgrade", "--editable", ".[test]")
    oldest = folder / "oldest-venv"
    session.run("uv", "venv", "--clear", "--python", "python", str(oldest))
    session.run("uv", "pip", "install", "--python", str(oldest), "--editable", ".[test]", *OLDEST)
    pythons = {"newest": "python", "oldest": str(next(oldest.glob("*/python")))}
    for version, python in pythons.items():
        session.run(python, "tests/across_versions.py", "write", str(folder / version), env=OFFLINE, external=True)
    for version, written_by in (("newest", "oldest"), ("oldest", "newest")):
        script = "tests/across_versions.py", "read", str(folder / written_by)
        session.run(pythons[version], *script, env=OFFLINE, external=True)


@nox.session
def wheel(session):
    """The main job from an installed wheel, out of the checkout's sight, on the tiny checkpoint to be quick."""
    folder, tiny = _empty_folder(session), Path("examples/tiny_sam/checkpoint").resolve()
    session.run("uv", "build", "--wheel", "--clear", "--out-dir", str(folder / "dist"))
    (built,) = (folder / "dist").glob("*.whl")
    session.install("--reinstall-package", "sam-split", f"{built}[demo]")
    session.chdir(folder)
    session.run("sam-split", "--help")
    options = "--source", str(tiny), "--out", str(folder / "demo")
    session.run("sam-split", "demo", *options, env={"HF_HUB_OFFLINE": "1"})


def _empty_folder(session) -> Path:
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder)
    folder.mkdir()
    return folder
