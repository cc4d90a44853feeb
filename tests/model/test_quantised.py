"""Quantised weights by torchao and bitsandbytes, through transformers, and LoRA on top: QLoRA.

`python -m benchmarks.quantised` has the figures of ViT-B.
"""

import pytest
import torch
from models import pixels, points, split_model, stock_model, tiny_config
from parity import stock_forward
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModel, BitsAndBytesConfig, TorchAoConfig

CONFIGS = {
    "torchao-8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "bitsandbytes-8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes-4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}
LARGEST_ERROR = {"torchao-8": 0.05, "bitsandbytes-8": 0.05, "bitsandbytes-4": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised") / "model"
    config = tiny_config(hidden_size=64, mlp_dim=128)  # bitsandbytes packs 64 weights at a time
    split_model(stock_model(config)).save_pretrained(folder)
    return folder


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


@pytest.fixture
def quantised(folder, kind):
    return AutoModel.from_pretrained(folder, quantization_config=CONFIGS[kind](), device_map="cpu").eval()


def test_outputs(folder, kind, quantised):
    weight = quantised.vision_encoder.layers[0].attn.q.weight
    assert type(weight) is not torch.nn.Parameter
    with torch.no_grad():
        exact = stock_forward(AutoModel.from_pretrained(folder).eval(), pixels(), **points(1, 0))
        outputs = stock_forward(quantised, pixels(), **points(1, 0))
    for name, value in exact.items():
        assert 1e-4 < (outputs[name] - value).norm() / value.norm() < LARGEST_ERROR[kind], name


def test_lora(quantised):
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


@pytest.mark.parametrize("skip", [None, ["vision_encoder", "mask_decoder"]], ids=["by_default", "as_asked"])
def test_bitsandbytes_leaves_the_mask_decoder_alone(folder, skip):
    """Some of its layers are too narrow to be packed; who names modules to skip gets those and no others."""
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    model = AutoModel.from_pretrained(folder, quantization_config=config, device_map="cpu")
    assert config.llm_int8_skip_modules == skip
    assert all(
        type(layer) is torch.nn.Linear for layer in model.mask_decoder.modules() if hasattr(layer, "in_features")
    )
    q = model.vision_encoder.layers[0].attn.q
    assert (type(q) is torch.nn.Linear) == (skip is not None)
