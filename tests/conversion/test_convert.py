"""`sam-split convert`: every kind of source becomes one complete folder, bit for bit; a bad source leaves nothing."""

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
from checkpoint_files import FILES, as_bin, as_is, assert_same, in_bin_shards, in_shards, stock_state, with_duplicate
from huggingface_hub import constants
from models import meta_model, stock_model
from safetensors.torch import load_file, save_file
from segment_anything import sam_model_registry
from transformers import AutoProcessor, SamConfig, SamModel, SamProcessor

from conversion import ConversionError, config_from_state_dict, convert, from_meta, split_state_dict
from conversion.cli import main
from conversion.config_from_shapes import check_shapes
from sam_split import SamSplitConfig, SamSplitModel


@pytest.fixture(scope="module")
def theirs():
    return stock_model()


@pytest.fixture(scope="module")
def stock_folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def meta_state():
    return meta_model().state_dict()


@pytest.mark.parametrize("write", [as_is, with_duplicate, as_bin, in_shards, in_bin_shards])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_transformers_folder_becomes_a_complete_split_folder(write, dtype, theirs, stock_folder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(stock_folder / "config.json", source)
    state = {key: tensor.to(dtype) for key, tensor in stock_state(theirs).items()}
    write(source, state)
    assert main(["convert", str(source), str(tmp_path / "out"), "--quiet"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), split_state_dict(state))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


WRAPPERS = {
    "bare": lambda state: state,
    "medsam": lambda state: {"model": state, "optimizer": {"lr": 1e-4}, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state},
    "data_parallel": lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
    "both": lambda state: {"model": {f"module.{key}": tensor for key, tensor in state.items()}},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_pth_of_meta_or_of_a_trainer_is_unwrapped(wrapper, is_zip, meta_state, tmp_path):
    torch.save(WRAPPERS[wrapper](meta_state), tmp_path / "sam.pth", _use_new_zipfile_serialization=is_zip)
    convert(tmp_path / "sam.pth", tmp_path / "out", progress=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), from_meta(meta_state))


def test_a_safetensors_file_with_metas_keys_is_read(meta_state, tmp_path):
    save_file(meta_state, tmp_path / "sam.safetensors")
    convert(tmp_path / "sam.safetensors", tmp_path / "out", progress=False)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), from_meta(meta_state))


def hub_snapshot(repo_id, folder, revision="main", commit="0123456789" * 4):
    """Put a folder into the Hub's cache as a download would: links to blobs."""
    root = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for path in (snapshot, root / "blobs", root / "refs"):
        path.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    for file in folder.iterdir():
        shutil.copy(file, root / "blobs" / f"{commit}-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/{commit}-{file.name}")


def test_a_hub_id_with_a_revision_is_converted_and_named_in_the_card(theirs, stock_folder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(stock_folder / "config.json", source)
    in_shards(source, stock_state(theirs))
    hub_snapshot("someone/sam-tiny", source, revision="v2")
    assert main(["convert", "someone/sam-tiny", str(tmp_path / "out"), "--revision", "v2", "--quiet"]) == 0
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), split_state_dict(stock_state(theirs)))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: someone/sam-tiny" in card
    assert "0123456789" * 4 in card


def test_the_folder_loads_with_stocks_outputs_and_processor(theirs, stock_folder, tmp_path):
    convert(stock_folder, tmp_path / "out", progress=False)
    ours, report = SamSplitModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": pixels, "input_points": torch.tensor([[[[40.0, 50.0]]]])}
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).pred_masks, theirs(**inputs).pred_masks, atol=1e-5, rtol=0)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "out"), SamProcessor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dtype_auto_is_the_checkpoints(dtype, theirs, meta_state, tmp_path):
    torch.save({key: tensor.to(dtype) for key, tensor in meta_state.items()}, tmp_path / "sam.pth")
    convert(tmp_path / "sam.pth", tmp_path / "out", progress=False)
    assert SamSplitModel.from_pretrained(tmp_path / "out", dtype="auto").dtype == dtype


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_the_sources_processor_settings_are_kept(name, theirs, stock_folder, tmp_path):
    shutil.copytree(stock_folder, tmp_path / "source")
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_processor_type": "SamImageProcessorFast"}
    nested = {"image_processor": settings, "processor_class": "SamProcessor"}
    (tmp_path / "source" / name).write_text(json.dumps(settings if name.startswith("pre") else nested))
    convert(tmp_path / "source", tmp_path / "out", progress=False)
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert written == {
        "image_mean": [0.1, 0.2, 0.3],
        "image_processor_type": "SamImageProcessor",
        "processor_class": "SamProcessor",
    }


