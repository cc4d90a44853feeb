"""Folders to publish: a tiny split model whose outputs depend on every weight, and a LoRA adapter for it."""

import json

import models
import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from conversion.folder import write_processor


def save_split_model(folder, seed: int = 0):
    """What `save_pretrained` writes, config, weights and the code files, and a processor; no card."""
    ours = models.split_model(models.stock_model(seed=seed))
    # High scores and steep edges, so that the mask-generation pipeline keeps some masks.
    torch.nn.init.constant_(ours.mask_decoder.iou_prediction_head.proj_out.bias, 10.0)
    with torch.no_grad():
        for head in ours.mask_decoder.output_hypernetworks_mlps:
            head.proj_out.weight.mul_(1000)
            head.proj_out.bias.mul_(1000)
    ours.save_pretrained(folder)
    write_processor(folder, None, ours.config)
    return ours


def save_adapter(model, folder, **options):
    """A LoRA adapter on q and v whose weights are not zero, as they are before training."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v"], init_lora_weights=False, **options)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(folder)
    return adapted


def card_of(staged) -> str:
    return (staged.folder / "README.md").read_text()


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder):
    """The same weights in two shards, as `save_pretrained` cuts a large model."""
    single = folder / "model.safetensors"
    weights, limit = load_file(single), int(0.6 * single.stat().st_size)
    single.unlink()
    save_torch_state_dict(weights, folder, max_shard_size=limit)
    assert len(list(folder.glob("model-*-of-00002.safetensors"))) == 2
