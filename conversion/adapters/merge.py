"""A base and its adapter merged into one model."""

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights

from ..atomic import check_out
from ..checkpoints import FORMATS, describe, write_model
from ..errors import ConversionError
from ..key_map import split_state_dict
from ..sources import fetch, open_checkpoint, read_json
from ..tensors import InMemory, Tensors, check_finite
from ..verification import split_model, stock_model


def merge(base, adapter, out, *, format: str = "split", progress: bool = True) -> None:
    """Write the base with the adapter added to its weights, in the base's dtypes.

    Args:
        base: a checkpoint in any format.
        adapter: a PEFT adapter of SamSplit's layers, or of stock SamModel's.
        out: what to make: a folder, or a .pth file for "meta".
        format: "split", "transformers" or "meta".
        progress: whether to show a progress bar.

    Raises:
        ConversionError: if they do not fit together, or `out` exists.
    """
    if format not in FORMATS:
        raise ConversionError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    out = check_out(out, base, adapter, is_file=format == "meta")
    checkpoint = open_checkpoint(base)
    config, tensors = describe(checkpoint)
    folder = fetch(adapter, None, ["adapter_config.json", "adapter_model.*"])
    merged = InMemory(merged_state_dict(config, tensors, folder))
    write_model(out, format, merged, config, checkpoint, progress=progress, change="merge")


def merged_state_dict(config, tensors: Tensors, folder: Path) -> dict[str, torch.Tensor]:
    """SamSplit's state dict after PEFT has merged an adapter, each tensor in the dtype that it had.

    Args:
        config: the base's SamSplitConfig.
        tensors: the base's, under SamSplit's names.
        folder: of the adapter.
    """
    weights = _adapter_weights(folder)
    on_stock = any(".attn.qkv." in name for name in weights)
    model = (stock_model if on_stock else split_model)(config, tensors)
    try:
        adapted = PeftModel(model, PeftConfig.from_pretrained(folder))
        report = set_peft_model_state_dict(adapted, weights)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
    ) as error:  # a layer that is not there, a size that is not right
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])  # torch's first line names no tensor
        raise ConversionError(
            f"the adapter {folder} does not fit the base: {reason.rstrip('.')}; name the base it was trained on"
        ) from error
    missing = [name for name in report.missing_keys if "lora_" in name]
    if missing or report.unexpected_keys:
        name = (missing + report.unexpected_keys)[0]
        raise ConversionError(
            f"the adapter {folder} does not fit the base: {name!r} is on one side only; name its own base"
        )
    state = adapted.merge_and_unload().state_dict()
    state = split_state_dict(state) if on_stock else state
    return {name: tensor.detach().to(tensors.specs[name].dtype) for name, tensor in state.items()}


def _adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    if not (folder / "adapter_config.json").is_file():
        raise ConversionError(f"{folder} holds no adapter_config.json; expected the folder of a PEFT adapter")
    if not any((folder / f"adapter_model.{end}").is_file() for end in ("safetensors", "bin")):
        raise ConversionError(
            f"{folder} holds no adapter_model.safetensors; name a folder that PEFT's save_pretrained wrote"
        )
    bias = read_json(folder / "adapter_config.json").get("bias", "none")
    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise ConversionError(
            f"{folder} holds no readable adapter weights: {str(error).splitlines()[0]}; copy or save it again"
        ) from error
    for name, tensor in weights.items():
        check_finite(name, [tensor])
    if bias != "none" and not any(name.endswith("bias") and ".lora_" not in name for name in weights):
        raise ConversionError(
            f"the adapter {folder} was trained with bias={bias!r} and holds no bias, so a part of it is lost (peft "
            "0.18 does not save them); save it again with a newer peft"
        )
    return weights
