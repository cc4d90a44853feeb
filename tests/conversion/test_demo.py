"""`sam-split demo`: its figures are measured, its plot shows both models' masks, and bad input leaves nothing."""

import contextlib
import io
import re
import sys

import numpy as np
import pytest
import torch
from models import stock_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, SamModel

from conversion import checkpoints
from conversion.cli import demo_checks, main
from conversion.cli.demo import TINY_SAM
from conversion.cli.demo_figure import COFFEE, COINS
from sam_split import SamSplitModel


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "tiny-sam"
    stock_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def good(stock_folder, tmp_path_factory):
    """The folder of a successful run, and what it printed."""
    out, printed = tmp_path_factory.mktemp("good") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["demo", "--source", str(stock_folder), "--out", str(out)]) == 0
    return out, printed.getvalue()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def rows(text: str) -> dict[str, list[str]]:
    """The rows of the tables: first column -> other columns."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 1}


def damage(monkeypatch, change):
    """Apply `change` to the state dict of every converted folder."""

    def convert(source, out, **kwargs):
        checkpoints_convert(source, out, **kwargs)
        state = load_file(out / "model.safetensors")
        change(state)
        save_file(state, out / "model.safetensors", metadata={"format": "pt"})

    checkpoints_convert = checkpoints.convert
    monkeypatch.setattr(checkpoints, "convert", convert)


def test_numbers_are_the_measured_ones(good, stock_folder):
    out, printed = good
    assert "FAIL" not in printed
    assert "tiny SAM" not in printed
    assert sorted(path.name for path in out.iterdir()) == ["demo.png", "split"]

    ours, theirs = SamSplitModel.from_pretrained(out / "split"), SamModel.from_pretrained(stock_folder)
    processor = AutoProcessor.from_pretrained(out / "split")
    pixels = processor(COFFEE.image(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = theirs.get_image_embeddings(pixels)
        difference = (ours.get_image_embeddings(pixels) - expected).abs().max().item()
    largest, gap, _, verdict = rows(printed)["image embedding"]
    assert float(largest) == pytest.approx(expected.abs().max().item(), rel=1e-3)
    assert float(gap) == pytest.approx(difference, rel=0.1, abs=1e-12)
    assert verdict == "ok"

    total = sum(parameter.numel() for parameter in ours.parameters())
    # 2 layers x (q, v) x (A, B) x rank 16 x width 32; DoRA adds 32 magnitudes to each layer it adapts.
    trainable = {"no adapter": 0, "LoRA q, v": 4096, "LoRA q, k, v": 6144, "DoRA q, v": 4224, "DoRA q, k, v": 6336}
    for adapter, count in trainable.items():
        assert rows(printed)[adapter] == [f"{count:,}", "-", f"{total + count:,}", "-", "-"]
    assert rows(printed)["LoRA on q and v"] == ["4 of 4 matrices B moved", "ok"]
    assert rows(printed)["base weights"] == ["0 changed", "ok"]
    before, after = map(float, re.findall(r"\d+\.\d+", rows(printed)["loss"][0]))
    assert 0 < after < before


def test_plot(good):
    image = Image.open(good[0] / "demo.png").convert("RGB")
    width, height = image.size
    assert width > 1200
    assert height > 500
    assert 1 < width / height < 2
    quarters = [image.crop((i * width // 4, 0, (i + 1) * width // 4, height // 2)) for i in range(4)]
    for panel in quarters[:3]:  # the image, stock's mask, ours
        colours = np.unique(np.asarray(panel.resize((64, 64))).reshape(-1, 3), axis=0)
        assert len(colours) > 500  # not a blank page


def test_a_wrong_weight_is_seen(stock_folder, out, capsys, monkeypatch):
    def swap(state):
        for name in [name for name in state if ".attn.q." in name]:
            other = name.replace(".attn.q.", ".attn.k.")
            state[name], state[other] = state[other], state[name]

    damage(monkeypatch, swap)
    assert main(["demo", "--source", str(stock_folder), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert rows(captured.out)["image embedding"][-1] == "FAIL"
    assert "not as expected: image embedding, masks, point" in captured.err
    assert (out / "demo.png").exists()


def test_nan_is_seen(stock_folder, out, capsys, monkeypatch):
    damage(monkeypatch, lambda state: state["mask_decoder.iou_prediction_head.proj_out.bias"].fill_(float("nan")))
    assert main(["demo", "--source", str(stock_folder), "--out", str(out)]) == 1
    printed = rows(capsys.readouterr().out)
    assert [printed[f"IoU scores, {prompt}"][-1] for prompt in ("point", "box")] == ["FAIL", "FAIL"]
    assert printed["image embedding"][-1] == "ok"


def test_published_figures_are_compared(good, capsys, monkeypatch):
    model = SamSplitModel.from_pretrained(good[0] / "split")
    total = sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(demo_checks, "BASE_PARAMETERS", total)
    right = ("right", {"target_modules": ["q", "v"]}, 4096, total + 4096)
    wrong = ("wrong", {"target_modules": ["q", "v"]}, 4097, total + 4096)
    half = ("half", {"target_modules": ["q", "v"]}, 4096, None)
    monkeypatch.setattr(demo_checks, "PUBLISHED", (right, wrong, half))
    assert demo_checks.count_adapters(model) == ["wrong"]
    printed = rows(capsys.readouterr().out)
    assert [printed[name][-1] for name in ("no adapter", "right", "wrong", "half")] == ["ok", "ok", "FAIL", "ok"]
    assert printed["wrong"] == ["4,096", "4,097", f"{total + 4096:,}", f"{total + 4096:,}", "FAIL"]


def test_a_changed_base_weight_is_seen(good, capsys):
    folder = good[0] / "split"
    model = SamSplitModel.from_pretrained(folder)
    with torch.no_grad():
        model.vision_encoder.layers[0].attn.q.weight[0, 0] += 1e-3
    processor = AutoProcessor.from_pretrained(folder)
    failed = demo_checks.train_one_step(model, processor, COFFEE.image(), COFFEE.box, folder)
    assert failed == ["base weights"]
    assert rows(capsys.readouterr().out)["base weights"] == ["1 changed", "FAIL"]


def test_ellipse():
    labels = demo_checks.ellipse(torch.tensor([2.0, 1.0, 8.0, 5.0]), (6, 10))
    assert labels.shape == (1, 1, 6, 10)
    assert labels[0, 0].tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_tiny_sam_segments_the_coin(out, capsys):
    """Both prompts give the coin, a disc that fills the box. The counts are ViT-B's, as published."""
    assert main(["demo", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert rows(printed)["LoRA q, v"] == ["589,824", "589,824", "94,325,296", "94,325,296", "ok"]

    image, processor = COINS.image(), AutoProcessor.from_pretrained(out / "split")
    models = SamSplitModel.from_pretrained(out / "split").eval(), SamModel.from_pretrained(TINY_SAM).eval()
    _, views = demo_checks.compare(*models, processor, image, COINS)
    coin = demo_checks.ellipse(torch.tensor(COINS.box), image.shape[:2])[0, 0] > 0
    for view in views:
        for mask in (view.ours > 0, view.theirs > 0):
            assert (mask & coin).sum() / (mask | coin).sum() > 0.85, view.prompt


def test_everything_in_the_photograph(out, capsys):
    """At the default thresholds, by the model before its training step; each mask is drawn, beside the photograph."""
    assert main(["demo", "--out", str(out)]) == 0
    (number,) = re.findall(r"everything-mode, at its default thresholds, finds (\d+) masks", capsys.readouterr().out)
    model, photograph = SamSplitModel.from_pretrained(out / "split").eval(), COINS.photograph()
    found = model.generate_masks(photograph, output_label_map=True, **COINS.everything)
    assert int(number) == len(found["masks"]) > 10
    assert not {name for name in COINS.everything if "thresh" in name}

    picture = np.asarray(Image.open(out / "demo.png").convert("RGB")).astype(int)
    row = picture[-picture.shape[1] // 3 :]  # of the two panels
    coloured = row.max(-1) - row.min(-1) > 40  # the photograph is grey
    left, right = coloured[:, : row.shape[1] // 2], coloured[:, row.shape[1] // 2 :]
    assert not left.any()
    share = (found["label_map"] > 0).float().mean()  # of the photograph, which fills most of the panel
    assert 0.6 * share < right.mean() < 1.2 * share


@pytest.mark.parametrize("case", ["exists", "missing", "file", "no parent", "not SAM"])
def test_bad_input_leaves_nothing(case, stock_folder, tmp_path, capsys):
    source, out = str(stock_folder), tmp_path / "out"
    if case == "exists":
        out.mkdir()
        (out / "mine").write_text("precious")
        message = "exists already"
    elif case == "missing":
        source, message = str(tmp_path / "nowhere"), "nowhere"
    elif case == "file":
        source, message = str(stock_folder / "model.safetensors"), "sam-split verify"
    elif case == "no parent":
        out, message = tmp_path / "no" / "out", "is not a folder"
    else:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
        source, message = str(tmp_path / "other"), "other"
    before = sorted(tmp_path.rglob("*"))
    assert main(["demo", "--source", source, "--out", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sam-split: error: ")
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before
    if case == "exists":
        assert (out / "mine").read_text() == "precious"


def test_without_the_extra(out, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "--out", str(out)]) == 2
    assert 'pip install "sam-split[demo]"' in capsys.readouterr().err
    assert not out.exists()


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--help"])
    printed = capsys.readouterr().out
    for words in ("tiny SAM", "--source facebook/sam-vit-base", "sam-split-demo", "memory"):
        assert words in printed
