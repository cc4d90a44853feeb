"""A checkpoint that does not fill the model raises and says what to do; no weight is ever random in silence."""

import json
import shutil

import pytest
import torch
import transformers
from models import pixels, points, split_model, stock_model
from parity import stock_forward
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskGeneration, PreTrainedModel

from sam_split import SamSplitModel, SamSplitVisionModel


@pytest.fixture(scope="module")
def theirs():
    return stock_model()


@pytest.fixture(scope="module")
def ours(theirs):
    return split_model(theirs)


@pytest.fixture
def folder(ours, tmp_path):
    ours.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    save_file(edit(weights), folder / "model.safetensors", metadata={"format": "pt"})


def same_outputs(left, right) -> bool:
    with torch.no_grad():
        left, right = (stock_forward(model.eval(), pixels(), **points(1, 0)) for model in (left, right))
    return all(torch.equal(left[name], right[name]) for name in right)


LOADERS = {
    "class": SamSplitModel.from_pretrained,
    "auto_model": AutoModel.from_pretrained,
    "auto_mask_generation": AutoModelForMaskGeneration.from_pretrained,
}


@pytest.fixture(params=LOADERS)
def load(request):
    return LOADERS[request.param]


def test_whole_folder(load, folder, ours):
    assert same_outputs(load(folder), ours)


def test_fused(load, folder, theirs):
    """Stock's weights under our config: what a user gets who only edits the config."""
    weights = theirs.state_dict()
    del weights["prompt_encoder.shared_embedding.positional_embedding"]
    edit_weights(folder, lambda _: weights)
    with pytest.raises(ValueError, match=r"'vision_encoder\.layers\.0\.attn\.qkv\.bias'.*sam-split convert"):
        load(folder)


def test_stock_folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"'vision_encoder\.layers\.0\.attn\.qkv\.bias'.*sam-split convert"):
        SamSplitModel.from_pretrained(tmp_path / "stock")


@pytest.mark.parametrize(
    "key",
    [
        "vision_encoder.layers.1.attn.k.weight",
        "vision_encoder.layers.0.attn.rel_pos_w",
        "shared_image_embedding.positional_embedding",
        "mask_decoder.iou_prediction_head.proj_out.bias",
    ],
)
def test_missing_tensor(load, folder, key):
    edit_weights(folder, lambda weights: {name: value for name, value in weights.items() if name != key})
    with pytest.raises(ValueError, match=rf"'{key}'.*sam-split convert"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("vision_encoder.layers.1.attn.k.weight", (64, 32)),
        ("vision_encoder.pos_embed", (1, 5, 5, 32)),
        ("vision_encoder.layers.1.attn.rel_pos_h", (7, 16)),
    ],
)
def test_misshapen_tensor(load, folder, ours, key, shape):
    edit_weights(folder, lambda weights: {**weights, key: torch.zeros(shape)})
    with pytest.raises(ValueError, match=rf"'{key}'.*sam-split convert") as error:
        load(folder)
    assert str(tuple(ours.state_dict()[key].shape)) in str(error.value)


def test_deeper_config_than_weights(load, folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"'vision_encoder\.layers\.2\..*sam-split convert"):
        load(folder)


def test_shallower_config_than_weights(load, folder):
    """A layer that is left out is a wrong model as much as a random one."""
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"'vision_encoder\.layers\.1\..*sam-split convert"):
        load(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_file_cut_short(load, folder, share):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"convert"):
        load(folder)


