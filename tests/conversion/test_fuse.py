"""`sam-split fuse`: back to stock transformers and to Meta's .pth, bit for bit, or refused."""

import json
import zipfile

import pytest
import torch
from checkpoint_files import assert_same, stock_state
from models import meta_model, stock_model, tiny_config
from safetensors.torch import load_file
from segment_anything import sam_model_registry
from transformers import SamConfig, SamModel

from conversion import ConversionError, convert, fuse
from conversion.cli import main
from conversion.key_map import DROPPED

GEOMETRIES = {  # the depth, heads and global layers of the released sizes, with narrow layers
    "vit_b": {"num_hidden_layers": 12, "global_attn_indexes": [2, 5, 8, 11]},
    "vit_l": {
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_size": 64,
        "global_attn_indexes": [5, 11, 17, 23],
    },
    "vit_h": {
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "hidden_size": 80,
        "global_attn_indexes": [7, 15, 23, 31],
    },
    "pruned": {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 168, "mlp_dim": 696},
}


@pytest.fixture(scope="module")
def split_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    stock_model().save_pretrained(folder / "stock")
    convert(folder / "stock", folder / "split", progress=False)
    return folder / "split"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_triangle_keeps_every_bit(geometry, dtype, tmp_path):
    stock_model(tiny_config(**GEOMETRIES[geometry])).to(dtype).save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "split", progress=False)
    fuse(tmp_path / "split", tmp_path / "stock again", progress=False)
    with pytest.warns(match="Meta's code"):
        fuse(tmp_path / "split", tmp_path / "meta.pth", format="meta", progress=False)
    convert(tmp_path / "meta.pth", tmp_path / "split from meta", progress=False)
    fuse(tmp_path / "split from meta", tmp_path / "stock from meta", progress=False)
    original = load_file(tmp_path / "stock" / "model.safetensors")
    # In half precision, transformers 4 saves the positional matrix twice.
    original = {key: tensor for key, tensor in original.items() if key not in DROPPED}
    for path in ("stock again", "stock from meta"):
        assert_same(load_file(tmp_path / path / "model.safetensors"), original)
    split = load_file(tmp_path / "split" / "model.safetensors")
    assert_same(load_file(tmp_path / "split from meta" / "model.safetensors"), split)
    configs = [json.loads((tmp_path / path / "config.json").read_text()) for path in ("stock", "stock from meta")]
    for field in GEOMETRIES[geometry]:
        assert configs[1]["vision_config"][field] == configs[0]["vision_config"][field]


def test_stock_loads_a_fused_folder_without_a_missing_or_unexpected_key(split_folder, tmp_path):
    fuse(split_folder, tmp_path / "stock", progress=False)
    theirs, report = SamModel.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(report.values())
    assert_same(stock_state(theirs), stock_state(stock_model()))
    assert {path.name for path in (tmp_path / "stock").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert (config["model_type"], config["architectures"], "auto_map" in config) == ("sam", ["SamModel"], False)


@pytest.mark.slow
def test_metas_registry_loads_a_fused_vit_b(tmp_path):
    """Real geometry: stock's random ViT-B, through our folder, into segment_anything's own loader."""
    torch.manual_seed(0)
    theirs = SamModel(SamConfig())
    theirs.save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "split", progress=False)
    with pytest.warns(match="Meta's code"):
        fuse(tmp_path / "split", tmp_path / "vit_b.pth", format="meta", progress=False)
    meta = sam_model_registry["vit_b"](checkpoint=tmp_path / "vit_b.pth")
    key = "vision_encoder.layers.11.attn.qkv.weight"
    torch.testing.assert_close(meta.image_encoder.blocks[11].attn.qkv.weight, theirs.state_dict()[key], rtol=0, atol=0)


def test_a_pth_from_meta_comes_back_as_it_was(tmp_path):
    state = meta_model().state_dict()
    torch.save(state, tmp_path / "meta.pth")
    convert(tmp_path / "meta.pth", tmp_path / "split", progress=False)
    assert main(["fuse", str(tmp_path / "split"), str(tmp_path / "again.pth"), "--format", "meta", "--quiet"]) == 0
    assert_same(torch.load(tmp_path / "again.pth", weights_only=True), state)
    assert_same(torch.load(tmp_path / "again.pth", weights_only=True, mmap=True), state)
    with zipfile.ZipFile(tmp_path / "again.pth") as file:
        assert file.testzip() is None
    mapped = torch.load(tmp_path / "again.pth", weights_only=True, mmap=True)
    addresses = {tensor.data_ptr() % 64 for tensor in mapped.values()}
    assert addresses == {0}


def test_tensors_of_a_pth_are_views_of_nothing_larger(split_folder, tmp_path):
    fuse(split_folder, tmp_path / "meta.pth", format="meta", progress=False)
    for tensor in torch.load(tmp_path / "meta.pth", weights_only=True).values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        (
            "vision_config",
            "layer_norm_eps",
            1e-5,
            "vision_config.layer_norm_eps is 1e-05; Meta's code would take 1e-06",
        ),
        ("vision_config", "hidden_act", "relu", "vision_config.hidden_act is relu"),
        ("mask_decoder_config", "num_attention_heads", 4, "mask_decoder_config.num_attention_heads is 4"),
        ("vision_config", "global_attn_indexes", [0, 1], "has the shape"),
    ],
)
def test_what_a_pth_cannot_say_is_refused(part, field, value, message, split_folder, tmp_path, capsys):
    out = tmp_path / "split"
    out.mkdir()
    for file in split_folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / "config.json").read_text())
    config[part][field] = value
    (out / "config.json").write_text(json.dumps(config))
    assert main(["fuse", str(out), str(tmp_path / "meta.pth"), "--format", "meta", "--quiet"]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("format", ["split", "onnx"])
def test_only_the_fused_formats_are_fused_to(format, split_folder, tmp_path):
    with pytest.raises(ConversionError, match=f"format must be one of transformers, meta, got '{format}'"):
        fuse(split_folder, tmp_path / "out", format=format, progress=False)


def test_what_is_fused_already_is_not_fused(split_folder, tmp_path):
    with pytest.raises(ConversionError, match="is fused already, in the format 'transformers'"):
        fuse(split_folder.parent / "stock", tmp_path / "out", progress=False)


def test_a_stock_model_of_transformers_4_with_its_duplicate_key_comes_back_without_it(tmp_path):
    theirs = stock_model()
    theirs.save_pretrained(tmp_path / "stock", safe_serialization=True)
    torch.save(theirs.state_dict(), tmp_path / "stock" / "pytorch_model.bin")
    (tmp_path / "stock" / "model.safetensors").unlink()
    convert(tmp_path / "stock", tmp_path / "split", progress=False)
    fuse(tmp_path / "split", tmp_path / "again", progress=False)
    assert not DROPPED.keys() & load_file(tmp_path / "again" / "model.safetensors").keys()
