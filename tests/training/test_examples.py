"""Fine-tuning does what it says: the tiny SAM segments, its adapters learn coins, and data is read or refused."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
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
from transformers import AutoModel, SamModel

from conversion import convert
from conversion.cli import main
from conversion.cli.demo import TINY_SAM
from sam_split.training import boxes_around, find_examples, iou_and_dice, object_masks
from sam_split.training.trainer import PromptTrainer

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def script(name):
    spec = importlib.util.spec_from_file_location(Path(name).stem, EXAMPLES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# accelerate's option for CPUs starts one process; that for GPUs starts two, which find none and use gloo.
LAUNCHERS = [
    "torchrun --nproc-per-node 2 --no-python sam-split finetune",
    "accelerate launch --multi_gpu --num_processes 2 --no_python sam-split finetune",
]
QUICK = ["--batch", "2", "--objects", "3", "--lr", "5e-3", "--rank", "4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "split"
    convert(TINY_SAM, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def coins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coins") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["coins.py", str(folder)])
        script("coins.py").main()
    return folder


def run(base, data, out, *options, quick=True):
    return main(["finetune", str(base), str(data), str(out), *(QUICK if quick else []), *options])


def test_tiny_sam_segments_unseen_shapes(base):
    """Ours and stock's, from a box; the box itself is no answer."""
    shapes = script("train_tiny_sam.py")
    images, labels = shapes.sample_images(10**6, 256)
    boxes = boxes_around(labels)
    for model in (AutoModel.from_pretrained(base), SamModel.from_pretrained(TINY_SAM)):
        with torch.no_grad():
            pixels = shapes.normalised(images)
            masks = model.eval()(pixel_values=pixels, input_boxes=boxes, multimask_output=False).pred_masks
        assert iou_and_dice(masks[:, :, 0], labels)[0].mean() >= 0.85
    y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    x0, y0, x1, y1 = boxes[..., None, None].unbind(2)
    filled = ((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)).float() - 0.5
    assert iou_and_dice(filled, labels)[0].mean() < 0.75


def test_adapter_learns_coins(base, coins, tmp_path):
    """IoU rises on held-out coins, the base keeps its bits, every adapter tensor changes, and the files exist."""
    assert run(base, coins / "train", tmp_path, "--val", str(coins / "test"), "--steps", "30") == 0
    row = json.loads((tmp_path / "results.json").read_text())
    assert row["IoU after"] > row["IoU before"] + 0.01
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 4 * 2 * 2, "four layers, q and v, A and B"
    assert all(tensor.abs().max() > 0 for tensor in adapter.values())
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"| {row['IoU before']:.3f} | {row['IoU after']:.3f} |" in card
    width, height = Image.open(tmp_path / "overlays.png").size
    assert (width, height) == (720, 960), "four rows of three"

    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "adapter")
    checkpoint = load_file(base / "model.safetensors")
    for name, tensor in model.get_base_model().state_dict().items():
        plain = name.replace(".base_layer", "")
        if "lora" not in plain:
            assert torch.equal(tensor, checkpoint[plain]), name


@pytest.mark.parametrize(
    ("preset", "trained"),
    [
        ("encoder-qkv", {"q", "k", "v"}),
        ("late", {"q", "v"}),
        ("decoder", {"q_proj", "k_proj", "v_proj", "out_proj", "lin1", "lin2"}),
        ("encoder+decoder", {"q", "v", "q_proj", "k_proj", "v_proj", "out_proj", "lin1", "lin2"}),
    ],
)
def test_presets(base, coins, tmp_path, preset, trained):
    assert run(base, coins / "test", tmp_path, "--preset", preset, "--steps", "2", "--late-layers", "1") == 0
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapter} == trained
    assert all(tensor.abs().max() > 0 for name, tensor in adapter.items()), "each was reached by a gradient"
    if preset == "late":
        assert {re.search(r"layers\.(\d+)", name)[1] for name in adapter} == {"3"}, "by its number in the whole model"
        PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "adapter")
        files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
        assert len(files) == 10, "one for each image"
        again = ["--steps", "1", "--late-layers", "1", "--preset", "late", "--cache", str(tmp_path / "cache")]
        assert run(base, coins / "test", tmp_path / "again", *again) == 0
        assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}


