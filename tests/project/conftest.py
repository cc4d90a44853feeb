"""What the pages' commands find: a small SAM in the place of ViT-B, on a Hub."""

import pytest
from models import stock_model
from pages import ROOT


@pytest.fixture(scope="session")
def vit_b(tmp_path_factory):
    """A transformers folder of the tiny model, which Meta's code can hold as well."""
    from conversion.folder import write_processor

    folder, model = tmp_path_factory.mktemp("hub") / "sam-vit-base", stock_model()
    model.save_pretrained(folder)
    write_processor(folder, None, model.config)
    return folder


@pytest.fixture
def hub(vit_b, tmp_path_factory, monkeypatch):
    """This process as a client of a Hub that has it as facebook/sam-vit-base."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "hub")
    from hub_server import HubServer

    with HubServer() as server, server.client(tmp_path_factory.mktemp("home")):
        server.create("facebook/sam-vit-base", {path.name: path.read_bytes() for path in vit_b.iterdir()})
        yield server
