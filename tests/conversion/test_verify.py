"""`sam-split verify`: the same model in any two formats passes, and one changed bit or field is named."""

import json
import shutil

import pytest
import torch
from models import stock_model
from safetensors.torch import load_file, save_file

from conversion import CheckFailed, ConversionError, convert, fuse, verification, verify
from conversion.checkpoints import describe
from conversion.cli import main
from conversion.sources import open_checkpoint
from conversion.tensors import InMemory

V = "vision_encoder.layers.1.attn.v.weight"


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    stock_model().save_pretrained(folder / "stock")
    convert(folder / "stock", folder / "split", progress=False)
    fuse(folder / "split", folder / "fused", progress=False)
    fuse(folder / "split", folder / "meta.pth", format="meta", progress=False)
    convert(folder / "meta.pth", folder / "split from meta", progress=False)
    return folder


PAIRS = [
    ("stock", "split"),
    ("split", "stock"),
    ("split", "fused"),
    ("fused", "stock"),
    ("meta.pth", "split"),
    ("stock", "meta.pth"),
    ("meta.pth", "split from meta"),
    ("split", "split from meta"),
]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_two_formats_of_one_model_pass(a, b, formats, capsys):
    assert main(["verify", str(formats / a), str(formats / b)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok  ") for line in lines)
    assert "182 tensors" in lines[1]
    assert "every bit equal" in lines[1]
    assert [line.split()[1] for line in lines[2:]] == ["image", "masks", "scores"]


def test_epsilon_of_the_decoder_is_pointed_out(formats, capsys):
    assert main(["verify", str(formats / "stock"), str(formats / "meta.pth")]) == 0
    assert "mask_decoder_config.layer_norm_eps is 1e-06, and 1e-05 in Meta's code" in capsys.readouterr().out


@pytest.fixture
def edited(formats, tmp_path):
    shutil.copytree(formats / "split", tmp_path / "edited")
    return tmp_path / "edited"


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def flip_lowest_bit(state):
    state[V].view(torch.int32)[3, 2] ^= 1


def negate_zero(state):
    state["mask_decoder.iou_token.weight"][0, 0] = -0.0


@pytest.mark.parametrize(("change", "name"), [(flip_lowest_bit, V), (negate_zero, "mask_decoder.iou_token.weight")])
def test_one_bit_fails_and_is_named(change, name, formats, edited, capsys):
    rewrite(edited, change)
    assert main(["verify", str(formats / "stock"), str(edited)]) == 1
    captured = capsys.readouterr()
    assert f"FAIL  {name}" in captured.out
    assert captured.err.startswith(f"sam-split: error: not the same model: {name}: 1 of ")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("same", [True, False])
def test_json_is_all_that_stdout_holds(same, formats, edited, capsys):
    if not same:
        rewrite(edited, flip_lowest_bit)
    assert main(["verify", str(formats / "split"), str(edited), "--tensors-only", "--json"]) == (0 if same else 1)
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"same", "rows"}
    assert report["same"] is same
    first, *_, last = report["rows"]
    assert first == {"compared": "configs", "result": "equal", "passed": True}
    assert last["compared"] == ("182 tensors" if same else V)
    assert last["passed"] is same


def test_json_of_no_checkpoint_is_empty(formats, tmp_path, capsys):
    assert main(["verify", str(formats / "split"), str(tmp_path / "nothing.pth"), "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_another_dtype_fails(formats, edited):
    rewrite(edited, lambda state: state.update({V: state[V].bfloat16()}))
    with pytest.raises(CheckFailed, match=rf"{V}: torch.float32 \(32, 32\) and torch.bfloat16 \(32, 32\)"):
        verify(formats / "split", edited)


@pytest.mark.parametrize(
    ("part", "field", "value", "named"),
    [
        ("vision_config", "layer_norm_eps", 1e-5, "vision_config.layer_norm_eps"),
        ("vision_config", "hidden_act", "relu", "vision_config.hidden_act"),
        ("mask_decoder_config", "num_attention_heads", 4, "mask_decoder_config.num_attention_heads"),
    ],
)
def test_a_config_that_computes_something_else_fails(part, field, value, named, formats, edited):
    config = json.loads((edited / "config.json").read_text())
    config[part][field] = value
    (edited / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckFailed, match=f"config: {named}"):
        verify(formats / "split", edited)


def test_outputs_are_run_and_compared(formats, monkeypatch):
    monkeypatch.setattr("conversion.verification.LIMIT", 0.0)
    with pytest.raises(CheckFailed, match="image embedding: differ by"):  # stock sums in another order than ours
        verify(formats / "stock", formats / "split")
    assert verify(formats / "stock", formats / "split", outputs=False)


def test_a_source_that_is_no_checkpoint_exits_with_2(formats, tmp_path, capsys):
    assert main(["verify", str(formats / "split"), str(tmp_path / "nothing.pth")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_tensor_that_one_side_lacks_is_named(formats):
    tensors = describe(open_checkpoint(formats / "split"))[1]
    without = InMemory({name: tensors[name] for name in tensors if name != V})
    for ours, theirs, shown in ((without, tensors, "absent and torch.float32"), (tensors, without, "and absent")):
        with pytest.raises(CheckFailed, match=f"{V}: .*{shown}"):
            verification._compare_tensors([], ours, theirs)


@pytest.mark.parametrize("build", [verification.split_model, verification.stock_model])
def test_no_model_is_run_with_a_weight_left_out_or_too_many(build, formats):
    config, tensors = describe(open_checkpoint(formats / "split"))
    build(config, tensors)
    for state in ({**tensors, "extra": torch.zeros(1)}, {name: tensors[name] for name in tensors if name != V}):
        with pytest.raises((RuntimeError, ConversionError), match=r"extra|attn\.v"):
            build(config, InMemory(state))


@pytest.mark.parametrize(("gap", "passes"), [(0.9, True), (1.1, False), (float("nan"), False)])
def test_the_limit_is_relative_to_the_largest_output(gap, passes):
    theirs = torch.tensor([1.0, -50.0, 3.0])
    rows, ours = [], theirs + torch.tensor([0.0, 0.0, gap * 50 * verification.LIMIT])
    compare = verification._compare_outputs
    if passes:
        compare(rows, {"masks": ours.double()}, {"masks": theirs.double()}, verification.LIMIT)
        assert [row.passed for row in rows] == [True]
    else:
        with pytest.raises(CheckFailed, match="masks: differ by"):
            compare(rows, {"masks": ours.double()}, {"masks": theirs.double()}, verification.LIMIT)
