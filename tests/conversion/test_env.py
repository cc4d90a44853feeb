"""`sam-split env` says what a bug report needs, and nothing of the person who runs it."""

import hashlib
import importlib
import platform
from importlib import metadata
from pathlib import Path

import pytest
import torch

import sam_split
from conversion.cli import main


@pytest.fixture
def shown(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    return {line.split("  ", 1)[0]: line.split("  ", 1)[1].strip() for line in printed.splitlines()}


def test_versions_are_those_that_run(shown):
    for package in ("sam-split", "torch", "transformers", "peft", "huggingface_hub", "safetensors"):
        assert shown[package] == metadata.version(package)
    assert shown["python"] == platform.python_version()
    assert shown["cpu"].startswith(torch.backends.cpu.get_cpu_capability())


def test_digests_are_those_of_the_files_that_travel(shown):
    digests = {name: value.removeprefix("sha256 ") for name, value in shown.items() if name.endswith(".py")}
    assert set(digests) == set(sam_split.CODE_FILES)
    for name, digest in digests.items():
        path = Path(importlib.import_module(f"sam_split.{name[:-3]}").__file__)
        assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest)
        assert len(digest) == 12


def test_nothing_of_the_person_is_shown(shown):
    text = " ".join(shown.values())
    for private in (str(Path.home()), str(Path(sam_split.__file__).parent), platform.node() + ".", "hf_x"):
        assert private not in text


def test_what_is_missing_or_broken_is_said(monkeypatch, capsys):
    """A report on a broken installation is the one that is needed most."""
    monkeypatch.setitem(__import__("sys").modules, "torch", None)  # its import raises ImportError
    monkeypatch.setattr("conversion.cli.env.PACKAGES", ("torch", "no-such-package"))
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert "torch cannot be imported: ModuleNotFoundError" in printed
    assert "no-such-package               not installed" in printed


def test_accelerators_are_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number} of a test")
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert "cuda:0                        GPU 0 of a test\ncuda:1                        GPU 1 of a test\n" in printed