def test_past_the_limit_weights_are_sharded_as_transformers_does(theirs, stock_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.checkpoints.MAX_SHARD_BYTES", 100_000)
    convert(stock_folder, tmp_path / "out", progress=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert set(index["weight_map"].values()) == set(shards)
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    expected = split_state_dict(stock_state(theirs))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert_same(SamSplitModel.from_pretrained(tmp_path / "out").state_dict(), expected)


GEOMETRIES = {
    "vit_b": {},
    "pruned": {"hidden_size": 168, "mlp_dim": 696},
    "no_bias": {"qkv_bias": False},
    "no_abs_pos": {"use_abs_pos": False},
    "all_global": {"window_size": 0, "global_attn_indexes": list(range(12))},
    "small_image": {"image_size": 512},
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_sizes_are_read_off_the_shapes(name):
    vision = GEOMETRIES[name]
    prompt = {"image_size": vision.get("image_size", 1024)}
    with torch.device("meta"):
        state = stock_state(SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt)))
    config = SamSplitConfig(**config_from_state_dict(state))
    expected = SamSplitConfig(vision_config=vision, prompt_encoder_config=prompt).vision_config.to_dict()
    found = config.vision_config.to_dict()
    assert {key for key in found if found[key] != expected[key]} <= {"mlp_ratio"}
    check_shapes(config, {key: tuple(tensor.shape) for key, tensor in split_state_dict(state).items()})


@pytest.mark.parametrize(
    ("size", "layers", "heads", "width"), [("vit_b", 12, 12, 768), ("vit_l", 24, 16, 1024), ("vit_h", 32, 16, 1280)]
)
def test_the_released_sizes_are_recognised(size, layers, heads, width):
    with torch.device("meta"):
        config = config_from_state_dict(sam_model_registry[size]().state_dict())
    vision = config["vision_config"]
    assert (vision["num_hidden_layers"], vision["num_attention_heads"], vision["hidden_size"]) == (
        layers,
        heads,
        width,
    )
    assert vision["global_attn_indexes"] == [layers // 4 * quarter - 1 for quarter in (1, 2, 3, 4)]
    assert (vision["window_size"], vision["mlp_dim"]) == (14, 4 * width)
    assert config["mask_decoder_config"]["layer_norm_eps"] == 1e-5  # nn.LayerNorm's default, which Meta's code leaves


def test_without_relative_positions_the_shapes_do_not_tell_the_heads(meta_state):
    with pytest.raises(ConversionError, match="number of heads nor window_size"):
        config_from_state_dict({key: tensor for key, tensor in meta_state.items() if "rel_pos" not in key})


def edit_config(**changes):
    def edit(folder, state):
        config = json.loads((folder / "config.json").read_text())
        config["vision_config"] |= changes.pop("vision_config", {})
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def edit_state(change):
    def edit(folder, state):
        state = dict(state)
        change(state)
        as_is(folder, state)

    return edit


def edit_index(change):
    def edit(folder, state):
        (folder / "model.safetensors").unlink()
        in_shards(folder, state)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        change(folder, index["weight_map"])
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return edit


QKV = "vision_encoder.layers.0.attn.qkv.weight"
SHARD = "model-00001-of-00003.safetensors"


def misspell(state):
    state[QKV.replace("qkv", "qvk")] = state.pop(QKV)


def link_out(folder, weight_map):
    (folder / SHARD).rename(folder.parent / "elsewhere.safetensors")
    (folder / SHARD).symlink_to(folder.parent / "elsewhere.safetensors")


def repoint(name):
    return edit_index(lambda folder, weight_map: weight_map.update(dict.fromkeys(weight_map, name)))


def write(name, content):
    return lambda folder, state: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder, state: (folder / name).unlink()


def truncate(folder, state):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])


def lie(old, new):
    def edit(folder, state):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))

    return edit


