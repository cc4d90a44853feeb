"""Folders to publish, a Hub to publish to, and this process as its client.

Pytest imports this file before tests/conftest.py has set what huggingface_hub reads at import: what imports that is
imported inside the fixtures.
"""

import shutil
import time
from dataclasses import dataclass
from functools import partial

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


@pytest.fixture(scope="session")
def server():
    with HubServer() as hub:
        yield hub


@pytest.fixture
def hub(server):
    server.reset()
    return server


@dataclass
class Outcome:
    code: int
    out: str
    err: str
    slept: list[float]

    @property
    def text(self) -> str:
        return self.out + self.err


@pytest.fixture
def sam_split(hub, tmp_path, capsys):
    """Run a command on a clock that does not wait but notes how long it was asked to; no token in sight.

    It skips the load in a fresh interpreter, which has tests of its own, unless a test wants it.
    """
    from conversion.cli import main

    def run(*arguments, load=False, **variables) -> Outcome:
        capsys.readouterr()
        slept = []
        with hub.client(tmp_path / "home", **variables) as patch:
            patch.setattr(time, "sleep", slept.append)
            if not load:
                patch.setattr("hub_card.push.load_in_fresh_process", lambda *_: "not loaded: the test said so")
            code = main([str(argument) for argument in arguments])
        outcome = Outcome(code, *capsys.readouterr(), slept)
        assert code in (0, 1, 2)
        assert TOKEN not in outcome.text
        return outcome

    return run


@pytest.fixture
def push(sam_split):
    return partial(sam_split, "push")