def test_resumed_equals_uninterrupted(base, coins, tmp_path, monkeypatch):
    options = ["--epochs", "2", "--corrections", "1"]  # 4 steps each
    assert run(base, coins / "test", tmp_path / "whole", *options) == 0

    class Killed(Exception):
        pass

    def die(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise Killed
        return step(self, *args, **kwargs)

    step = PromptTrainer.compute_loss
    with monkeypatch.context() as patch:
        patch.setattr(PromptTrainer, "compute_loss", die)
        with pytest.raises(Killed):
            run(base, coins / "test", tmp_path / "cut", *options)
    assert run(base, coins / "test", tmp_path / "cut", *options, "--resume") == 0
    whole, cut = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name


def image_folder(folder, number=4):
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(number):
        image = np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        mask = np.zeros((40, 60), np.uint8)
        mask[5:20, 8:30], mask[25:38, 30:55] = 1, 255
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    return folder


def test_folder_coco_and_dataset_agree(tmp_path):
    folder = image_folder(tmp_path / "folder")
    expected = find_examples(folder)
    assert expected[0]["masks"].shape == (2, 40, 60)

    coco = tmp_path / "coco"
    coco.mkdir()
    (folder / "images").rename(coco / "images")
    images, annotations = [], []
    for i in range(4):
        images.append({"id": i, "file_name": f"{i}.png", "height": 40, "width": 60})
        for mask in object_masks(Image.open(folder / "masks" / f"{i}.png")):
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

    image_folder(tmp_path / "again")
    expected = find_examples(tmp_path / "again")
    for source in (coco, tmp_path / "saved"):
        images = find_examples(source)
        assert len(images) == 4
        for ours, theirs in zip((images[i] for i in range(4)), (expected[i] for i in range(4)), strict=True):
            assert np.array_equal(ours["masks"], theirs["masks"])
            assert np.array_equal(np.asarray(ours["image"]), np.asarray(theirs["image"]))
    with pytest.raises(ValueError, match="has no column 'truth'; it has image, mask"):
        find_examples(tmp_path / "saved", mask_column="truth")


def test_skip_bad(base, tmp_path, capsys):
    """An image that cannot be read is left out and not replaced by another."""
    folder = image_folder(tmp_path / "data")
    path = folder / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:200])
    assert find_examples(folder).usable(skip_bad=True).names == ["0.png", "1.png", "3.png"]
    assert "skipped 2.png: " in capsys.readouterr().err
    held_out = image_folder(tmp_path / "held-out", 2)
    (held_out / "images" / "0.png").write_bytes(b"")
    assert run(base, folder, tmp_path / "out", "--val", str(held_out), "--epochs", "1", "--skip-bad") == 0
    assert Image.open(tmp_path / "out" / "overlays.png").height == 240, "one held-out image, once"


def test_readme_section(tmp_path, monkeypatch):
    """Its commands run as printed, the training cut short, and its figures are those of the committed table."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Fine-tune on your")[1].split("\n## ")[0]
    assert all(f"`{launcher}" in " ".join(section.split()) for launcher in LAUNCHERS)
    for folder in ("conversion", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    trained = 0
    for block in re.findall(r"```bash\n(.*?)```", section, re.DOTALL):
        for line in block.strip().splitlines():
            command = line.split("#")[0].split()
            if command[:2] == ["python", "examples/coins.py"]:
                monkeypatch.setattr(sys, "argv", command[1:])
                script("coins.py").main()
            else:
                assert command[0] == "sam-split", line
                finetunes = command[1] == "finetune"
                assert main([*command[1:], *(["--steps", "1"] if finetunes else [])]) == 0, line
                trained += finetunes
    assert trained == 3
    PeftModel.from_pretrained(AutoModel.from_pretrained("tiny"), "coins-adapter/adapter")
    AutoModel.from_pretrained("merged")
    measured = re.findall(r"0\.\d{3}\b", (EXAMPLES / "results" / "coins.md").read_text(encoding="utf-8"))
    quoted = re.findall(r"0\.\d{3}\b", section)
    assert len(quoted) == 3
    assert set(quoted) <= set(measured)


def test_options_together(base, coins, tmp_path):
    """Low precision, checkpointing and clicks run, and what gains nothing stops early: a rate of 0."""
    options = ["--lr", "0", "--epochs", "3", "--patience", "1", "--bf16", "--checkpointing", "--corrections", "1"]
    assert run(base, coins / "test", tmp_path, *options) == 0
    saved = sorted((tmp_path / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((saved[-1] / "trainer_state.json").read_text())
    assert state["epoch"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes(base, coins, tmp_path, launcher):
    """Eight images are one epoch of two steps: two processes, two images each."""
    program, _, options = launcher.partition(" --")
    port = "--main_process_port 0" if "accelerate" in launcher else "--standalone"  # any port that is free
    command = [*f"{program} {port} --{options}".split(), base, coins / "test", tmp_path, *QUICK, "--steps", "2"]
    binaries = str(Path(sys.executable).parent)
    path = {"PATH": os.pathsep.join([binaries, os.environ["PATH"]]), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [shutil.which(command[0], path=binaries), *map(str, command[1:])],
        env={**os.environ, **path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["epoch"] == 1
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in adapter.values())