BAD_FOLDERS = {
    "truncated": (truncate, "is not a whole safetensors file"),
    "empty": (write("model.safetensors", b""), "is not a whole safetensors file"),
    "header_is_not_json": (lie(b'{"', b"{{"), "is not a whole safetensors file"),
    "header_lies_about_a_shape": (lie(b'"shape":[96,32]', b'"shape":[96,33]'), "is not a whole safetensors file"),
    "header_lies_about_offsets": (
        lie(b'"data_offsets":[0,', b'"data_offsets":[1,'),
        "is not a whole safetensors file",
    ),
    "another_dtype": (edit_state(lambda s: s.update({QKV: s[QKV].to(torch.int8)})), "is I8, expected one of F64, F32"),
    "key_missing": (edit_state(lambda s: s.pop(QKV)), f"'{QKV}' is not in the checkpoint"),
    "key_extra": (
        edit_state(lambda s: s.update(extra=torch.zeros(1))),
        "'extra' is not a tensor of a Segment Anything",
    ),
    "key_misspelt": (edit_state(misspell), "attn.qvk.weight' is not a tensor of a Segment Anything"),
    "key_misshapen": (edit_state(lambda s: s.update({QKV: s[QKV].T.contiguous()})), "must have a multiple of 3 rows"),
    "layer_missing": (
        edit_config(vision_config={"num_hidden_layers": 3}),
        "num_hidden_layers is 3, but the checkpoint",
    ),
    "config_disagrees": (
        edit_config(vision_config={"mlp_dim": 65}),
        "mlp.lin1.weight' has the shape (64, 32), expected",
    ),
    "config_out_of_range": (edit_config(vision_config={"hidden_size": "many"}), "config.json describes no model"),
    "config_is_not_json": (write("config.json", b"{"), "config.json is not JSON"),
    "config_is_a_list": (write("config.json", b"[]"), "holds a list, expected a JSON object"),
    "config_missing": (remove("config.json"), "holds no config.json"),
    "weights_missing": (remove("model.safetensors"), "holds no weights"),
    "sam2_config": (edit_config(model_type="sam2"), "is SAM 2 (model_type 'sam2')"),
    "other_config": (edit_config(model_type="bert"), "is model_type 'bert', expected a Segment Anything model"),
    "index_climbs": (repoint("../elsewhere.safetensors"), "it may not leave the folder"),
    "index_is_absolute": (repoint("/etc/model.safetensors"), "it may not leave the folder"),
    "index_links_out": (edit_index(link_out), "out of the folder"),
    "index_without_shard": (
        edit_index(lambda folder, _: (folder / SHARD).unlink()),
        f"names {SHARD}, which is not in",
    ),
    "index_lists_too_little": (edit_index(lambda _, weight_map: weight_map.pop(QKV)), f"a shard holds '{QKV}', which"),
    "index_lists_too_much": (edit_index(lambda _, weight_map: weight_map.update(more=SHARD)), "places 'more' in"),
    "index_without_map": (
        lambda folder, state: (
            remove("model.safetensors")(folder, state),
            write("model.safetensors.index.json", b"{}")(folder, state),
        ),
        "has no weight_map",
    ),
}


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_a_bad_folder_gets_one_clear_line_and_leaves_nothing(fault, theirs, stock_folder, tmp_path, capsys):
    edit, message = BAD_FOLDERS[fault]
    shutil.copytree(stock_folder, tmp_path / "source")
    edit(tmp_path / "source", stock_state(theirs))
    assert_refused(tmp_path / "source", message, tmp_path, capsys)


