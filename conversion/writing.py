"""Weights to disk: safetensors, one tensor in memory at a time, read back and compared with where they came from."""

import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from .errors import ConversionError, ConversionWarning
from .tensors import DTYPES, SafetensorsFiles, Tensors, is_finite, same_bits

MAX_SHARD_BYTES = 5 * 10**9  # transformers' default

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_weights(
    folder: Path,
    tensors: Tensors,
    advance: Callable[[int], None] = lambda nbytes: None,
    max_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model.safetensors`, or shards and their index as transformers lays them out, and check every bit.

    Args:
        folder: an existing one.
        tensors: what to write; each is read twice, to write it and to check it.
        advance: called with the bytes done, 2 * tensors.nbytes in the end.
        max_bytes: of one shard.
    """
    shards = _shards(tensors, max_bytes)
    for name, members in shards.items():
        _write_safetensors(folder / name, tensors, members, advance)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": tensors.nbytes},
            "weight_map": {member: name for name, members in shards.items() for member in sorted(members)},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    check_written(SafetensorsFiles([folder / name for name in shards]), tensors, advance)


def check_written(written: Tensors, tensors: Tensors, advance: Callable[[int], None] = lambda nbytes: None) -> None:
    """Raise unless both hold the same names, each with the same bits."""
    if written.specs.keys() != tensors.specs.keys():
        raise ConversionError(
            "what was written holds other tensors than the source; is the disk or the memory failing?"
        )
    for name, spec in tensors.specs.items():
        if not same_bits(written[name], tensors[name]):
            raise ConversionError(f"{name!r} was read back with other bits; is the disk or the memory failing?")
        advance(spec.nbytes)


def _shards(tensors: Tensors, max_bytes: int) -> dict[str, list[str]]:
    """File name -> the tensors in it, in the order of writing."""
    # Wide types first: then each tensor starts at a multiple of its element size.
    order = sorted(tensors.specs, key=lambda name: -tensors.specs[name].dtype.itemsize)
    groups, size = [[]], 0
    for name in order:
        nbytes = tensors.specs[name].nbytes
        if groups[-1] and size + nbytes > max_bytes:
            groups, size = [*groups, []], 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _write_safetensors(path: Path, tensors: Tensors, names: list[str], advance: Callable[[int], None]) -> None:
    """The format: the header's length in 8 bytes, a JSON header, then the tensors' bytes one after the other."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        spec = tensors.specs[name]
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the data starts at a multiple of 8
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            tensor = tensors[name].contiguous()
            if not is_finite(tensor):
                warnings.warn(f"{name!r} holds NaN or infinity, kept as it is", ConversionWarning, stacklevel=2)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            advance(tensor.nbytes)
