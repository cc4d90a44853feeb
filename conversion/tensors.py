"""Tensors that stay on disk until one is asked for: read from files, renamed, cut and fused on the way.

`specs` says each tensor's shape and dtype without reading it. Files are mapped into memory and let go again, so that
reading a whole checkpoint never holds more than the tensor at hand and `MAPPED_BYTES` of file pages.
"""

import ctypes
import math
import mmap
import pickle
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .errors import ConversionError
from .key_map import Origin

# The floating-point types of released checkpoints, under safetensors' names.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

MAPPED_BYTES = 32 * 2**20  # read from one mapping of safetensors before it is let go and made anew


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Tensors(Mapping):
    """Name -> tensor, each read when it is asked for; `specs` has the same names."""

    specs: dict[str, Spec]

    def __getitem__(self, name: str) -> torch.Tensor:
        raise NotImplementedError

    def parts(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor in blocks of rows, one after the other: what is stacked need not be in memory at once."""
        yield self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name) -> bool:
        return name in self.specs

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self.specs.items()}

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


class _Files(Tensors):
    """Tensors of files of one kind, of which one at a time is open."""

    def __init__(self, paths: list[Path]):
        self.specs, self._opened, self._opened_path = {}, None, None
        self._paths: dict[str, Path] = {}
        for path in paths:
            self._turn_to(path)
            for name, spec in self._specs_of_opened().items():
                if name in self.specs:
                    raise ConversionError(f"{name!r} is both in {self._paths[name].name} and in {path.name}")
                self.specs[name], self._paths[name] = spec, path

    def __getitem__(self, name):
        self._turn_to(self._paths[name])
        return self._read(name)

    def _turn_to(self, path):
        if path != self._opened_path:
            self._opened = None  # before the next file is opened
            self._opened, self._opened_path = self._open(path), path

    @abstractmethod
    def _open(self, path):
        """What the other two read from."""

    @abstractmethod
    def _specs_of_opened(self) -> dict[str, Spec]: ...

    @abstractmethod
    def _read(self, name) -> torch.Tensor: ...


class SafetensorsFiles(_Files):
    """All tensors of some safetensors files.

    Raises:
        ConversionError: if a file is truncated, or its header is not true to the file, or a name occurs twice.
    """

    _read_bytes = 0

    def _open(self, path):
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ConversionError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error

    def _specs_of_opened(self):
        specs = {}
        for name in self._opened.keys():
            shape, dtype = tuple(self._opened.get_slice(name).get_shape()), self._opened.get_slice(name).get_dtype()
            if dtype not in DTYPES:
                raise ConversionError(f"{self._opened_path}: {name!r} is {dtype}, expected one of {', '.join(DTYPES)}")
            specs[name] = Spec(shape, DTYPES[dtype])
        return specs

    def _read(self, name):
        self._read_bytes += self.specs[name].nbytes
        if self._read_bytes > MAPPED_BYTES:  # a new mapping gives the pages read so far back
            self._opened, self._read_bytes = self._open(self._opened_path), 0
        return self._opened.get_tensor(name)


class PickleFiles(_Files):
    """All tensors of some files written by torch.save. Nothing in them is executed.

    Files in the format from before torch 1.6 cannot be mapped: one at a time is held in memory.

    Raises:
        ConversionError: if a file is damaged, holds code, or holds anything but one state dict.
    """

    _last = None

    def _open(self, path):
        return _load_pickle(path)

    def _specs_of_opened(self):
        return {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in self._opened.items()}

    def _read(self, name):
        tensor = self._opened[name]
        if self._last is not None and self._last is not tensor and _is_zip(self._opened_path):
            _give_back(self._last)  # loading the whole pickle anew would take longer than copying it
        self._last = tensor
        return tensor


def _give_back(tensor: torch.Tensor) -> None:
    """Tell the system that the pages of a tensor in a mapped file are not needed; it reads them again if they are.

    Only for torch.load(mmap=True): any other memory would be cleared. Where there is no madvise, pages stay until the
    file is closed.
    """
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if _MADVISE is not None and first < last:
        _MADVISE(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


_MADVISE = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_DONTNEED") else None


class Renamed(Tensors):
    """`base` under other names, blocks of rows cut out or stacked: what a `key_map.plan` says."""

    def __init__(self, base: Tensors, origins: Mapping[str, Origin]):
        self._base, self._origins = base, origins
        order = {name: number for number, name in enumerate(base.specs)}
        self.specs, shapes = {}, base.shapes
        for name, origin in sorted(
            origins.items(), key=lambda item: order[item[1].sources[0]]
        ):  # as they lie in the file
            dtypes = {base.specs[source].dtype for source in origin.sources}
            if len(dtypes) > 1:
                raise ConversionError(f"{', '.join(origin.sources)} must have one dtype to be fused, got {dtypes}")
            self.specs[name] = Spec(origin.shape(shapes), dtypes.pop())

    def __getitem__(self, name):
        return self._origins[name].read(self._base)

    def parts(self, name):
        origin = self._origins[name]
        if origin.blocks > 1:
            yield self[name]
        else:
            for source in origin.sources:
                yield from self._base.parts(source)


class InMemory(Tensors):
    """A state dict that is in memory already."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors
        self.specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

    def __getitem__(self, name):
        return self._tensors[name]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits: NaN equals NaN, and 0.0 differs from -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (tensor.contiguous().reshape(-1).view(_INTEGER[tensor.dtype.itemsize]) for tensor in (a, b))
    return torch.equal(a, b)


_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; needs no memory beside the tensor."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} holds more than tensors, or is damaged: {_gist(error)}. Its code was not run; if you trust the "
            "file, load it yourself and save its state_dict()"
        ) from error
    except OSError:
        raise
    except Exception as error:  # damaged pickles and zip files raise whatever their reader trips over
        raise ConversionError(f"{path} is not a whole file of torch.save ({_gist(error)}); fetch it again") from error
    return _state_dict(loaded, path)


def _gist(error: Exception) -> str:
    """The first line of a message, without torch's advice to load the file unsafely."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line.split("Weights only load failed. ")[-1].split(" In PyTorch 2.6")[0][:160]


def _state_dict(loaded, path: Path) -> dict[str, torch.Tensor]:
    """The state dict inside what trainers save: under "model" or "state_dict", with "module." before its keys."""
    while isinstance(loaded, Mapping) and (wrapped := [w for w in ("model", "state_dict") if w in loaded]):
        loaded = loaded[wrapped[0]]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ConversionError(
            f"{path} holds a {type(loaded).__name__}, expected a state dict: names and their tensors"
        )
    for name, tensor in loaded.items():
        _check_entry(name, tensor, path)
    if all(name.startswith("module.") for name in loaded):
        loaded = {name.removeprefix("module."): tensor for name, tensor in loaded.items()}
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _check_entry(name, tensor, path: Path) -> None:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise ConversionError(f"{path}: {name!r} is a {type(tensor).__name__}, expected a state dict of tensors")
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES.values() or tensor.device.type != "cpu":
        raise ConversionError(
            f"{path}: {name!r} is {tensor.dtype}, {tensor.layout}, on {tensor.device.type}; expected dense weights in "
            f"one of {', '.join(DTYPES)}"
        )
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ConversionError(f"{path}: {name!r} of shape {tuple(tensor.shape)} is larger than what is stored for it")
