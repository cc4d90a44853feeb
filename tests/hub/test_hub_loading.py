"""What was pushed loads as users load it, in an interpreter that cannot import this package: same weights, same masks.

One process per world (online, offline from the cache), because huggingface_hub reads its environment once and
transformers keeps the code it has loaded.
"""

import json
import re

import models
import numpy as np
import pytest
import torch
from hub_folders import save_adapter, save_split_model
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from isolated import run_isolated
from PIL import Image
from safetensors.torch import load_file, save_file

from hub_card.folder import Base
from hub_card.push import push

pytestmark = pytest.mark.slow
REPO, LORA = "alice/sam-split", "alice/sam-split-lora"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two versions of a model with a tag on the first, and an adapter for the first; pushed by our own code."""
    root = tmp_path_factory.mktemp("world")
    click = {"pixel_values": models.pixels(), **models.points(1, 0)}
    shas, expected = {}, {}
    with HubServer() as hub, hub.client(root) as patch, torch.no_grad():
        patch.setattr("hub_card.push.load_in_fresh_process", lambda *_: "test_push.py tries it")
        for version, seed in (("v1", 0), ("v2", 1)):
            ours = save_split_model(root / version, seed)
            code = root / version / "modeling_sam_split.py"
            code.write_text(code.read_text() + f"\nPUBLISHED = {version!r}\n")
            shas[version] = push(root / version, REPO, allow_modified_code=True).oid
            expected[version] = ours(**click)["pred_masks"]
            if version == "v1":
                hub.repositories[REPO].refs["v1"] = shas["v1"]
                adapted = save_adapter(ours, root / "lora").eval()
                expected["lora"] = adapted(**click)["pred_masks"]
                push(root / "lora", LORA, base=Base(REPO))
        for other in ("v2", "lora"):
            assert (expected["v1"] - expected[other]).abs().max() > 0.1, "or any weights would do"
        save_file({name: tensor.contiguous() for name, tensor in click.items()}, root / "inputs.safetensors")
        picture = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(picture).save(root / "photo.jpg")
        (root / "shas.json").write_text(json.dumps(shas))
        yield hub, root, shas, expected


HEAD = """
import json, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskGeneration
shas, inputs, masks, seen = json.load(open("shas.json")), load_file("inputs.safetensors"), {}, {}
repo, lora = "alice/sam-split", "alice/sam-split-lora"

def load(name, auto=AutoModel, **options):
    model = auto.from_pretrained(repo, trust_remote_code=True, **options)
    module = sys.modules[type(model).__module__]
    seen[name] = [module.__name__, module.PUBLISHED]
    segment(name, model)

def segment(name, model):
    with torch.no_grad():
        masks[name] = model.eval()(**inputs)["pred_masks"].contiguous()
"""

WAYS = {  # way to load -> (options, version of the weights, of the code)
    "by id": ("", "v2", "v2"),
    "for mask generation": ("auto=AutoModelForMaskGeneration", "v2", "v2"),
    "by tag": ('revision="v1"', "v1", "v1"),
    "by sha": ('revision=shas["v1"]', "v1", "v1"),
    "new code on old weights": ('revision=shas["v1"], code_revision=shas["v2"]', "v1", "v2"),
    "old code on new weights": ('code_revision="v1"', "v2", "v1"),
}
OFFLINE = ("by id", "by tag", "by sha")

ADAPTED = """
from peft import PeftConfig, PeftModel
adapter = PeftConfig.from_pretrained(lora)
seen["base"] = [adapter.base_model_name_or_path, adapter.revision]
base = AutoModel.from_pretrained(repo, revision=adapter.revision, trust_remote_code=True)
adapted = PeftModel.from_pretrained(base, lora)
segment("adapted", adapted)
"""

TAIL = """
save_file(masks, sys.argv[1])
print(json.dumps(seen))
"""


def interpreter(world, program, *arguments, **variables) -> str:
    """What a program prints in an interpreter of its own, without the package; nothing written holds the token."""
    hub, root, *_ = world
    said = run_isolated(program, *arguments, home=root, unseen=TOKEN, **{**hub.environment(root), **variables})
    assert not [path for path in root.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    return said


def loaded(world, ways, name, extra="", **variables):
    loads = "".join(f"load({way!r}, {WAYS[way][0]})\n" for way in ways)
    said = interpreter(world, HEAD + loads + extra + TAIL, f"{name}.safetensors", **variables)
    return json.loads(said.splitlines()[-1]), load_file(world[1] / f"{name}.safetensors")


@pytest.fixture(scope="module")
def online(world):
    return loaded(world, WAYS, "online", ADAPTED)


def assert_close(got, expected):
    assert expected.abs().max() > 0.1, "the model computes something"
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("way", WAYS)
def test_weights_and_code_are_those_asked_for(world, online, way):
    _, _, shas, expected = world
    seen, masks = online
    _, weights, code = WAYS[way]
    module, published = seen[way]
    assert published == code
    assert module.startswith("transformers_modules.")
    assert shas[code] in module
    assert_close(masks[way], expected[weights])


def test_the_adapter_on_the_base_that_it_names(world, online):
    _, _, shas, expected = world
    seen, masks = online
    assert seen["base"] == [REPO, shas["v1"]], "the revision that was the head when the adapter was pushed"
    assert_close(masks["adapted"], expected["lora"])


def test_offline_from_the_cache(world, online):
    hub, *_, expected = world
    hub.requests.clear()
    seen, masks = loaded(world, OFFLINE, "offline", HF_HUB_OFFLINE="1")
    assert not hub.requests
    for way in OFFLINE:
        _, weights, code = WAYS[way]
        assert seen[way][1] == code
        assert_close(masks[way], expected[weights])


@pytest.mark.parametrize("repo", [REPO, LORA])
def test_every_python_block_of_the_card_runs(world, repo):
    """Against the pushed repository, one after the other, in one interpreter without the package."""
    card = ModelCard(world[0].files(repo)["README.md"].decode())
    blocks = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    assert len(blocks) == (4 if repo == REPO else 2)
    checks = "assert best.shape == (60, 80)\nassert every_mask\n" if repo == REPO else "assert merged\n"
    said = interpreter(world, "\n".join(blocks) + checks)
    if repo == REPO:
        promised = re.search(r"([\d,]+) trainable parameters", card.content)[1]
        assert f"trainable params: {promised} " in said
