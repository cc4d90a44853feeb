"""A converted folder loads through the Auto classes where this package is not installed, and stays whole when saved.

One fresh interpreter loads a converted folder and saves it again in three ways; a second one loads what was saved.
Outputs are compared bit for bit with those of this process, which has the package.
"""

import json

import numpy as np
import pytest
import torch
from isolated import run_isolated
from models import CHANNELS, GRID, IMAGE_SIZE, pixels, points, stock_model
from parity import assert_same_outputs, stock_forward
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskGeneration,
    AutoProcessor,
    SamImageProcessor,
    SamProcessor,
    pipeline,
)

from conversion import convert
from sam_split import CODE_FILES, SamSplitConfig, SamSplitModel

AUTO_MAP = {
    "AutoConfig": "configuration_sam_split.SamSplitConfig",
    "AutoModel": "modeling_sam_split.SamSplitModel",
    "AutoModelForMaskGeneration": "modeling_sam_split.SamSplitModel",
}
GRID_OF_POINTS = {
    "points_per_crop": 4,
    "points_per_batch": 8,
    "pred_iou_thresh": 0.0,
    "stability_score_thresh": 0.0,
    "crops_nms_thresh": 1.0,
}

LOAD = """
import json, sys
import numpy as np
import torch
from pathlib import Path
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, AutoProcessor, pipeline

inputs = torch.load(sys.argv[1])
results, names = {}, {}

@torch.no_grad()
def outputs(model):
    result = model.eval()(**inputs)
    return {"pred_masks": result.pred_masks, "iou_scores": result.iou_scores}
"""

FIRST = (
    LOAD
    + """
folder, work, options = sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
names["config"] = type(config).__name__
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
results["model"] = outputs(model)
names["model"] = type(model).__name__
names["module"] = type(model).__module__
generator = AutoModelForMaskGeneration.from_pretrained(folder, trust_remote_code=True)
results["generator"] = outputs(generator)
names["generator"] = type(generator).__name__
names["processor"] = type(AutoProcessor.from_pretrained(folder)).__name__
try:
    AutoModel.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    names["untrusted"] = str(error)

image = Image.open(work / "image.png")
generate = pipeline("mask-generation", model=folder, trust_remote_code=True, device="cpu")
found = generate(image, **options)
results["pipeline"] = {
    "masks": torch.from_numpy(np.stack([np.asarray(mask) for mask in found["masks"]])),
    "scores": torch.as_tensor(found["scores"]),
}

model.save_pretrained(work / "saved_as_loaded")
results["saved_as_loaded"] = outputs(model)

torch.manual_seed(0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(**inputs).pred_masks.square().mean().backward()
optimizer.step()
model.save_pretrained(work / "saved_fine_tuned")
results["saved_fine_tuned"] = outputs(model)

from peft import LoraConfig, get_peft_model

adapted = get_peft_model(generator, LoraConfig(r=4, target_modules=["q", "v"]))
for name, parameter in adapted.named_parameters():
    if "lora_" in name:
        parameter.data.normal_()
merged = adapted.merge_and_unload()
merged.save_pretrained(work / "saved_merged")
results["saved_merged"] = outputs(merged)
torch.save(results, work / "first.pt")
print(json.dumps(names))
"""
)

SECOND = (
    LOAD
    + """
work = Path(sys.argv[2])
for name in sys.argv[3:]:
    for cls in (AutoModel, AutoModelForMaskGeneration):
        results[f"{name} {cls.__name__}"] = outputs(cls.from_pretrained(work / name, trust_remote_code=True))
torch.save(results, work / "second.pt")
"""
)

SAVED = ("saved_as_loaded", "saved_fine_tuned", "saved_merged")


