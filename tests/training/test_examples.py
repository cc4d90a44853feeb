"""Fine-tuning does what it says: the tiny SAM segments, its adapters learn coins, and data is read or refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from training_data import EXAMPLES, image_folder, script
from transformers import AutoModel, SamModel

from conversion.cli import main
from conversion.cli.demo import TINY_SAM
from sam_split.training import boxes_around, find_examples, iou_and_dice

ROOT = Path(__file__).parents[2]
# accelerate's option for CPUs starts one process; that for GPUs starts two, which find none and use gloo.
LAUNCHERS = [
    "torchrun --nproc-per-node 2 --no-python sam-split finetune",
    "accelerate launch --multi_gpu --num_processes 2 --no_python sam-split finetune",
]
QUICK = ["--batch", "2", "--objects", "3", "--lr", "5e-3", "--rank", "4", "--no-everything"]


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
        assert iou_and_dice(masks[:, :, 0], labels)[0].mean() >= 0.9
    y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    x0, y0, x1, y1 = boxes[..., None, None].unbind(2)
    filled = ((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)).float() - 0.5
    assert iou_and_dice(filled, labels)[0].mean() < 0.75


@pytest.mark.slow
def test_tiny_sam_finds_unseen_shapes(base):
    """From one click, and everything at the default thresholds, with scores that say what masks are worth."""
    shapes = script("train_tiny_sam.py")
    found = shapes.measured(AutoModel.from_pretrained(base), seed=10**6, number=32).means
    assert found["iou_box"] >= 0.88
    assert found["iou_1_click"] >= 0.8
    assert found["recall_50"] >= 0.7
    assert found["average_recall"] >= 0.6
    assert found["error_1_click"] <= 0.08


def test_adapter_learns_coins(base, coins, tmp_path, capsys):
    """Held-out coins gain, the base keeps its bits, every tensor of the adapter moves, and the files are there."""
    options = ["--val", str(coins / "test"), "--steps", "60", "--preset", "encoder"]
    assert run(base, coins / "train", tmp_path, *options) == 0
    assert re.search(r"60/60 \[.*<.*, loss=0\.\d+, IoU=0\.\d+\]", capsys.readouterr().err), "steps, time left, IoU"
    results = json.loads((tmp_path / "results.json").read_text())
    for kind, gain in {"box": 0.01, "1_click": 0.01, "3_clicks": 0}.items():  # three clicks are good before, too
        assert results["after"]["means"][f"iou_{kind}"] > results["before"]["means"][f"iou_{kind}"] + gain, kind
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 4 * 2 * 2, "four layers, q and v, A and B"
    assert all(tensor.abs().max() > 0 for tensor in adapter.values())

    assert {path.name for path in (tmp_path / "overlays").iterdir()} == {"index.html", "gains.png", "pictures"}

    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "adapter")
    checkpoint = load_file(base / "model.safetensors")
    for name, tensor in model.get_base_model().state_dict().items():
        plain = name.replace(".base_layer", "")
        if "lora" not in plain:
            assert torch.equal(tensor, checkpoint[plain]), name


ATTENTION = {"q_proj", "k_proj", "v_proj", "out_proj", "lin1", "lin2"}
HEADS = {"proj_in", "0", "proj_out"}


@pytest.mark.parametrize(
    ("preset", "trained"),
    [
        ("encoder-qkv", {"q", "k", "v"}),
        ("late", {"q", "v"}),
        ("decoder", ATTENTION | HEADS),
        ("encoder+decoder", {"q", "v"} | ATTENTION | HEADS),
        ("dora", {"q", "v"}),
    ],
)
def test_presets(base, coins, tmp_path, preset, trained):
    """What each trains gets a gradient; what frozen layers compute is found again by the next run."""
    options = ["--preset", preset, "--steps", "4", "--late-layers", "1"]
    assert run(base, coins / "test", tmp_path / "out", *options) == 0
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    layers = {name.partition(".lora_")[0] for name in adapter}
    assert {name.split(".")[-1] for name in layers} == trained
    # A click trains heads 1 to 3 and a box head 0: the four steps have both.
    moved = {name for name, tensor in adapter.items() if tensor.abs().max() > 0}
    assert moved == set(adapter)
    assert any("lora_magnitude_vector" in name for name in adapter) == (preset == "dora")
    assert ("decoder" in preset) == any("iou_prediction_head" in name for name in layers)
    cache = tmp_path / "out" / "cache"
    assert cache.exists() == (preset in ("late", "decoder"))
    if cache.exists():
        files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
        assert len(files) == 10, "one for each image"
        again = tmp_path / "again"
        assert run(base, coins / "test", again, *options, "--cache", str(cache)) == 0
        assert files == {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    if preset == "late":
        assert {re.search(r"layers\.(\d+)", name)[1] for name in adapter} == {"3"}, "by its number in the whole model"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "objects"),
    [
        pytest.param((3000, 4000), 2, id="12 MP", marks=pytest.mark.night),
        pytest.param((20, 20), 2, id="20 px"),
        pytest.param((400, 600), 300, id="300 objects"),
    ],
)
def test_sizes(base, tmp_path, size, objects):
    """Large images, small ones and many objects, to the end of the run, everything-mode included."""
    folder = image_folder(tmp_path / "data", 2, size)
    if objects == 300:
        cells = 1 + np.arange(15)[:, None] * 20 + np.arange(20)  # 15 x 20 squares, a pixel between them
        instances = np.kron(cells, np.pad(np.ones((25, 29), int), ((0, 1), (0, 1))))
        for i in range(2):
            Image.fromarray(np.pad(instances, ((0, 10), (0, 0))).astype(np.uint16)).save(folder / "masks" / f"{i}.png")
    assert [len(example["masks"]) for example in find_examples(folder)] == [objects] * 2
    assert run(base, folder, tmp_path / "out", "--epochs", "1", "--holdout", "0.5", quick=False) == 0
    (image,) = json.loads((tmp_path / "out" / "results.json").read_text())["after"]["images"]
    assert image["objects"] == objects
    assert 0 <= image["average_recall"] <= 1


def test_skip_bad(base, tmp_path, capsys):
    """An image that cannot be read is left out, and no other takes its place."""
    folder = image_folder(tmp_path / "data")
    path = folder / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:200])
    assert find_examples(folder).usable(skip_bad=True).names == ["0.png", "1.png", "3.png"]
    assert "skipped 2.png: " in capsys.readouterr().err
    held_out = image_folder(tmp_path / "held-out", 2)
    (held_out / "images" / "0.png").write_bytes(b"")
    assert run(base, folder, tmp_path / "out", "--val", str(held_out), "--epochs", "1", "--skip-bad") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [image["name"] for image in results["after"]["images"]] == ["1.png"], "one held-out image, once"


def test_launchers_are_the_pages():
    text = " ".join((ROOT / "docs/finetune.md").read_text(encoding="utf-8").split())
    assert all(f"`{launcher}" in text for launcher in LAUNCHERS)


@pytest.mark.parametrize(("name", "longest"), [("own_loop.py", 60), ("trainer.py", 40)])
def test_loops_by_hand(base, coins, tmp_path, name, longest):
    """Both short scripts learn, and their adapters load."""
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= longest
    torch.manual_seed(0)
    script(name).main(base, coins / "test", tmp_path, epochs=1)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path)
    moved = [tensor.abs().max() > 0 for key, tensor in model.state_dict().items() if ".attn.q.lora_B" in key]
    assert len(moved) == 4
    assert all(moved)


def test_options_together(base, coins, tmp_path):
    """Low precision, checkpointing and clicks run, and what gains nothing stops early: a rate of 0."""
    options = ["--lr", "0", "--epochs", "3", "--patience", "1", "--bf16", "--checkpointing", "--corrections", "1"]
    assert run(base, coins / "test", tmp_path, *options) == 0
    saved = sorted((tmp_path / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((saved[-1] / "trainer_state.json").read_text())
    assert state["epoch"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [LAUNCHERS[0], pytest.param(LAUNCHERS[1], marks=pytest.mark.night)])
def test_two_processes(base, coins, tmp_path, launcher):
    """Eight images are one epoch of two steps: two processes with two images each. One alone would see half.

    They take the steps of one process that accumulates two batches, with the same prompts: boxes and clicks.
    """
    program, _, options = launcher.partition(" --")
    port = "--main_process_port 0" if "accelerate" in launcher else "--standalone"  # any port that is free
    options = f"{program} {port} --{options}".split()
    command = [*options, base, coins / "test", tmp_path / "two", *QUICK, "--epochs", "1"]
    binaries = str(Path(sys.executable).parent)
    path = {"PATH": os.pathsep.join([binaries, os.environ["PATH"]]), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [shutil.which(command[0], path=binaries), *map(str, command[1:])],
        env={**os.environ, **path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "results.json").read_text())["processes"] == 2
    state = json.loads((tmp_path / "two" / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["epoch"] == 1
    assert run(base, coins / "test", tmp_path / "one", "--epochs", "1", "--accumulate", "2") == 0
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(tensor.abs().max() > 0 for tensor in one.values())
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
