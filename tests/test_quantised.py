"""8-bit weights by torchao, through transformers: a quarter of the memory, one per cent of error, and LoRA on top.

Speed gains nothing on a CPU: the weights are widened again for every product.
"""

import pytest
import torch
from models import pixels, points, split_model, stock_model
from parity import stock_forward
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig
from torchao.utils import TorchAOBaseTensor
from transformers import AutoModel, TorchAoConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised") / "model"
    split_model(stock_model()).save_pretrained(folder)
    return folder


@pytest.fixture
def quantised(folder):
    config = TorchAoConfig(Int8WeightOnlyConfig())
    return AutoModel.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


def test_outputs(folder, quantised):
    weights = {name: value for name, value in quantised.named_parameters() if isinstance(value, TorchAOBaseTensor)}
    assert {f"vision_encoder.layers.{i}.attn.{name}.weight" for i in (0, 1) for name in "qkv"} <= set(weights)
    with torch.no_grad():
        exact = stock_forward(AutoModel.from_pretrained(folder).eval(), pixels(), **points(1, 0))
        outputs = stock_forward(quantised, pixels(), **points(1, 0))
    for name, value in exact.items():
        assert 1e-4 < (outputs[name] - value).norm() / value.norm() < 0.05, name


def test_lora_on_quantised_weights(quantised):
    model = get_peft_model(quantised, LoraConfig(r=4, target_modules=["q", "v"])).train()
    model(pixel_values=pixels(), **points(1, 0)).pred_masks.square().mean().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert {
        f"base_model.model.vision_encoder.layers.{i}.attn.{name}.lora_B.default.weight"
        for i in (0, 1)
        for name in "qv"
    } <= set(gradients)
    assert all("lora_" in name for name in gradients)
    assert all(value.abs().max() > 0 for name, value in gradients.items() if "lora_B" in name)
