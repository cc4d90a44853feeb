"""Tensors that stay on disk until one is asked for: read from files, renamed, cut and fused on the way.

`specs` says each tensor's shape and dtype without reading it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .errors import ConversionError
from .key_map import Origin

# The floating-point types of released checkpoints, under safetensors' names.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def check_finite(name: str, tensors: Iterable[torch.Tensor]) -> None:
    """Raise for an adapter's layer that holds NaN or infinity: whatever it is added to would be of no use."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise ConversionError(f"the adapter's {name} holds values that are not finite; train it again")


class Tensors(Mapping):
    """Name -> tensor, each read when it is asked for; `specs` has the same names."""

    specs: dict[str, Spec]

    def __getitem__(self, name: str) -> torch.Tensor:
        raise NotImplementedError

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


class SafetensorsFiles(Tensors):
    """All tensors of some safetensors files, of which one at a time is open.

    Raises:
        ConversionError: if a file is truncated, or its header is not true to the file, or a name occurs twice.
    """

    def __init__(self, paths: list[Path]):
        self.specs, self._opened, self._opened_path = {}, None, None
        self._paths: dict[str, Path] = {}
        for path in paths:
            file = self._open(path)
            for name in file.keys():
                if name in self.specs:
                    raise ConversionError(
                        f"{name!r} is both in {self._paths[name].name} and in {path.name}; remove one of them"
                    )
                shape, dtype = tuple(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype()
                if dtype not in DTYPES:
                    raise ConversionError(f"{path}: {name!r} is {dtype}, expected one of {', '.join(DTYPES)}")
                self.specs[name], self._paths[name] = Spec(shape, DTYPES[dtype]), path

    def __getitem__(self, name):
        return self._open(self._paths[name]).get_tensor(name)

    def _open(self, path):
        if path != self._opened_path:
            try:
                self._opened, self._opened_path = safe_open(path, framework="pt"), path
            except SafetensorError as error:
                raise ConversionError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
        return self._opened


class Renamed(Tensors):
    """`base` under other names, blocks of rows cut out or stacked: what a `key_map.plan` says."""

    def __init__(self, base: Tensors, origins: Mapping[str, Origin]):
        self._base, self._origins = base, origins
        self.specs, shapes = {}, base.shapes
        order = {name: number for number, name in enumerate(base)}  # one file after the other
        for name, origin in sorted(origins.items(), key=lambda item: order[item[1].sources[0]]):
            dtypes = {base.specs[source].dtype for source in origin.sources}
            if len(dtypes) > 1:
                raise ConversionError(f"{', '.join(origin.sources)} must have one dtype to be fused, got {dtypes}")
            self.specs[name] = Spec(origin.shape(shapes), dtypes.pop())

    def __getitem__(self, name):
        return self._origins[name].read(self._base)


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
