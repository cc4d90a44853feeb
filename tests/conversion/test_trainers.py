"""Checkpoints as trainers leave them: the model among other things is found and named, and two models are an error."""

import json

import pytest
import torch
from checkpoint_files import as_bin, as_is, assert_same, in_bin_shards, in_shards, stock_state
from models import meta_model, stock_model
from safetensors.torch import load_file, save_file

from conversion import convert, from_meta, split_state_dict
from conversion.cli import main


@pytest.fixture(scope="module")
def meta_state():
    return meta_model().state_dict()


@pytest.fixture(scope="module")
def theirs():
    return stock_model()


def under(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


PIXELS = {
    "pixel_mean": torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1),
    "pixel_std": torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1),
}
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
METRIC = {"criterion.weight": torch.zeros(2), "metric.total": torch.zeros(1, dtype=torch.int64)}

# name: (what the file holds, what is said)
FORMS = {
    "lightning": (
        lambda s: {"state_dict": {**under("model.", s), **METRIC}, "epoch": 3, "optimizer_states": [OPTIMIZER]},
        ["took 'state_dict', left out 'epoch', 'optimizer_states'",
         "took the keys under 'model.', left out 'criterion.weight', 'metric.total'"],
    ),
    "torch_em": (
        lambda s: {"model_state": under("sam.", s), "optimizer_state": OPTIMIZER, "init": {"name": "x"}},
        ["took 'model_state', left out 'init', 'optimizer_state'", "took the keys under 'sam.'"],
    ),
    "medsam": (lambda s: {"model": s, "optimizer": OPTIMIZER}, ["took 'model', left out 'optimizer'"]),
    "sam": (lambda s: under("sam.", s), ["took the keys under 'sam.'"]),
    "model": (lambda s: under("model.", s), ["took the keys under 'model.'"]),
    "ddp": (lambda s: under("module.", s), ["took the keys under 'module.'"]),
    "compiled": (lambda s: under("model._orig_mod.", s), ["took the keys under 'model._orig_mod.'"]),
    "two_levels": (lambda s: {"checkpoint": {"net": s}}, ["took 'checkpoint.net'"]),
    "pixels": (lambda s: {**s, **PIXELS}, ["left out 'pixel_mean'", "left out 'pixel_std'"]),
    "pixels_and_prefix": (lambda s: under("sam.", {**s, **PIXELS}), ["under 'sam.'", "left out 'pixel_mean'"]),
    "shared_memory": (lambda s: {**s, **PIXELS, "pixel_std": PIXELS["pixel_mean"]}, ["left out 'pixel_mean'"]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_model_is_found_and_what_is_left_out_is_named(form, meta_state, tmp_path, capsys):
    wrap, said = FORMS[form]
    torch.save(wrap(meta_state), tmp_path / "sam.pth")
    assert main(["convert", str(tmp_path / "sam.pth"), str(tmp_path / "out"), "--quiet"]) == 0
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), from_meta(meta_state))
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("sam-split: ") for line in lines)
    assert form == "shared_memory" or not [line for line in lines if "not SAM's" in line]
    for message in said:
        assert [line for line in lines if message in line], (message, lines)


def test_a_plain_checkpoint_is_not_talked_about(meta_state, tmp_path, capsys):
    torch.save(meta_state, tmp_path / "sam.pth")
    assert main(["convert", str(tmp_path / "sam.pth"), str(tmp_path / "out"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("prefix", ["model.", "sam.", "module."])
@pytest.mark.parametrize("write", [as_is, as_bin, in_shards, in_bin_shards])
def test_a_prefix_in_a_transformers_folder_is_taken_off(write, prefix, theirs, tmp_path):
    source = tmp_path / "source"
    theirs.config.save_pretrained(source)
    write(source, {**under(prefix, stock_state(theirs)), "criterion.weight": torch.zeros(2)})
    with pytest.warns(match=f"took the keys under '{prefix}', left out 'criterion.weight'"):
        convert(source, tmp_path / "out", progress=False)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), split_state_dict(stock_state(theirs)))


def test_a_nested_bin_in_a_transformers_folder_is_unwrapped(theirs, tmp_path):
    theirs.config.save_pretrained(tmp_path / "source")
    nested = {"state_dict": under("model.", stock_state(theirs))}
    torch.save(nested, tmp_path / "source" / "pytorch_model.bin")
    convert(tmp_path / "source", tmp_path / "out", progress=False)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), split_state_dict(stock_state(theirs)))


def test_a_prefix_in_a_safetensors_file_is_taken_off(meta_state, tmp_path):
    save_file(under("sam.", {**meta_state, **PIXELS}), tmp_path / "sam.safetensors")
    convert(tmp_path / "sam.safetensors", tmp_path / "out", progress=False)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), from_meta(meta_state))


def test_other_pixel_statistics_are_not_lost_in_silence(meta_state, tmp_path):
    torch.save({**meta_state, **PIXELS, "pixel_mean": torch.full((3, 1, 1), 127.5)}, tmp_path / "sam.pth")
    with pytest.warns(match=r"\[127.5, 127.5, 127.5\], not SAM's: write it, divided by 255, as image_mean"):
        convert(tmp_path / "sam.pth", tmp_path / "out", progress=False)
    settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == [0.485, 0.456, 0.406]


TWO = {
    "nested": (lambda s: {"model": s, "ema": s}, "holds 2 state dicts, model, ema"),
    "nested_deeper": (lambda s: {"student": {"model": s}, "ema": s}, "holds 2 state dicts, student.model, ema"),
    "prefixes": (lambda s: {**under("a.", s), **under("b.", s)}, "holds 2 models, under 'a.', 'b.'"),
    "bare_and_prefix": (lambda s: {**s, **under("ema.", s)}, "holds 2 models, under '', 'ema.'"),
}


@pytest.mark.parametrize("form", TWO)
def test_two_models_are_an_error(form, meta_state, tmp_path, capsys):
    wrap, message = TWO[form]
    torch.save(wrap(meta_state), tmp_path / "sam.pth")
    assert main(["convert", str(tmp_path / "sam.pth"), str(tmp_path / "out"), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "save the one that is meant alone" in line
    assert [path.name for path in tmp_path.iterdir()] == ["sam.pth"]
