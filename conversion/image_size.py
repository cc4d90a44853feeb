"""The same model for another input size: its position tables resampled for the new grid of tokens.

Absolute positions are resampled bicubically, as ViTDet does, on which SAM's encoder is modelled. Relative positions of
global layers are resampled linearly, as Meta's and stock's attention do by themselves when their tables were made for
another grid. Windows keep their size, so windowed layers keep their tables.
"""

import re
import warnings

import torch
from torch.nn.functional import interpolate

from .errors import ConversionError, ConversionWarning
from .folder import SAM_PROCESSOR, sized_processor, split_config
from .sources import Checkpoint
from .tensors import Spec, Tensors

MAX_SIDE = 2**13  # pixels; its grid of tokens is already too large for attention in one machine


def parse_image_size(text: str) -> int | tuple[int, int]:
    """An image size in pixels: "1024", or "768x1024" with the height first."""
    if not re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})?", text.lower()):
        raise ConversionError(f"--image-size {text!r}: expected pixels as N or HEIGHTxWIDTH, such as 512 or 768x1024")
    sides = [int(side) for side in text.lower().split("x")]
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def resize(checkpoint: Checkpoint, config, tensors: Tensors, image_size: int | tuple[int, int]):
    """Config and tensors for another input size; the checkpoint's processor settings follow. Says what it did.

    Raises:
        ConversionError: if a side is not a multiple of the patch.
    """
    vision = config.vision_config
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    given, patch = "x".join(map(str, dict.fromkeys(sides))), vision.patch_size
    if not all(0 < side <= MAX_SIDE for side in sides):
        raise ConversionError(f"--image-size {given}: expected {patch} to {MAX_SIDE} pixels a side")
    if any(side % patch for side in sides):
        near = "x".join(str(max(1, round(side / patch)) * patch) for side in dict.fromkeys(sides))
        raise ConversionError(
            f"--image-size {given} is not a multiple of the patch, {patch} pixels; the nearest is {near}"
        )
    fields = {part: getattr(config, part).to_dict() for part in config.sub_configs}
    for part in ("vision_config", "prompt_encoder_config"):
        fields[part]["image_size"] = image_size
    resized_config = split_config(fields, tensors)
    resized = Resized(tensors, vision, resized_config.vision_config.grid)
    checkpoint.processor = sized_processor(checkpoint.processor or SAM_PROCESSOR, image_size, vision.patch_size)
    old, new = (" x ".join(map(str, grid)) for grid in (vision.grid, resized_config.vision_config.grid))
    message = (
        f"resized from {old} to {new} tokens: absolute positions bicubically, relative positions of layers "
        f"{resized.layers} linearly; windows stay {vision.window_size} x {vision.window_size}"
    )
    if sides[0] != sides[1]:
        message += (
            f"; SamProcessor takes images of the shape {sides[0]} x {sides[1]} or more oblong ones, and refuses others"
        )
    warnings.warn(message, ConversionWarning, stacklevel=2)
    return resized_config, resized


class Resized(Tensors):
    """`base` with its position tables resampled.

    Args:
        base: tensors under SamSplit's names.
        vision: their SamSplitVisionConfig.
        grid: the new (rows, columns) of tokens.
    """

    def __init__(self, base: Tensors, vision, grid: tuple[int, int]):
        self._base, self.specs = base, dict(base.specs)
        self.layers = [
            i for i in range(vision.num_hidden_layers) if i in vision.global_attn_indexes or not vision.window_size
        ]
        rows, columns = grid
        shapes = {"vision_encoder.pos_embed": (1, rows, columns, vision.hidden_size)}
        for layer in self.layers:
            for axis, tokens in (("h", rows), ("w", columns)):
                shapes[f"vision_encoder.layers.{layer}.attn.rel_pos_{axis}"] = (
                    2 * tokens - 1,
                    vision.hidden_size // vision.num_attention_heads,
                )
        for name in shapes.keys() & base.specs.keys():
            self.specs[name] = Spec(shapes[name], base.specs[name].dtype)

    def __getitem__(self, name):
        tensor, shape = self._base[name], self.specs[name].shape
        if tensor.shape == shape:
            return tensor
        resample = resample_absolute if name.endswith("pos_embed") else resample_relative
        return resample(tensor.double(), shape).to(tensor.dtype)


def resample_absolute(table: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """(1, rows, columns, C) to another number of rows and columns, bicubically."""
    channels_first = table.permute(0, 3, 1, 2)  # (1, C, rows, columns)
    resampled = interpolate(channels_first, size=shape[1:3], mode="bicubic", align_corners=False)
    return resampled.permute(0, 2, 3, 1)  # (1, rows, columns, C)


def resample_relative(table: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """(2 * tokens - 1, D) to another number of tokens, linearly between neighbouring offsets.

    >>> resample_relative(torch.tensor([[0.0], [1.0], [2.0]]), (5, 1)).flatten()  # 2 tokens to 3
    tensor([0.0000, 0.4000, 1.0000, 1.6000, 2.0000])
    """
    resampled = interpolate(table.T[None], size=shape[0], mode="linear", align_corners=False)  # (1, D, offsets)
    return resampled[0].T