def tiny_processor() -> SamProcessor:
    return SamProcessor(
        SamImageProcessor(
            size={"longest_edge": IMAGE_SIZE},
            pad_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            mask_size={"longest_edge": 4 * GRID},
            mask_pad_size={"height": 4 * GRID, "width": 4 * GRID},
        )
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("auto_classes")


@pytest.fixture(scope="module")
def stock_folder(work):
    theirs = stock_model()
    # Scores near 1, as a trained model gives; those of a random one would all be filtered out by the pipeline.
    theirs.mask_decoder.iou_prediction_head.proj_out.bias.data.fill_(1.0)
    theirs.save_pretrained(work / "stock")
    tiny_processor().save_pretrained(work / "stock")
    return work / "stock"


@pytest.fixture(scope="module")
def folder(work, stock_folder):
    convert(str(stock_folder), work / "tiny_split_model", progress=False)
    return work / "tiny_split_model"


@pytest.fixture(scope="module")
def inputs():
    return {"pixel_values": pixels(), **points(1, 0, -1, -10)}


@pytest.fixture(scope="module")
def first(work, folder, inputs):
    """(names, results) of the first interpreter."""
    torch.save(inputs, work / "inputs.pt")
    noise = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((80, 60), Image.Resampling.BICUBIC).save(work / "image.png")
    printed = run_isolated(
        FIRST, work / "inputs.pt", folder, work, json.dumps(GRID_OF_POINTS), home=work / "first_home"
    )
    return json.loads(printed.splitlines()[-1]), torch.load(work / "first.pt")


@pytest.fixture(scope="module")
def second(work, first):
    """Results of the second interpreter."""
    run_isolated(SECOND, work / "inputs.pt", work, *SAVED, home=work / "second_home")
    return torch.load(work / "second.pt")


def outputs(model, inputs):
    with torch.no_grad():
        return stock_forward(model.eval(), **inputs)


def assert_identical(left, right):
    assert left.keys() == right.keys()
    for name, value in right.items():
        assert torch.equal(left[name], value), name


def test_classes_come_from_the_folder(first):
    names, _ = first
    assert names["config"] == "SamSplitConfig"
    assert names["model"] == names["generator"] == "SamSplitModel"
    assert names["module"].startswith("transformers_modules.")
    assert names["processor"] == "SamProcessor"
    assert "trust_remote_code=True" in names["untrusted"]


def test_outputs_without_the_package(first, folder, stock_folder, inputs):
    _, results = first
    here = outputs(SamSplitModel.from_pretrained(folder), inputs)
    assert here["pred_masks"].std() > 0.1
    assert_identical(results["model"], here)
    assert_identical(results["generator"], here)
    assert_same_outputs(here, outputs(AutoModel.from_pretrained(stock_folder), inputs))


def test_pipeline_is_stocks(first, work, stock_folder):
    _, results = first
    generate = pipeline("mask-generation", model=str(stock_folder), device="cpu")
    expected = generate(Image.open(work / "image.png"), **GRID_OF_POINTS)
    masks = np.stack([np.asarray(mask) for mask in expected["masks"]])
    assert len(masks) == 4 * 4 * 3
    assert 0.02 < masks.mean() < 0.98
    assert masks.any(axis=(1, 2)).all(), "no mask is empty"
    assert np.array_equal(results["pipeline"]["masks"].numpy(), masks)
    torch.testing.assert_close(results["pipeline"]["scores"], torch.as_tensor(expected["scores"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SAVED)
def test_saved_folder_is_whole(first, work, folder, name):
    config = json.loads((work / name / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["model_type"] == "sam_split"
    assert config["architectures"] == ["SamSplitModel"]
    for file in CODE_FILES:
        assert (work / name / file).read_bytes() == (folder / file).read_bytes()
    assert (work / name / "model.safetensors").exists()
    assert not list((work / name).glob("*.bin"))


@pytest.mark.parametrize("name", SAVED)
def test_saved_folder_loads(first, second, name):
    _, results = first
    assert_identical(second[f"{name} AutoModel"], results[name])
    assert_identical(second[f"{name} AutoModelForMaskGeneration"], results[name])


def test_saving_moved_only_what_was_trained(first, work, folder):
    _, results = first
    before = load_file(folder / "model.safetensors")
    assert_identical(load_file(work / "saved_as_loaded" / "model.safetensors"), before)
    assert_identical(results["saved_as_loaded"], results["model"])
    for name in ("saved_fine_tuned", "saved_merged"):
        assert (results[name]["pred_masks"] - results["model"]["pred_masks"]).abs().max() > 0.01
    merged = load_file(work / "saved_merged" / "model.safetensors")
    moved = {key for key, value in before.items() if not torch.equal(merged[key], value)}
    assert moved == {f"vision_encoder.layers.{layer}.attn.{name}.weight" for layer in (0, 1) for name in "qv"}


def test_with_the_package_no_trust_is_needed(folder, inputs):
    for auto in (AutoModel, AutoModelForMaskGeneration):
        assert type(auto.from_pretrained(folder)) is SamSplitModel
    assert type(AutoConfig.from_pretrained(folder)) is SamSplitConfig
    assert type(AutoProcessor.from_pretrained(folder)) is SamProcessor


def test_built_from_a_config_is_saved_whole(work, second):
    """A model that was never loaded ships its code and all three Auto classes too."""
    vision = {"hidden_size": CHANNELS, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": IMAGE_SIZE}
    vision |= {"output_channels": CHANNELS, "num_pos_feats": CHANNELS // 2, "global_attn_indexes": [0]}
    decoder = {"hidden_size": CHANNELS, "mlp_dim": 64}
    SamSplitModel(SamSplitConfig(vision, None, decoder)).save_pretrained(work / "built")
    assert json.loads((work / "built" / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert all((work / "built" / file).exists() for file in CODE_FILES)


def test_forward_takes_what_the_processor_gives(folder):
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    batch = processor(images=image, input_points=[[[40.0, 30.0]]], return_tensors="pt")
    with torch.no_grad():
        result = model(**batch)
    masks = processor.image_processor.post_process_masks(
        result.pred_masks, batch["original_sizes"], batch["reshaped_input_sizes"]
    )
    assert masks[0].shape == (1, 3, 60, 80)
