"""A checkpoint in any format as a model to run, with its adapter merged into it."""

import hashlib
import json
import tempfile
from pathlib import Path

import torch

from .adapters.merge import merged_state_dict
from .checkpoints import describe
from .errors import ConversionError
from .folder import config_fields, processor_settings
from .sources import fetch, open_checkpoint
from .tensors import InMemory
from .verification import split_model


def load_model(source, adapter=None):
    """The model in float32, its image processor's settings, and a digest of all that results depend on.

    Args:
        source: a checkpoint in any format.
        adapter: a PEFT adapter of it, or None.

    Raises:
        ConversionError: if they cannot be read, or do not fit each other.
    """
    checkpoint = open_checkpoint(source)
    config, tensors = describe(checkpoint)
    if adapter is not None:
        folder = fetch(adapter, None, ["adapter_config.json", "adapter_model.*"])
        tensors = InMemory(merged_state_dict(config, tensors, folder))
    processor = processor_settings(checkpoint.processor, config)
    fields = {name: value for name, value in config_fields(config, "split").items() if name.endswith("_config")}
    digest = hashlib.sha256(json.dumps([fields, processor], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    model = split_model(config, tensors)
    # Where a tensor lies in its file decides how it is aligned, and that the last bit of a product.
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return model, processor, digest.hexdigest()


def image_processor(settings: dict):
    """The image processor that `AutoProcessor` makes of the settings: which class that is depends on transformers."""
    from transformers import AutoImageProcessor

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder)


def on_device(device: str | None, model):
    """The model on a device; None for CUDA where there is one, else the CPU."""
    if device == "meta":
        raise ConversionError("--device 'meta' computes nothing; `sam-split env` lists devices")
    try:
        return model.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    except (RuntimeError, AssertionError) as error:
        raise ConversionError(
            f"--device {device!r} cannot be used: {str(error).splitlines()[0]}; `sam-split env` lists devices"
        ) from error


def statistics_of(processor: dict) -> dict[str, tuple[float, ...]]:
    """The mean and deviation of an image processor, as `generate_masks` takes them."""
    return {name: tuple(processor[name]) for name in ("image_mean", "image_std") if name in processor}
