"""Weights on disk, brought in layer by layer by accelerate, give the outputs of weights in memory."""

import pytest
import torch
from models import pixels, points, split_model, stock_model
from parity import stock_forward
from transformers import AutoModel

PARTS = ("shared_image_embedding", "vision_encoder", "prompt_encoder", "mask_decoder")
ENCODER = ("pos_embed", "patch_embed", "layers.0", "layers.1", "neck")
MAPS = {
    "decoder": dict.fromkeys(PARTS[:2], "cpu") | dict.fromkeys(PARTS[2:], "disk"),
    "encoder": dict.fromkeys(PARTS, "cpu") | {"vision_encoder": "disk"},
    "layer": dict.fromkeys((PARTS[0], *PARTS[2:], *(f"vision_encoder.{name}" for name in ENCODER)), "cpu")
    | {"vision_encoder.layers.0": "disk"},
}


@pytest.mark.parametrize("name", MAPS)
def test_disk(tmp_path, name):
    ours = split_model(stock_model())
    ours.save_pretrained(tmp_path / "model")
    options = {"device_map": dict(MAPS[name]), "offload_folder": tmp_path / "offload"}
    offloaded = AutoModel.from_pretrained(tmp_path / "model", **options).eval()
    assert any(parameter.device.type == "meta" for parameter in offloaded.parameters())
    with torch.no_grad():
        expected = stock_forward(ours, pixels(), **points(1, 0))
        outputs = stock_forward(offloaded, pixels(), **points(1, 0))
    for output, value in expected.items():
        assert torch.equal(outputs[output], value), output
