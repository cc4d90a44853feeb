"""Reading what torch.save wrote, without running anything in it."""

import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from .errors import ConversionError
from .tensors import DTYPES, InMemory
from .trainers import nested_state_dict


def read_pickles(paths: Iterable[Path]) -> InMemory:
    """All tensors of some files; those in torch's zip format are mapped, and read when they are used.

    Raises:
        ConversionError: if a file is damaged, holds code, or holds anything but one state dict.
    """
    state: dict[str, torch.Tensor] = {}
    for path in paths:
        for name, tensor in _state_dict(_load(path), path).items():
            if name in state:
                raise ConversionError(
                    f"{name!r} is in {path.name} and in another file as well; remove the file that does not belong"
                )
            state[name] = tensor
    return InMemory(state)


def _load(path: Path):
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # files from before torch 1.6 cannot be mapped
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} holds more than tensors, or is damaged: {_gist(error)}. Its code was not run; if you trust the "
            "file, load it yourself and save its state_dict()"
        ) from error
    except OSError:
        raise
    except Exception as error:  # damaged pickles and zip files raise whatever their reader trips over
        raise ConversionError(f"{path} is not a whole file of torch.save ({_gist(error)}); fetch it again") from error


def _gist(error: Exception) -> str:
    """What torch says is wrong, without its advice to load the file unsafely."""
    text = re.sub(r"\x1b\[\d*m", "", str(error))  # torch prints some of it in bold
    if named := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it names {named[1]}, which is no tensor"
    reason = re.search(r"WeightsUnpickler error:\s*(\S[^\n]*)", text)
    line = reason[1] if reason else next(iter(text.splitlines()), "") or type(error).__name__
    return line.rstrip(". ")[:160]


def _state_dict(loaded, path: Path) -> dict[str, torch.Tensor]:
    loaded = nested_state_dict(loaded, path)
    if not isinstance(loaded, Mapping) or not loaded:
        raise ConversionError(
            f"{path} holds a {type(loaded).__name__}, expected a state dict: names and their tensors"
        )
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ConversionError(f"{path}: {name!r} is a {type(tensor).__name__}, expected a state dict of tensors")
    return {name: tensor.detach() for name, tensor in loaded.items()}


def check_dense(tensors: Mapping[str, torch.Tensor], source) -> None:
    """Raise unless each tensor is of floating-point numbers, and all of them are in the file."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype not in DTYPES.values() or tensor.device.type != "cpu":
            raise ConversionError(
                f"{source}: {name!r} is {tensor.dtype}, {tensor.layout}, on {tensor.device.type}; expected dense "
                f"weights in one of {', '.join(DTYPES)}"
            )
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ConversionError(
                f"{source}: {name!r} of shape {tuple(tensor.shape)} is larger than what is stored; save it again"
            )


def with_own_storage(state: Mapping[str, torch.Tensor]) -> InMemory:
    """Tensors that share their memory get their own: safetensors would refuse to write them."""
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in state.values())
    return InMemory(
        {
            name: tensor if users[tensor.untyped_storage().data_ptr()] == 1 else tensor.clone()
            for name, tensor in state.items()
        }
    )


def read_weights(path: Path) -> InMemory:
    """All tensors of one file, each checked and in memory of its own."""
    state = read_pickles([path])
    check_dense(state, path)
    return with_own_storage(state)
