"""PEFT adapts the model with nothing patched: LoRA, DoRA and a trained mask decoder, saved, reloaded and merged.

Fresh adapters change nothing, so a round trip of them proves nothing: every adapter is drawn again, and each test
asserts that it moves the masks.
"""

import pytest
import torch
from models import pixels, points, split_model, stock_model
from parity import stock_forward
from peft import AutoPeftModelForFeatureExtraction, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel

from sam_split import SamSplitModel

KINDS = {
    "lora": {},
    "lora_qkv": {"target_modules": ["q", "k", "v"]},
    "dora": {"use_dora": True},
    "lora_decoder": {"modules_to_save": ["mask_decoder"]},
    "dora_decoder": {"use_dora": True, "modules_to_save": ["mask_decoder"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    split_model(stock_model()).save_pretrained(folder)
    return folder


def base(folder) -> SamSplitModel:
    return AutoModel.from_pretrained(folder).eval()


def lora_config(kind: str) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"], "lora_dropout": 0.1, **KINDS[kind]})


def adapted_model(folder, kind: str) -> PeftModel:
    """A base with an adapter whose every trainable weight is drawn again."""
    model = get_peft_model(base(folder), lora_config(kind))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                # A DoRA magnitude and a copied mask decoder hold values to move, LoRA's factors do not.
                parameter.copy_(noise * 0.3 if "lora_A" in name or "lora_B" in name else parameter + 0.1 * noise)
    return model.eval()


@torch.no_grad()
def outputs(model):
    return stock_forward(model, pixels(), **points(1, 0))


def distance(left, right) -> float:
    return max((left[name] - right[name]).abs().max().item() for name in right)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_round_trip(folder, tmp_path, kind):
    plain = outputs(base(folder))
    adapted = adapted_model(folder, kind)
    moved = outputs(adapted)
    assert distance(moved, plain) > 0.1

    adapted.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any("vision_encoder" in name and "lora" not in name for name in saved), "the base stays out of it"
    assert any("mask_decoder" in name for name in saved) == ("decoder" in kind)

    reloaded = PeftModel.from_pretrained(base(folder), tmp_path / "adapter").eval()
    assert distance(outputs(reloaded), moved) == 0
    with reloaded.disable_adapter():
        assert distance(outputs(reloaded), plain) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model(folder, tmp_path, kind):
    adapted = adapted_model(folder, kind)
    moved = outputs(adapted)
    merged = adapted.merge_and_unload()
    assert type(merged) is SamSplitModel
    assert merged.state_dict().keys() == base(folder).state_dict().keys()
    assert distance(outputs(merged), outputs(base(folder))) > 0.1
    # The merged product is rounded once more than the adapter's two steps.
    assert distance(outputs(merged), moved) < 1e-4

    merged.save_pretrained(tmp_path / "merged")
    assert {file.name for file in (tmp_path / "merged").glob("*.py")} == {file.name for file in folder.glob("*.py")}
    assert distance(outputs(base(tmp_path / "merged")), outputs(merged)) == 0
    again = get_peft_model(base(tmp_path / "merged"), lora_config(kind)).eval()
    assert distance(outputs(again), outputs(merged)) < 1e-5, "a fresh adapter starts from the merged model"


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_adapter_alone(folder, kind, gradient_checkpointing):
    model = get_peft_model(base(folder), lora_config(kind)).train()
    if gradient_checkpointing:
        model.base_model.model.gradient_checkpointing_enable()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    for _ in range(2):  # LoRA's first factor has no gradient until the second has moved
        optimizer.zero_grad()
        model(pixel_values=pixels(), **points(1, 0)).pred_masks.square().mean().backward()
        optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved <= trainable
    assert {name for name in trainable if "lora_" in name} <= moved
    assert any("mask_decoder" in name for name in moved) == ("decoder" in kind)


def test_checkpointing_leaves_adapter_gradients_alone(folder):
    """Re-entrant checkpointing drops them in silence when the mask decoder is trained too."""
    gradients = []
    for checkpointing in (False, True):
        model = adapted_model(folder, "lora_decoder")
        for module in model.modules():
            module.training = not isinstance(module, torch.nn.Dropout)
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable()
        model(pixel_values=pixels(), **points(1, 0)).pred_masks.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad and "lora" in name})
    assert gradients[0]
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)


def test_q_and_v_are_the_image_encoders_alone(folder):
    model = get_peft_model(base(folder), lora_config("lora"))
    adapted = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {f"vision_encoder.layers.{layer}.attn.{name}" for layer in (0, 1) for name in "qv"}


def test_adapter_is_seen_by_reused_embeddings(folder):
    """Embeddings computed once carry the adapter's gradient, which stock's forbid."""
    model = adapted_model(folder, "lora")
    embeddings = model.get_image_embeddings(pixels())
    model(image_embeddings=embeddings, **points(1, 0)).pred_masks.square().mean().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad.abs().max() > 0, name


def test_feature_extraction_adapter_is_found_by_its_path(folder, tmp_path):
    """The task type that peft accepts for this model, and the class that loads base and adapter in one step."""
    config = LoraConfig(r=4, target_modules=["q", "v"], task_type="FEATURE_EXTRACTION")
    model = get_peft_model(base(folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.eval().save_pretrained(tmp_path / "adapter")
    assert distance(outputs(model), outputs(base(folder))) > 0.1
    reloaded = AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "adapter").eval()
    assert distance(outputs(reloaded), outputs(model)) == 0
