"""Folders to publish, a Hub to publish to, and one client process that serves all tests.

Pytest imports this file before tests/conftest.py has set what huggingface_hub reads at import: what imports that is
imported inside the fixtures.
"""

import shutil

import pytest
from hub_client import Client
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


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    with HubServer() as hub, Client(hub, tmp_path_factory.mktemp("home"), HF_DEBUG="1") as client:
        yield hub, client
        assert TOKEN not in client.transcript
        assert not client.left_behind(TOKEN)


@pytest.fixture
def hub(world):
    world[0].reset()
    return world[0]


@pytest.fixture
def push(world, hub):
    """Run `sam-split push`; whatever happens, no traceback and no token in sight."""

    def run(*arguments, load=False):
        outcome = world[1].run("push", *arguments, load=load)
        assert outcome.code in (0, 1, 2), outcome.text
        assert "Traceback" not in outcome.text
        assert TOKEN not in outcome.text
        assert not any(TOKEN in f"{seen.target}{seen.headers}" for seen in hub.requests if seen.server == "cdn")
        return outcome

    return run
