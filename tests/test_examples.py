"""The examples do what they say: an adapter of the tiny SAM learns coins, and three kinds of data are read alike."""

import importlib.util
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import load_file
from transformers import AutoModel

from conversion import convert

EXAMPLES = Path(__file__).parents[1] / "examples"


def script(name):
    spec = importlib.util.spec_from_file_location(Path(name).stem, EXAMPLES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


finetune = script("finetune_lora.py")
QUICK = ["--batch", "2", "--objects", "3", "--lr", "5e-3", "--rank", "4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "split"
    convert(EXAMPLES / "tiny_sam" / "checkpoint", folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def coins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coins") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["coins.py", str(folder)])
        script("coins.py").main()
    return folder


def run(base, data, out, *options, quick=True):
    return finetune.main([str(base), str(data), str(out), *(QUICK if quick else []), *options])


def test_adapter_learns_coins(base, coins, tmp_path):
    """Held-out coins gain, the base keeps its bits, every tensor of the adapter moves, and the files are there."""
    assert run(base, coins / "train", tmp_path, "--val", str(coins / "test"), "--steps", "30") == 0
    row = json.loads((tmp_path / "results.json").read_text())
    assert row["IoU after"] > row["IoU before"] + 0.01
    assert row["Dice after"] > row["Dice before"]
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 4 * 2 * 2, "four layers, q and v, A and B"
    assert all(tensor.abs().max() > 0 for tensor in adapter.values())
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"| {row['IoU before']} | {row['IoU after']} |" in card
    width, height = Image.open(tmp_path / "overlays.png").size
    assert (width, height) == (720, 960), "four rows of three"

    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "adapter")
    checkpoint = load_file(base / "model.safetensors")
    for name, tensor in model.get_base_model().state_dict().items():
        plain = name.replace(".base_layer", "")
        if "lora" not in plain:
            assert torch.equal(tensor, checkpoint[plain]), name


def picture_folder(folder, number=4):
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(number):
        image = np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        mask = np.zeros((40, 60), np.uint8)
        mask[5:20, 8:30], mask[25:38, 30:55] = 1, 255
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    return folder


def args(**more):
    return finetune.parse(["base", "data", "out", *(part for pair in more.items() for part in pair)])


def test_folder_coco_and_dataset_agree(tmp_path):
    folder = picture_folder(tmp_path / "folder")
    expected = finetune.Pictures(finetune.readers(folder, args()), False)
    assert expected[0]["masks"].shape == (2, 40, 60)

    coco = tmp_path / "coco"
    coco.mkdir()
    (folder / "images").rename(coco / "images")
    (coco / "images").rename(coco / "kept")
    (coco / "kept").rename(coco / "images")
    images, annotations = [], []
    for i in range(4):
        images.append({"id": i, "file_name": f"{i}.png", "height": 40, "width": 60})
        for mask in finetune.objects(Image.open(folder / "masks" / f"{i}.png")):
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            rle["counts"] = rle["counts"].decode()
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": 1, "segmentation": rle})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (coco / "annotations.json").write_text(json.dumps(content))

    rows = {
        "image": [str(coco / "images" / f"{i}.png") for i in range(4)],
        "mask": [str(folder / "masks" / f"{i}.png") for i in range(4)],
    }
    data = datasets.Dataset.from_dict(rows)
    data = data.cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())
    data.save_to_disk(tmp_path / "saved")

    picture_folder(tmp_path / "again")
    expected = finetune.Pictures(finetune.readers(tmp_path / "again", args()), False)
    for source in (coco, tmp_path / "saved"):
        pictures = finetune.Pictures(finetune.readers(source, args()), False)
        assert len(pictures) == 4
        for ours, theirs in zip((pictures[i] for i in range(4)), (expected[i] for i in range(4)), strict=True):
            assert np.array_equal(ours["masks"], theirs["masks"])
            assert np.array_equal(np.asarray(ours["image"]), np.asarray(theirs["image"]))
    with pytest.raises(ValueError, match="has no column 'truth'; it has image, mask"):
        finetune.readers(tmp_path / "saved", args(**{"--mask-column": "truth"}))
