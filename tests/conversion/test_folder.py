"""The files beside the weights: the licence is ours wherever we are installed, the processor's settings are SAM's."""

import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch
from models import meta_model, stock_model, tiny_config

from conversion import ConversionError, config_from_state_dict, convert, folder
from sam_split import SamSplitConfig

OURS = (Path(folder.__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")


class Installed(Path("/").__class__):
    """A file of a distribution, as importlib.metadata lists it."""

    def locate(self):
        return self


@pytest.fixture
def site_packages(tmp_path, monkeypatch):
    """This package in a site-packages folder, where another one has put its LICENSE."""
    (tmp_path / "conversion").mkdir()
    (tmp_path / "LICENSE").write_text("a stranger's")
    monkeypatch.setattr(folder, "__file__", str(tmp_path / "conversion" / "folder.py"))
    return tmp_path


def test_the_installed_licence_wins_over_a_strangers(site_packages, monkeypatch):
    file = Installed(site_packages / "sam_split-0.1.0.dist-info" / "licenses" / "LICENSE")
    file.parent.mkdir(parents=True)
    file.write_text("ours")
    monkeypatch.setattr(metadata, "files", lambda name: [Installed(site_packages / "LICENSE"), file])
    assert folder.license_text() == "ours"


@pytest.mark.parametrize("installed", [True, False])
def test_a_strangers_licence_is_never_taken(installed, site_packages, monkeypatch):
    def files(name):
        if not installed:
            raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", files)
    with pytest.raises(ConversionError, match="lacks its LICENSE file"):
        folder.license_text()


def test_a_checkout_that_is_not_installed_has_its_own(monkeypatch):
    def files(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", files)
    assert folder.license_text() == OURS
    assert "Apache License" in OURS


@pytest.mark.parametrize(("image_size", "patch_size"), [((96, 96), 16), ((64, 128), 16), ((96, 144), 8)])
def test_a_pth_gets_the_settings_of_sams_processor(image_size, patch_size):
    """Meta's preprocessing: longest side, ImageNet's statistics in 0 to 1, zeros below; four mask pixels a token."""
    height, width = image_size
    settings = folder.sized_processor(folder.SAM_PROCESSOR, image_size, patch_size)
    assert settings == {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": max(height, width)},
        "pad_size": {"height": height, "width": width},
        "mask_size": {"longest_edge": 4 * max(height, width) // patch_size},
        "mask_pad_size": {"height": 4 * height // patch_size, "width": 4 * width // patch_size},
    }


def test_a_converted_pth_carries_these_settings(tmp_path):
    torch.save(meta_model().state_dict(), tmp_path / "meta.pth")
    convert(tmp_path / "meta.pth", tmp_path / "out", progress=False)
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    named = {"image_processor_type": "SamImageProcessor", "processor_class": "SamProcessor"}
    assert written == {**folder.sized_processor(folder.SAM_PROCESSOR, (96, 96), 16), **named}


@pytest.mark.parametrize("layers", [(2, 5, 8, 11), (0, 11), ()])
def test_global_layers_of_a_pth_are_those_with_the_grids_tables(layers):
    vision = {"num_hidden_layers": 12, "global_attn_indexes": list(layers)}
    state = stock_model(tiny_config(**vision)).state_dict()
    config = config_from_state_dict(state)["vision_config"]
    assert config["global_attn_indexes"] == list(layers)
    assert config["window_size"] == 4


def test_a_table_that_no_number_of_heads_has_is_refused():
    state = stock_model().state_dict()
    for layer in range(2):
        for axis in "hw":
            name = f"vision_encoder.layers.{layer}.attn.rel_pos_{axis}"
            state[name] = state[name][:, :15]
    with pytest.raises(ConversionError, match="32 channels cannot be heads of 15"):
        config_from_state_dict(state)


@pytest.mark.parametrize("weight_map", [{}, [], "model.safetensors", None, 3])
def test_an_index_without_a_map_is_refused(weight_map, tmp_path):
    stock_model().save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").rename(tmp_path / "source" / "model-00001-of-00001.safetensors")
    index = tmp_path / "source" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ConversionError, match="has no weight_map from tensors to files"):
        convert(tmp_path / "source", tmp_path / "out", progress=False)
    shutil.rmtree(tmp_path / "source")


def test_the_dtype_of_a_folder_is_that_of_most_of_its_numbers(tmp_path):
    state = {key: tensor.bfloat16() for key, tensor in meta_model().state_dict().items()}
    for name in [name for name in state if name.endswith("bias")]:
        state[name] = state[name].float()  # most tensors may be small
    torch.save(state, tmp_path / "meta.pth")
    convert(tmp_path / "meta.pth", tmp_path / "out", progress=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert SamSplitConfig.from_pretrained(tmp_path / "out").vision_config.patch_size == 16
