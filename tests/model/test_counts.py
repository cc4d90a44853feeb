"""The parameter counts that the documentation publishes, to the digit, on the real ViT-B without its memory."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sam_split import SamSplitConfig, SamSplitModel

BASE = 93_735_472


def vit_b() -> SamSplitModel:
    with torch.device("meta"):
        return SamSplitModel(SamSplitConfig())


def test_base():
    assert sum(parameter.numel() for parameter in vit_b().parameters()) == BASE
    assert vit_b().num_parameters() == BASE


@pytest.mark.parametrize(
    ("target_modules", "use_dora", "trainable", "total"),
    [
        (["q", "v"], False, 589_824, 94_325_296),
        (["q", "k", "v"], False, 884_736, 94_620_208),
        (["q", "v"], True, 608_256, 94_343_728),
        (["q", "k", "v"], True, 912_384, 94_647_856),
    ],
    ids=["lora_qv", "lora_qkv", "dora_qv", "dora_qkv"],
)
def test_adapters(target_modules, use_dora, trainable, total):
    config = LoraConfig(r=16, lora_alpha=32, target_modules=target_modules, lora_dropout=0.1, use_dora=use_dora)
    with torch.device("meta"):
        model = get_peft_model(vit_b(), config)
    assert model.get_nb_trainable_parameters() == (trainable, total)
    assert total == BASE + trainable
    adapted = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {f"vision_encoder.layers.{layer}.attn.{name}" for layer in range(12) for name in target_modules}
