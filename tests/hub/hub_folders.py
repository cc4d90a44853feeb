"""Folders to publish: a tiny split model whose outputs depend on every weight, and a LoRA adapter for it."""

import models
import torch
from peft import LoraConfig, get_peft_model
from transformers import SamImageProcessor, SamProcessor


def save_split_model(folder, seed: int = 0):
    """What `save_pretrained` writes for a model and its processor: config, weights, the code files, no card."""
    ours = models.split_model(models.stock_model(seed=seed))
    # High scores and steep edges, so that the mask-generation pipeline keeps some masks.
    torch.nn.init.constant_(ours.mask_decoder.iou_prediction_head.proj_out.bias, 10.0)
    with torch.no_grad():
        for head in ours.mask_decoder.output_hypernetworks_mlps:
            head.proj_out.weight.mul_(1000)
            head.proj_out.bias.mul_(1000)
    ours.save_pretrained(folder)
    size = models.IMAGE_SIZE
    processor = SamImageProcessor(
        size={"longest_edge": size},
        pad_size={"height": size, "width": size},
        mask_size={"longest_edge": size // 4},
        mask_pad_size={"height": size // 4, "width": size // 4},
    )
    SamProcessor(processor).save_pretrained(folder)
    return ours


def save_adapter(model, folder, **options):
    """A LoRA adapter on q and v whose weights are not zero, as they are before training."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"], **options}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(folder)
    return adapted
