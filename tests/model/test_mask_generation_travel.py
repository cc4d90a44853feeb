"""Mask generation travels with the weights: the pipeline finds it in every saved folder, with transformers alone."""

import json

import pytest
import torch
from everything import PHOTOGRAPHS, TINY_SAM, ours
from isolated import run_isolated
from peft import LoraConfig, get_peft_model
from transformers import pipeline

from conversion import convert
from sam_split import CODE_FILES, SamSplitConfig, SamSplitMaskGenerationPipeline, SamSplitModel

OPTIONS = {"points_per_crop": 6, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.4, "output_bboxes_mask": True}

LESS_INSTALLED = """
import importlib.util
MISSING = "torchvision", "torchcodec", "pycocotools", "cv2", "scipy", "skimage"
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name.partition(".")[0] in MISSING else find(name, *package)
"""
SAVE = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForMaskGeneration
folder, work = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(work + "/loaded")
torch.manual_seed(0)
with torch.no_grad():
    for parameter in model.mask_decoder.parameters():
        parameter.add_(0.001 * torch.randn_like(parameter))
model.save_pretrained(work + "/tuned")
adapted = get_peft_model(
    AutoModelForMaskGeneration.from_pretrained(folder, trust_remote_code=True), LoraConfig(target_modules=["q", "v"])
)
for name, parameter in adapted.named_parameters():
    if "lora_" in name:
        parameter.data.normal_(std=0.05)
adapted.merge_and_unload().save_pretrained(work + "/merged")
"""
GENERATE = """
import json
import torch
from PIL import Image
from transformers import AutoModel, pipeline
work, options, *folders = sys.argv[1:]
image, options, found = Image.open(work + "/image.png"), json.loads(options), {}
for folder in folders:
    generator = pipeline("mask-generation", model=folder, trust_remote_code=True, device="cpu")
    by_model = AutoModel.from_pretrained(folder, trust_remote_code=True).generate_masks(image, **options)
    found[folder] = type(generator).__name__, type(generator).__module__, generator(image, **options), by_model
torch.save(found, work + "/found.pt")
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("mask_generation")
    PHOTOGRAPHS["coins"].save(work / "image.png")
    return work


@pytest.fixture(scope="module")
def folder(work):
    convert(str(TINY_SAM), work / "converted", progress=False)
    return work / "converted"


@pytest.fixture(scope="module")
def saved(work, folder):
    run_isolated(SAVE, folder, work, home=work / "save_home")
    return {"converted": folder, **{name: work / name for name in ("loaded", "tuned", "merged")}}


@pytest.fixture(scope="module")
def found(work, saved):
    """Folder -> class, module, and results of pipeline and method, in an interpreter with less installed."""
    hub = work / "home" / "hub" / "models--ann--sam"
    (hub / "snapshots").mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0" * 40)
    (hub / "snapshots" / ("0" * 40)).symlink_to(saved["converted"])
    arguments = work, json.dumps(OPTIONS), *saved.values(), "ann/sam"
    run_isolated(LESS_INSTALLED + GENERATE, *arguments, home=work / "home")
    results = torch.load(work / "found.pt", weights_only=True)
    return {name: results[str(path)] for name, path in {**saved, "hub": "ann/sam"}.items()}


@pytest.mark.parametrize("name", ["converted", "loaded", "tuned", "merged", "hub"])
def test_pipeline_comes_from_the_folder(found, saved, name):
    kind, module, by_pipeline, by_model = found[name]
    assert kind == "SamSplitMaskGenerationPipeline"
    assert module.startswith("transformers_modules.")
    model = SamSplitModel.from_pretrained(saved["converted" if name == "hub" else name])
    expected = model.generate_masks(PHOTOGRAPHS["coins"], **OPTIONS)
    assert len(expected["scores"]) > 4
    for results in by_pipeline, by_model:
        assert_identical(results, expected)


def test_what_was_saved_differs(found):
    scores = [found[name][2]["scores"].tolist() for name in ("converted", "tuned", "merged")]
    assert scores[0] != scores[1] != scores[2] != scores[0]


@pytest.mark.parametrize("name", ["loaded", "tuned", "merged"])
def test_saved_folders_hold_the_code(saved, name):
    assert set(CODE_FILES) <= {path.name for path in saved[name].iterdir()}
    config = json.loads((saved[name] / "config.json").read_text())
    assert config["custom_pipelines"] == SamSplitConfig().custom_pipelines


def test_an_old_folder_has_no_pipeline_of_its_own(tmp_path, folder):
    old = tmp_path / "from_before_it_existed"
    old.mkdir()
    for path in folder.iterdir():
        if "mask_generation" not in path.name and "run_lengths" not in path.name:
            (old / path.name).write_bytes(path.read_bytes())
    config = json.loads((old / "config.json").read_text())
    del config["custom_pipelines"]
    (old / "config.json").write_text(json.dumps(config))
    generator = pipeline("mask-generation", model=str(old), device="cpu")
    assert type(generator).__name__ == "MaskGenerationPipeline"
    image = PHOTOGRAPHS["astronaut"].crop((0, 0, 128, 90))
    assert len(generator(image, **{**OPTIONS, "points_per_batch": 36})["masks"]) > 2


def test_adapters_generate_masks_before_and_after_the_merge(folder):
    torch.manual_seed(0)
    base = SamSplitModel.from_pretrained(folder)
    before = base.generate_masks(PHOTOGRAPHS["coins"], **OPTIONS)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q", "v"], lora_dropout=0.5)).train()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.05)
    found = adapted.generate_masks(PHOTOGRAPHS["coins"], **OPTIONS)
    assert adapted.training
    assert all(module.training for module in adapted.modules())
    assert before["scores"].tolist() != found["scores"].tolist()
    assert_identical(found, adapted.generate_masks(PHOTOGRAPHS["coins"], **OPTIONS))
    merged = adapted.merge_and_unload().generate_masks(PHOTOGRAPHS["coins"], **OPTIONS)
    assert torch.equal(merged["bounding_boxes"], found["bounding_boxes"])
    torch.testing.assert_close(merged["scores"], found["scores"], atol=1e-5, rtol=0)
    assert sum(int((mask != other).sum()) for mask, other in zip(merged["masks"], found["masks"], strict=True)) < 5


def test_pipeline_options_at_construction_and_in_a_call():
    generator = pipeline(
        "mask-generation", model=ours(), pipeline_class=SamSplitMaskGenerationPipeline, device="cpu", **OPTIONS
    )
    expected = ours().generate_masks(PHOTOGRAPHS["coffee"], **{**OPTIONS, "pred_iou_thresh": 0.5})
    assert_identical(generator(PHOTOGRAPHS["coffee"], pred_iou_thresh=0.5), expected)
    with pytest.raises(TypeError, match="did you mean 'points_per_batch'"):
        generator(PHOTOGRAPHS["coffee"], point_per_batch=3)
    images = [PHOTOGRAPHS["coffee"], PHOTOGRAPHS["coins"]]
    results = generator(images, batch_size=2, pred_iou_thresh=0.5)
    assert isinstance(results, list)
    assert torch.equal(results[0]["bounding_boxes"], expected["bounding_boxes"])
    lazy = generator((image for image in images), pred_iou_thresh=0.5)
    assert not isinstance(lazy, list)
    assert_identical(next(lazy), expected)


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    assert torch.equal(found["scores"], expected["scores"])
    assert torch.equal(found["bounding_boxes"], expected["bounding_boxes"])
    assert len(found["masks"]) == len(expected["masks"])
    assert all(torch.equal(mask, other) for mask, other in zip(found["masks"], expected["masks"], strict=True))
