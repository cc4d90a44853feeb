"""What was pushed loads as users load it, in an interpreter that cannot import this package: same weights, same masks.

One process per world (online, offline from the cache), because huggingface_hub reads its environment once and
transformers keeps the code it has loaded.
"""

import json
import re
import subprocess
import sys

import models
import numpy as np
import pytest
import torch
from hub_folders import save_adapter, save_split_model
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from hub_card.push import push
from hub_card.sections import Base

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
        save_file({name: tensor.contiguous() for name, tensor in click.items()}, root / "inputs.safetensors")
        picture = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(picture).save(root / "photo.jpg")
        (root / "shas.json").write_text(json.dumps(shas))
        yield hub, root, shas, expected


ISOLATED = """
import json, sys
sys.modules["sam_split"] = sys.modules["conversion"] = sys.modules["hub_card"] = None
"""

HEAD = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskGeneration, AutoProcessor
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

ONLINE = """
load("by id")
load("for mask generation", AutoModelForMaskGeneration)
load("by tag", revision="v1")
load("by sha", revision=shas["v1"])
load("new code on old weights", revision=shas["v1"], code_revision=shas["v2"])
load("old code on new weights", code_revision="v1")
from peft import PeftConfig, PeftModel
adapter = PeftConfig.from_pretrained(lora)
seen["base"] = [adapter.base_model_name_or_path, adapter.revision]
base = AutoModel.from_pretrained(repo, revision=adapter.revision, trust_remote_code=True)
adapted = PeftModel.from_pretrained(base, lora)
segment("adapted", adapted)
segment("merged", adapted.merge_and_unload())
from PIL import Image
from transformers import pipeline
photo = Image.open("photo.jpg")
processor = AutoProcessor.from_pretrained(repo)
prompted = processor(photo, input_points=[[[40, 30]]], return_tensors="pt")
seen["processor"] = [type(processor).__name__, list(prompted["pixel_values"].shape)]
seen["pipeline"] = len(pipeline("mask-generation", model=repo, trust_remote_code=True)(photo)["masks"])
"""

OFFLINE = """
load("by id")
load("by tag", revision="v1")
load("by sha", revision=shas["v1"])
"""

TAIL = """
save_file(masks, sys.argv[1])
print(json.dumps(seen))
"""


def interpreter(world, program, *arguments, **variables) -> str:
    """What a program prints in an interpreter of its own, without the package."""
    hub, root, *_ = world
    environment = {**hub.environment(root), **variables, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", ISOLATED + program, *arguments]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


def loaded(world, program, name, **variables):
    said = interpreter(world, HEAD + program + TAIL, f"{name}.safetensors", **variables)
    return json.loads(said.splitlines()[-1]), load_file(world[1] / f"{name}.safetensors")


@pytest.fixture(scope="module")
def online(world):
    return loaded(world, ONLINE, "online")


WHICH = {  # way to load -> (weights, code)
    "by id": ("v2", "v2"),
    "for mask generation": ("v2", "v2"),
    "by tag": ("v1", "v1"),
    "by sha": ("v1", "v1"),
    "new code on old weights": ("v1", "v2"),
    "old code on new weights": ("v2", "v1"),
}


def assert_close(got, expected):
    assert expected.abs().max() > 0.1, "the model computes something"
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("way", WHICH)
def test_weights_and_code_are_those_asked_for(world, online, way):
    _, _, shas, expected = world
    seen, masks = online
    weights, code = WHICH[way]
    module, published = seen[way]
    assert published == code
    assert module.startswith("transformers_modules.")
    assert shas[code] in module
    assert_close(masks[way], expected[weights])


def test_the_versions_differ(world):
    *_, expected = world
    assert (expected["v1"] - expected["v2"]).abs().max() > 0.1
    assert (expected["v1"] - expected["lora"]).abs().max() > 0.1


def test_the_adapter_on_the_base_that_it_names(world, online):
    _, _, shas, expected = world
    seen, masks = online
    assert seen["base"] == [REPO, shas["v1"]], "the revision that was the head when the adapter was pushed"
    assert_close(masks["adapted"], expected["lora"])
    assert_close(masks["merged"], expected["lora"])


def test_the_processor_and_the_pipeline(online):
    seen, _ = online
    assert seen["processor"] == ["SamProcessor", [1, 3, models.IMAGE_SIZE, models.IMAGE_SIZE]]
    assert seen["pipeline"] > 0


def test_offline_from_the_cache(world, online):
    hub, *_, expected = world
    hub.requests.clear()
    seen, masks = loaded(world, OFFLINE, "offline", HF_HUB_OFFLINE="1")
    assert not hub.requests
    assert len(masks) == 3
    for way in masks:
        weights, code = WHICH[way]
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
