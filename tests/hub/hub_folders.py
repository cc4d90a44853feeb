"""Folders to publish: a tiny split model whose outputs depend on every weight, and a LoRA adapter for it."""

import json
import shutil

import models
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
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


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder):
    """The same weights in two shards, as `save_pretrained` cuts a large model."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": {}}
    for number, names in enumerate((sorted(weights)[:90], sorted(weights)[90:]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: weights[key] for key in names}, folder / name, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(names, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def copy_with_config(source, target, **changes):
    shutil.copytree(source, target)
    edit_json(target / "config.json", **changes)
    return target
