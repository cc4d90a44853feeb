"""Checkpoints as trainers leave them: a state dict among other things, a prefix before its keys, buffers beside it.

{"state_dict": {"model.image_encoder. …"}, "epoch": 3}      Lightning
{"model_state": {"sam.image_encoder. …"}, "init": {…}}      torch-em, micro-sam
{"model": {"module.image_encoder. …"}, "optimizer": {…}}    MedSAM and others
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch

from .errors import ConversionError, ConversionWarning

# The parts of every SAM, after the shortest path that leads to one of them.
_PARTS = "image_encoder|vision_encoder|prompt_encoder|mask_decoder|shared_image_embedding"
_KEY = re.compile(rf"((?:\w+\.)*?)(?:{_PARTS})\.")

# Meta's model can keep these buffers with its weights; the image processor's settings say the same.
PIXELS = {"pixel_mean": (123.675, 116.28, 103.53), "pixel_std": (58.395, 57.12, 57.375)}


def nested_state_dict(loaded, source):
    """The one mapping from names to tensors inside `loaded`, of a SAM if there are others; `loaded` if there is none.

    Raises:
        ConversionError: if there are two.
    """
    found = dict(_state_dicts(loaded))
    sams = {path: state for path, state in found.items() if any(_KEY.match(name) for name in state)}
    candidates = sams or found
    if len(candidates) > 1:
        raise ConversionError(
            f"{source} holds {len(candidates)} state dicts, {', '.join(candidates)}; save the one that is meant alone"
        )
    for path, state in candidates.items():
        if path:
            beside = sorted(str(key) for key in loaded if key != path.split(".")[0])
            _say(f"{source}: took {path!r}" + (f", left out {_list(beside)}" if beside else ""))
        return state
    return loaded


def _state_dicts(loaded, path: str = "", depth: int = 3) -> Iterator[tuple[str, Mapping]]:
    """Where the mappings from names to tensors are; optimizers' are not, because their keys are numbers."""
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(key, str) for key in loaded):
        return
    if any(isinstance(value, torch.Tensor) for value in loaded.values()):
        yield path, loaded
    elif depth:
        for key, value in loaded.items():
            yield from _state_dicts(value, f"{path}.{key}" if path else key, depth - 1)


def bare_names(names: Iterable[str], source) -> dict[str, str]:
    """Name without its trainer's prefix -> name in the file, for what belongs to the model. Says what it did.

    Raises:
        ConversionError: if parts of a SAM come under two prefixes.
    """
    names = list(names)
    prefixes = {match[1] for name in names if (match := _KEY.match(name))}
    prefixes.discard("base_model.model.")  # a PEFT adapter, which is refused by that name
    if len(prefixes) > 1:
        raise ConversionError(
            f"{source} holds {len(prefixes)} models, under {_list(sorted(prefixes))}; save the one that is meant alone"
        )
    prefix = prefixes.pop() if prefixes else ""
    bare = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    dropped = [name for name in names if not name.startswith(prefix)]
    if prefix:
        _say(f"{source}: took the keys under {prefix!r}" + (f", left out {_list(dropped)}" if dropped else ""))
    return bare


def without_pixel_buffers(bare: dict[str, str], tensors: Mapping[str, torch.Tensor], source) -> dict[str, str]:
    """The names without pixel_mean and pixel_std. Says so, and what to do where they are not SAM's."""
    for name in PIXELS.keys() & bare.keys():
        given = [round(value, 3) for value in tensors[bare[name]].flatten().tolist()]
        setting = f"image_{name.removeprefix('pixel_')}"
        other = f"; it is {given}, not SAM's: write it, divided by 255, as {setting} into preprocessor_config.json"
        _say(f"{source}: left out {name!r}" + ("" if given == list(PIXELS[name]) else other))
    return {name: key for name, key in bare.items() if name not in PIXELS}


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _say(message: str) -> None:
    warnings.warn(message, ConversionWarning, stacklevel=2)
