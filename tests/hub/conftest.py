"""Folders to publish, a Hub to publish to, and this process as its client.

Pytest imports this file before tests/conftest.py has set what huggingface_hub reads at import: what imports that is
imported inside the fixtures.
"""

import shutil
import time
from functools import partial
from types import SimpleNamespace

import pytest
from hub_server import TOKEN, HubServer


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    from hub_folders import save_adapter, save_split_model

    root = tmp_path_factory.mktemp("saved")
    save_adapter(save_split_model(root / "model"), root / "adapter", modules_to_save=["iou_prediction_head"])
    return root


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved / "model", tmp_path / "model")


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved / "adapter", tmp_path / "adapter")


@pytest.fixture
def staged(tmp_path):
    """Stage a folder, as for a push to alice/sam."""
    from hub_card.publishable import stage

    def run(folder, repo_id="alice/sam", **options):
        target = tmp_path / "staged"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        return stage(folder, target, repo_id, **options)

    return run


@pytest.fixture
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture
def sam_split(hub, tmp_path, capsys):
    """Run a command on a clock that does not wait but notes how long it was asked to; no token in sight.

    It must end with `code`, or None for 0 or 1, and say what is wrong in a last line. It skips the load in a fresh
    interpreter, which has tests of its own, unless a test wants it.
    """
    from conversion.cli import main

    def run(*arguments, code=0, load=False, **variables):
        capsys.readouterr()
        slept = []
        with hub.client(tmp_path / "home", **variables) as patch:
            patch.setattr(time, "sleep", slept.append)
            if not load:
                patch.setattr("hub_card.push.load_in_fresh_process", lambda *_: "not loaded: the test said so")
            ended = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert ended in ((0, 1) if code is None else (code,)), out + err
        assert TOKEN not in out + err
        assert not ended or err.strip().splitlines()[-1].startswith("sam-split: error: ")
        return SimpleNamespace(out=out, err=err, slept=slept)

    return run


@pytest.fixture
def push(sam_split):
    return partial(sam_split, "push")
