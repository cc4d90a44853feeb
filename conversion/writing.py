"""Weights to disk: one shard in memory at a time, read back and compared with where it came from."""

import os
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file

from .atomic import flushing
from .errors import ConversionError, ConversionWarning
from .folder import write_json
from .pickles import read_weights
from .tensors import SafetensorsFiles, Tensors, same_bits

MAX_SHARD_BYTES = 5 * 10**9  # transformers' default


def ignore(nbytes: int) -> None:
    """No progress is shown."""


def write_weights(
    folder: Path, tensors: Tensors, advance: Callable[[int], None] = ignore, max_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `model.safetensors`, or shards and their index as transformers names them, and check every bit.

    Args:
        folder: an existing one.
        tensors: what to write; each is read twice, to write it and to check it.
        advance: called with the bytes done, 2 * tensors.nbytes in the end.
        max_bytes: of one shard.
    """
    shards = split_state_dict_into_shards_factory(
        tensors.specs,
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    for name, members in shards.filename_to_tensors.items():
        write_safetensors(folder / name, tensors, members, advance)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    paths = [folder / name for name in shards.filename_to_tensors]
    with flushing(paths):
        check_written(SafetensorsFiles(paths), tensors, advance)


def write_safetensors(
    path: Path, tensors: Tensors, names: Iterable[str], advance: Callable[[int], None] = ignore
) -> None:
    """Write some of the tensors as one file, without a check.

    Raises:
        OSError: if the disk is full, or fails.
    """
    state = {name: _read(tensors, name, advance).contiguous() for name in names}
    try:
        save_file(state, path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def write_pth(path: Path, tensors: Tensors, advance: Callable[[int], None] = ignore) -> None:
    """Write the state dict with torch.save, and check every bit. All of it is in memory meanwhile.

    Raises:
        OSError: if the disk is full, or fails.
    """
    state = {name: _alone(_read(tensors, name, advance)) for name in tensors}
    try:
        with path.open("xb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # what torch trips over after the file refused to be written
        raise error.__context__ or error from None
    del state
    with flushing([path]):
        check_written(read_weights(path), tensors, advance)


def check_written(written: Tensors, tensors: Tensors, advance: Callable[[int], None] = ignore) -> None:
    """Raise unless both hold the same names, each with the same shape, dtype and bits."""
    if written.specs != tensors.specs:
        raise ConversionError("what was written holds other tensors than the source; check the disk and try again")
    for name, spec in tensors.specs.items():
        if not same_bits(written[name], tensors[name]):
            raise ConversionError(f"{name!r} was read back with other bits; check the disk and the memory, try again")
        advance(spec.nbytes)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of its own: torch.save would write all that it was cut from."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def _read(tensors: Tensors, name: str, advance: Callable[[int], None]) -> torch.Tensor:
    tensor = tensors[name]
    if tensor.numel() and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
        warnings.warn(f"{name!r} holds NaN or infinity, kept as it is", ConversionWarning, stacklevel=2)
    advance(tensors.specs[name].nbytes)
    return tensor