def assert_refused(source, message, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert main(["convert", str(source), str(tmp_path / "out"), "--quiet"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if not line.startswith("sam-split: ")] == []
    assert lines[-1].startswith("sam-split: error: ")
    assert message in lines[-1]
    assert not re.search(r"\x1b|weights_only|two options", lines[-1]), "torch's advice to load it unsafely"
    assert sorted(tmp_path.iterdir()) == before


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


BAD_STATES = {
    "sam2": ({"image_encoder.trunk.pos_embed": torch.zeros(1)}, "is SAM 2"),
    "mobile_sam": ({"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(1)}, "is MobileSAM"),
    "sam_hq": ({"mask_decoder.hf_token.weight": torch.zeros(1)}, "is HQ-SAM"),
    "split": ({"vision_encoder.layers.0.attn.q.weight": torch.zeros(1)}, "has the keys of the format 'split'"),
    "stock": (
        {"vision_encoder.layers.0.attn.qkv.weight": torch.zeros(1)},
        "its base's config.json beside it, and name the folder",
    ),
    "adapter": ({"base_model.model.x.lora_A.weight": torch.zeros(1)}, "a PEFT adapter"),
    "resnet": (
        {"conv1.weight": torch.zeros(1)},
        "is not a Segment Anything checkpoint: its 1 tensors are named 'conv1.w",
    ),
    "list": ([torch.zeros(1)], "holds a list, expected a state dict"),
    "nested": ({"a": {"b": torch.zeros(1)}}, "its 1 tensors are named 'b'"),
    "number": ({"image_encoder.pos_embed": torch.zeros(1), "epoch": 3}, "'epoch' is a int, expected a state dict"),
    "integers": ({"image_encoder.pos_embed": torch.zeros(1, dtype=torch.int64)}, "is torch.int64"),
    "expanded": ({"image_encoder.pos_embed": torch.zeros(1).expand(10**12)}, "is larger than what is stored"),
    "module": (
        torch.nn.Linear(1, 1),
        "it names torch.nn.modules.linear.Linear, which is no tensor. Its code was not run",
    ),
    "metric": ({"image_encoder.pos_embed": torch.zeros(1), "best": np.float64(1)}, "it names numpy"),
    "empty": ({}, "expected a state dict"),
}


@pytest.mark.parametrize("fault", BAD_STATES)
def test_a_bad_pth_is_named(fault, tmp_path, capsys):
    state, message = BAD_STATES[fault]
    torch.save(state, tmp_path / "bad.pth")
    assert_refused(tmp_path / "bad.pth", message, tmp_path, capsys)


def test_a_text_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "README.md").write_text("# A model")
    assert_refused(tmp_path / "README.md", "README.md holds more than tensors, or is damaged: ", tmp_path, capsys)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "sam.pth"])
def test_code_in_a_pickle_is_not_run(is_zip, name, meta_state, stock_folder, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(stock_folder / "config.json", source)
    mark = tmp_path / "the payload ran"
    torch.save({**meta_state, "x": Payload(mark)}, source / name, _use_new_zipfile_serialization=is_zip)
    assert_refused(source / name if name == "sam.pth" else source, "Its code was not run", tmp_path, capsys)
    assert not mark.exists()
    torch.load(source / name, weights_only=False)  # the payload is alive: an unsafe reader runs it
    assert mark.exists()


def test_a_split_folder_is_not_split_again(stock_folder, tmp_path, capsys):
    convert(stock_folder, tmp_path / "split", progress=False)
    assert_refused(tmp_path / "split", "is split already", tmp_path, capsys)


@pytest.mark.parametrize("source", ["nowhere/at/all", "./nowhere", "nowhere.pth", "someone/never-published"])
def test_a_source_that_is_nowhere_is_named(source, tmp_path, capsys):
    assert_refused(source, repr(source) if "never" in source else f"{source} does not exist", tmp_path, capsys)


def test_a_revision_of_a_local_folder_is_refused(stock_folder, tmp_path):
    with pytest.raises(ConversionError, match="--revision is for Hub ids"):
        convert(stock_folder, tmp_path / "out", revision="main", progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_warned_of_and_kept(value, theirs, stock_folder, tmp_path, capsys):
    shutil.copytree(stock_folder, tmp_path / "source")
    state = {key: tensor.clone() for key, tensor in stock_state(theirs).items()}
    state[QKV][0, 0] = value
    as_is(tmp_path / "source", state)
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "out"), "--quiet"]) == 0
    assert "'vision_encoder.layers.0.attn.q.weight' holds NaN or infinity, kept as it is" in capsys.readouterr().err
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), split_state_dict(state))


def test_python_m_conversion_is_the_command_and_helps_at_once():
    code = "import sys, conversion.cli; conversion.cli.build_parser(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
    run = subprocess.run([sys.executable, "-m", "conversion", "convert", "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "sam-split convert facebook/sam-vit-base" in run.stdout


def test_wrong_usage_exits_with_2(capsys):
    with pytest.raises(SystemExit) as error:
        main(["convert"])
    assert error.value.code == 2
