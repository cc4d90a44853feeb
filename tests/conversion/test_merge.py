"""`sam-split merge`: a base and its adapter become one model in any format, which computes what both did."""

import json

import pytest
import torch
from checkpoint_files import FILES
from models import meta_model, stock_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from trained_adapters import ADAPTERS, masks, meta_masks, ours, trained
from transformers import SamModel

from conversion import ConversionError, convert, fuse, merge, verify
from conversion.cli import main
from sam_split import SamSplitModel

pytestmark = pytest.mark.filterwarnings("ignore::conversion.errors.ConversionWarning")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """One model in three formats, that of Meta's code (its epsilon in the decoder)."""
    folder = tmp_path_factory.mktemp("bases")
    torch.save(meta_model().state_dict(), folder / "meta.pth")
    convert(folder / "meta.pth", folder / "split", progress=False)
    fuse(folder / "split", folder / "transformers", progress=False)
    return {"split": folder / "split", "transformers": folder / "transformers", "meta": folder / "meta.pth"}


@pytest.mark.parametrize("format", ["split", "transformers", "meta"])
@pytest.mark.parametrize("base", ["split", "transformers", "meta"])
def test_any_base_merges_into_any_format(base, format, bases, tmp_path):
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q", "v"], "modules_to_save": ["mask_decoder"]}
    expected = masks(trained(ours(bases["split"]), tmp_path / "adapter", **config))
    out = tmp_path / "out"
    argv = ["merge", str(bases[base]), str(tmp_path / "adapter"), str(out), "--format", format, "--quiet"]
    assert main(argv) == 0
    if format == "split":
        assert {path.name for path in out.iterdir()} == FILES
        assert "an adapter was merged into" in (out / "README.md").read_text()
        merged = masks(SamSplitModel.from_pretrained(out).eval())
    elif format == "transformers":
        merged = masks(SamModel.from_pretrained(out).eval())
    else:
        model = meta_model()
        model.load_state_dict(torch.load(out, weights_only=True))
        merged = meta_masks(model)
    assert (expected - masks(ours(bases["split"]))).abs().max() > 0.1
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["rslora", "dora", "both_patterns", "lora_bias", "prompt_encoder", "more_layers"])
def test_every_kind_of_adapter_merges(name, bases, tmp_path):
    config = {"r": 2, "lora_alpha": 4, **ADAPTERS[name]}
    expected = masks(trained(ours(bases["split"]), tmp_path / "adapter", **config))
    merge(bases["split"], tmp_path / "adapter", tmp_path / "out", progress=False)
    torch.testing.assert_close(masks(ours(tmp_path / "out")), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_an_adapter_of_stocks_qkv_merges_too(config, bases, tmp_path):
    adapted = trained(
        SamModel.from_pretrained(bases["transformers"]), tmp_path / "adapter", target_modules=["qkv"], **config
    )
    merge(bases["split"], tmp_path / "adapter", tmp_path / "out", progress=False)
    assert (masks(adapted) - masks(ours(bases["split"]))).abs().max() > 0.1
    torch.testing.assert_close(masks(ours(tmp_path / "out")), masks(adapted), atol=1e-4, rtol=1e-4)


def test_trained_biases_are_merged_or_missed(bases, tmp_path, capsys):
    """peft 0.18 does not save the biases that it trained; such an adapter cannot give back the model it was."""
    model = ours(bases["split"])
    adapted = trained(model, tmp_path / "adapter", r=2, target_modules=["q", "v"], bias="lora_only")
    argv = ["merge", str(bases["split"]), str(tmp_path / "adapter")]
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    without = {key: tensor for key, tensor in load_file(path).items() if not key.endswith("bias")}
    if len(without) < len(load_file(path)):
        assert main([*argv, str(tmp_path / "out"), "--quiet"]) == 0
        torch.testing.assert_close(masks(ours(tmp_path / "out")), masks(adapted), atol=1e-4, rtol=1e-4)
    save_file(without, path)
    assert main([*argv, str(tmp_path / "refused"), "--quiet"]) == 2
    assert "was trained with bias='lora_only' and holds no bias" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_formats_of_one_merge_are_one_model(bases, tmp_path):
    trained(ours(bases["split"]), tmp_path / "adapter", r=2, target_modules=["q", "k"])
    for format in bases:
        merge(bases["split"], tmp_path / "adapter", tmp_path / format, format=format, progress=False)
    assert verify(tmp_path / "split", tmp_path / "meta", outputs=False)
    assert verify(tmp_path / "split", tmp_path / "transformers", outputs=False)


def test_the_dtype_stays_and_what_is_not_adapted_keeps_its_bits(tmp_path):
    stock_model().bfloat16().save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "split", progress=False)
    trained(ours(tmp_path / "split"), tmp_path / "adapter", r=2, target_modules=["q"])
    merge(tmp_path / "split", tmp_path / "adapter", tmp_path / "out", progress=False)
    before, after = (load_file(tmp_path / path / "model.safetensors") for path in ("split", "out"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"vision_encoder.layers.{layer}.attn.q.weight" for layer in (0, 1)}


def test_an_adapter_that_does_not_fit_is_refused(bases, tmp_path, capsys):
    def refused(message):
        capsys.readouterr()
        assert main(["merge", str(bases["split"]), str(tmp_path / "adapter"), str(tmp_path / "out"), "--quiet"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("sam-split: error: ")
        assert message in error
        assert not (tmp_path / "out").exists()

    (tmp_path / "adapter").mkdir()
    refused("holds no adapter_config.json")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused("holds no adapter_model.safetensors; name a folder")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    refused("holds no readable adapter weights")
    model = get_peft_model(stock_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q"]}))
    refused("does not fit the base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    refused("does not fit the base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["nothing"]}))
    refused("does not fit the base")


def test_an_unknown_format_is_refused(bases, tmp_path):
    with pytest.raises(ConversionError, match="format must be one of split, transformers, meta, got 'onnx'"):
        merge(bases["split"], tmp_path, tmp_path / "out", format="onnx", progress=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state, key: state.pop(key), "attn.q.lora_A"),
        (lambda state, key: state.update({key.replace("attn.q", "attn.k"): state[key].clone()}), "attn.k.lora_A"),
        (lambda state, key: state.update({"base_model.model.nowhere.weight": torch.ones(1)}), "nowhere.weight"),
    ],
    ids=["missing", "of a layer that is not adapted", "of a layer that is not there"],
)
def test_a_tensor_on_one_side_only_is_named(change, named, bases, tmp_path):
    trained(ours(bases["split"]), tmp_path / "adapter", r=2, target_modules=["q", "v"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    change(state, "base_model.model.vision_encoder.layers.1.attn.q.lora_A.weight")
    save_file(state, path)
    with pytest.raises(ConversionError, match=f"does not fit the base: .*{named}.* is on one side only"):
        merge(bases["split"], tmp_path / "adapter", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_were_not_saved_are_missed_on_any_peft(bias, bases, tmp_path):
    """The biases of LoRA's own factors, which are there, do not count."""
    trained(ours(bases["split"]), tmp_path / "adapter", r=2, target_modules=["q", "v"], lora_bias=True)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bias": bias}))
    with pytest.raises(ConversionError, match=f"was trained with bias='{bias}' and holds no bias"):
        merge(bases["split"], tmp_path / "adapter", tmp_path / "out", progress=False)
