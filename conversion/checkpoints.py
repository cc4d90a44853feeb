"""Whole checkpoints: from stock transformers or Meta to a complete SamSplit folder, and back."""

import contextlib
from pathlib import Path

from .atomic import check_out, new_file, new_folder
from .config_from_shapes import check_meta_can_hold, check_shapes, check_stock_can_hold, config_from_shapes
from .errors import ConversionError
from .folder import config_fields, split_config, write_code_and_card, write_json, write_processor
from .image_size import resize
from .key_map import KEY_MAP, STOCK_MAP, plan
from .sources import Checkpoint, open_checkpoint
from .tensors import Renamed, Tensors
from .writing import MAX_SHARD_BYTES, write_pth, write_weights

FORMATS = ("split", "transformers", "meta")


def convert(source, out, *, revision: str | None = None, image_size=None, progress: bool = True) -> None:
    """Write the model in `source` as a SamSplit folder that loads with AutoModel.

    Args:
        source: a Hub id, a stock transformers folder (safetensors or .bin, sharded or not) or a .pth of Meta's.
        out: the folder to make; it appears whole or not at all.
        revision: branch, tag or commit of a Hub id.
        image_size: None to keep the input size, else an int or (height, width) in pixels.
        progress: whether to show a progress bar.

    Raises:
        ConversionError: if `source` is no SAM checkpoint, or damaged, or `out` exists.
    """
    out = check_out(out, source)
    checkpoint = open_checkpoint(source, revision=revision)
    if checkpoint.format == "split":
        raise ConversionError(f"{source} is split already; load it as it is, or turn it back with `sam-split fuse`")
    config, tensors = describe(checkpoint)
    card = {}
    if image_size not in (None, config.vision_config.image_size):
        card["resized_from"] = config.vision_config.image_size
        config, tensors = resize(checkpoint, config, tensors, image_size)
    write_model(out, "split", tensors, config, checkpoint, progress=progress, **card)


def fuse(source, out, *, format: str = "transformers", progress: bool = True) -> None:
    """Write a split model as stock transformers or Meta's code has it, to be used without SamSplit.

    Args:
        source: a SamSplit folder, or a Hub id of one.
        out: what to make, whole or not at all: a folder for "transformers", a .pth file for "meta".
        format: "transformers" or "meta".
        progress: whether to show a progress bar.

    Raises:
        ConversionError: if `source` is no SamSplit model, or the format cannot hold it, or `out` exists.
    """
    if format not in FORMATS[1:]:
        raise ConversionError(f"format must be one of {', '.join(FORMATS[1:])}, got {format!r}")
    out = check_out(out, source, is_file=format == "meta")
    checkpoint = open_checkpoint(source)
    if checkpoint.format != "split":
        raise ConversionError(f"{source} is fused already, in the format {checkpoint.format!r}; use it as it is")
    config, tensors = describe(checkpoint)
    write_model(out, format, tensors, config, checkpoint, progress=progress)


def describe(checkpoint: Checkpoint):
    """The SamSplitConfig of a checkpoint and its tensors under SamSplit's names, checked against each other."""
    tensors = checkpoint.split_tensors()
    config = split_config(checkpoint.config or config_from_shapes(tensors.shapes), tensors)
    check_shapes(config, tensors.shapes)
    return config, tensors


def write_model(
    out: Path, format: str, tensors: Tensors, config, checkpoint: Checkpoint, *, progress: bool, **card
) -> None:
    """Write tensors under SamSplit's names as one of FORMATS.

    Args:
        out: the folder, or for "meta" the file, to make.
        format: one of FORMATS.
        tensors: under SamSplit's names.
        config: their SamSplitConfig.
        checkpoint: where they come from; its processor settings and its name go along.
        progress: whether to show a progress bar.
        card: passed on to the model card of a split folder.
    """
    if format == "meta":
        check_meta_can_hold(config, tensors.shapes)
        tensors = Renamed(tensors, plan(tensors, KEY_MAP, inverse=True))
        with new_file(out) as path, progress_bar(2 * tensors.nbytes, progress) as advance:
            write_pth(path, tensors, advance)
        return
    if format == "transformers":
        check_stock_can_hold(config)
        tensors = Renamed(tensors, plan(tensors, STOCK_MAP, inverse=True))
    with new_folder(out) as folder, progress_bar(2 * tensors.nbytes, progress) as advance:
        write_weights(folder, tensors, advance, MAX_SHARD_BYTES)
        write_json(folder / "config.json", config_fields(config, format))
        write_processor(folder, checkpoint.processor, config)
        if format == "split":
            write_code_and_card(folder, checkpoint, **card)


@contextlib.contextmanager
def progress_bar(total: int, show: bool):
    """A function to be called with the bytes done. The bar shows on terminals only."""
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="write and check", disable=None if show else True) as bar:
        yield bar.update
