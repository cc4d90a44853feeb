"""Adapters whose every tensor was re-drawn, and what adapted models make of two clicks."""

import torch
from models import pixels, points
from peft import LoraConfig, get_peft_model
from segment_anything.modeling import Sam

from sam_split import SamSplitModel

INPUTS = {"pixel_values": pixels(), **points(1, 0)}


def ours(base):
    return SamSplitModel.from_pretrained(base).eval()


def trained(model, folder, seed=3, **config):
    """A PEFT adapter whose every tensor is re-drawn, saved; and the adapted model."""
    model = get_peft_model(model, LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_magnitude" in name:
                parameter.data *= 1 + 0.2 * noise
            elif "lora_" in name:
                parameter.data = 0.2 * noise
            elif "positional" not in name:
                parameter.data += 0.05 * noise
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def masks(model):
    return model(**INPUTS).pred_masks


ADAPTERS = {
    "q_v": {"target_modules": ["q", "v"]},
    "q": {"target_modules": ["q"]},
    "q_k_v": {"target_modules": ["q", "k", "v"], "lora_alpha": 5},
    "rank_pattern": {"target_modules": ["q", "v"], "rank_pattern": {"layers.1.attn.v": 5, r".*\.k": 3}},
    "alpha_pattern": {"target_modules": ["q", "k", "v"], "alpha_pattern": {r".*\.attn\.q": 7}},
    "both_patterns": {"target_modules": ["q", "v"], "rank_pattern": {"v": 3}, "alpha_pattern": {"v": 1}},
    "rslora": {"target_modules": ["q", "v"], "use_rslora": True, "rank_pattern": {"q": 3}},
    "lora_bias": {"target_modules": ["q", "k"], "lora_bias": True, "alpha_pattern": {"k": 1}},
    "regex": {"target_modules": r".*layers\.1\.attn\.(q|v)"},
    "one_layer": {"target_modules": ["q", "v"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "dora": {"target_modules": ["q", "v"], "use_dora": True},
    "dora_q_k_v": {"target_modules": ["q", "k", "v"], "use_dora": True, "alpha_pattern": {"k": 9}},
    "mask_decoder": {"target_modules": ["q", "v"], "modules_to_save": ["mask_decoder"]},
    "prompt_encoder": {"target_modules": ["q", "v"], "modules_to_save": ["prompt_encoder", "mask_decoder"]},
    "more_layers": {"target_modules": ["q", "v", "lin1", "proj", "q_proj"]},
    "task_type": {"target_modules": ["q", "v"], "task_type": "FEATURE_EXTRACTION"},
}


def meta_masks(meta: Sam):
    with torch.no_grad():
        embeddings = meta.image_encoder(INPUTS["pixel_values"])
        prompts = INPUTS["input_points"], INPUTS["input_labels"]
        found = []
        for image in range(2):
            sparse, dense = meta.prompt_encoder(points=[part[image] for part in prompts], boxes=None, masks=None)
            masks, _ = meta.mask_decoder(
                embeddings[image : image + 1], meta.prompt_encoder.get_dense_pe(), sparse, dense, True
            )
            found.append(masks)
    return torch.stack(found)
