"""Weights to disk: safetensors, one tensor in memory at a time, read back and compared with where they came from."""

import io
import json
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from .atomic import flushing
from .errors import ConversionError, ConversionWarning
from .tensors import DTYPES, PickleFiles, SafetensorsFiles, Tensors, is_finite, same_bits

MAX_SHARD_BYTES = 5 * 10**9  # transformers' default
PIECE_BYTES = 2**18

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
        write_safetensors(folder / name, tensors, members, advance)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": tensors.nbytes},
            "weight_map": {member: name for name, members in shards.items() for member in sorted(members)},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    paths = [folder / name for name in shards]
    with flushing(paths):
        check_written(SafetensorsFiles(paths), tensors, advance)


def check_written(written: Tensors, tensors: Tensors, advance: Callable[[int], None] = lambda nbytes: None) -> None:
    """Raise unless both hold the same names, each with the same shape, dtype and bits."""
    if written.specs != tensors.specs:
        raise ConversionError(
            "what was written holds other tensors than the source; is the disk or the memory failing?"
        )
    for name, spec in tensors.specs.items():
        if not _consists_of(written[name], tensors.parts(name)):
            raise ConversionError(f"{name!r} was read back with other bits; is the disk or the memory failing?")
        advance(spec.nbytes)


def _consists_of(tensor: torch.Tensor, parts: Iterable[torch.Tensor]) -> bool:
    rest = tensor.reshape(-1)
    for part in parts:
        block, rest = rest[: part.numel()], rest[part.numel() :]
        if not same_bits(block, part.reshape(-1)):
            return False
    return True


def _shards(tensors: Tensors, max_bytes: int) -> dict[str, list[str]]:
    """File name -> the tensors in it, in the order of writing."""
    # Wide types first: then each tensor starts at a multiple of its element size.
    order = sorted(tensors.specs, key=lambda name: -tensors.specs[name].dtype.itemsize)
    groups: list[list[str]] = [[]]
    size = 0
    for name in order:
        nbytes = tensors.specs[name].nbytes
        if groups[-1] and size + nbytes > max_bytes:
            groups, size = [*groups, []], 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def write_safetensors(
    path: Path, tensors: Tensors, names: list[str], advance: Callable[[int], None] = lambda nbytes: None
) -> None:
    """The format: the header's length in 8 bytes, a JSON header, then the tensors' bytes one after the other."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
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
            file.writelines(_pieces(tensors, name))
            advance(tensors.specs[name].nbytes)


def write_pth(path: Path, tensors: Tensors, advance: Callable[[int], None] = lambda nbytes: None) -> None:
    """Write the state dict as torch.save does, but one tensor in memory at a time, and check every bit.

    The file is a zip: a pickle that says which storage each tensor lies in, then one entry for each storage.
    """
    content = io.BytesIO()
    _StateDictPickler(content, protocol=2).dump(
        OrderedDict((name, _Stored(str(key), spec)) for key, (name, spec) in enumerate(tensors.specs.items()))
    )
    with zipfile.ZipFile(path, "x", allowZip64=True) as file:
        file.writestr("archive/data.pkl", content.getvalue())
        file.writestr("archive/byteorder", "little")
        for key, name in enumerate(tensors.specs):
            entry = zipfile.ZipInfo(f"archive/data/{key}")
            entry.extra = _padding(file.fp.tell(), entry)
            with file.open(entry, "w", force_zip64=True) as storage:
                storage.writelines(_pieces(tensors, name))
            advance(tensors.specs[name].nbytes)
        file.writestr("archive/version", "3\n")
    with flushing([path]):
        check_written(PickleFiles([path]), tensors, advance)


def _padding(offset: int, entry: zipfile.ZipInfo) -> bytes:
    """An extra field that puts the entry's data at a multiple of 64 bytes: it can be used where it is mapped."""
    before = offset + 30 + len(entry.filename) + 20  # the entry's fixed header, its name, the field with 64-bit sizes
    filler = -(before + 4) % 64
    return struct.pack("<2sH", b"FB", filler) + b"\0" * filler


class _Stored:
    """Stands for a tensor in a pickle: its storage's key, and its shape and dtype."""

    def __init__(self, key, spec):
        self.key, self.spec = key, spec

    def __reduce_ex__(self, protocol):
        stride = torch.empty(self.spec.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (_Storage(self), 0, self.spec.shape, stride, False, OrderedDict())


class _Storage:
    def __init__(self, stored):
        elements = stored.spec.nbytes // stored.spec.dtype.itemsize
        self.id = ("storage", _STORAGE_TYPES[stored.spec.dtype], stored.key, "cpu", elements)


class _StateDictPickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.id if isinstance(value, _Storage) else None


_STORAGE_TYPES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


def _pieces(tensors: Tensors, name: str) -> Iterator[memoryview]:
    """A tensor's bytes, in small pieces.

    For a large one Linux takes large pages, which a virtual machine may first have to ask its host for; a small one
    is still in the processor's cache when it is copied after its checksum.
    """
    for part in tensors.parts(name):
        if not is_finite(part):
            warnings.warn(f"{name!r} holds NaN or infinity, kept as it is", ConversionWarning, stacklevel=2)
        content = part.contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(content), PIECE_BYTES):
            yield content[start : start + PIECE_BYTES]