def test_no_weights(load, folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(folder)


def test_a_shard_is_missing(load, ours, tmp_path):
    ours.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    assert same_outputs(load(tmp_path / "shards"), ours)
    shutil.copytree(tmp_path / "shards", tmp_path / "broken")
    (tmp_path / "broken" / shards[0].name).unlink()
    with pytest.raises((ValueError, OSError), match=shards[0].name):
        load(tmp_path / "broken")


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(load, folder, ours, device_map):
    model = load(folder, device_map=device_map)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert same_outputs(model, ours)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map_hides_no_fault(load, folder, device_map):
    edit_weights(
        folder, lambda weights: {k: v for k, v in weights.items() if not k.endswith("layers.0.attn.q.weight")}
    )
    with pytest.raises(ValueError, match=r"'vision_encoder\.layers\.0\.attn\.q\.weight'"):
        load(folder, device_map=device_map)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtype(load, folder, ours, dtype):
    model = load(folder, dtype=dtype)
    for name, value in model.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, ours.state_dict()[name].to(dtype)), name


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_attn_implementation(load, folder, attn_implementation):
    model = load(folder, attn_implementation=attn_implementation)
    assert model.config._attn_implementation == attn_implementation
    assert model.vision_encoder.layers[0].attn.config._attn_implementation == attn_implementation


def test_unknown_attn_implementation(load, folder):
    with pytest.raises((ValueError, ImportError), match="Flash Attention 2"):
        load(folder, attn_implementation="flash_attention_2")


def test_sdpa_computes_attention_weights_when_asked(load, folder):
    """The weights and the outputs of the eager formula; stock returns nothing in silence."""
    with torch.no_grad():
        ours, eager = (load(folder, attn_implementation=name).eval() for name in ("sdpa", "eager"))
        asked, plain, expected = (
            model(pixels(), output_attentions=ask) for model, ask in ((ours, True), (ours, False), (eager, True))
        )
    assert plain.vision_attentions is None
    assert [weights.shape for weights in asked.vision_attentions] == [(2 * 4 * 2, 16, 16), (2 * 2, 36, 36)]
    for weights, reference in zip(asked.vision_attentions, expected.vision_attentions, strict=True):
        assert torch.equal(weights, reference)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert torch.equal(asked.pred_masks, expected.pred_masks)
    torch.testing.assert_close(asked.pred_masks, plain.pred_masks, rtol=0, atol=1e-5 * plain.pred_masks.abs().max())


def test_loading_info(load, folder):
    model, info = load(folder, output_loading_info=True)
    assert isinstance(model, SamSplitModel)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not info["unexpected_keys"]


def draw_what_is_marked_as_loaded(model, module, *_):
    """transformers 5.0.0's loop on a file that draws with `.data.normal_()`, which no mark holds back."""
    for tensor in module.parameters(recurse=False):
        tensor.data.normal_()


def lose_the_marks(model, module, *_):
    """A loader whose tensors lose their mark on the way, by a move to a device for one."""
    for tensor in module.parameters(recurse=False):
        tensor._is_hf_initialized = False
        model._init_weights(module)


@pytest.mark.parametrize("loop", [draw_what_is_marked_as_loaded, lose_the_marks])
def test_loaded_weights_drawn_anew(load, folder, ours, loop, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "_initialize_weights", loop)
    if transformers.__version__.startswith("4."):  # draws before it loads
        assert same_outputs(load(folder), ours)
        return
    with pytest.raises(RuntimeError, match=r"replaced 1\d\d tensors of '.*model' by random ones"):
        load(folder)


def test_mismatched_tensor_is_drawn_on_request(folder):
    """The one case in which loading may draw weights."""
    edit_weights(folder, lambda weights: {**weights, "mask_decoder.iou_token.weight": torch.zeros(1, 3)})
    model = SamSplitModel.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.mask_decoder.iou_token.weight.std() > 0


def test_vision_model_takes_its_part(folder, ours):
    vision = SamSplitVisionModel.from_pretrained(folder)
    for name, value in vision.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    edit_weights(
        folder, lambda weights: {k: v for k, v in weights.items() if not k.endswith("layers.0.attn.q.weight")}
    )
    with pytest.raises(ValueError, match=r"'vision_encoder\.layers\.0\.attn\.q\.weight'"):
        SamSplitVisionModel.from_pretrained(folder)
