"""Ragged examples to one batch for the model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..modeling_sam_split import VOID_LABEL
from .checks import PADDING_POINT, check_batch
from .prompts import boxes_around


class SamSplitCollator:
    """Images of any size, each with any number of objects, to one batch for `SamSplitModel`.

    An example is a dict: `image`, a PIL image or an array (height, width) or (height, width, 3) of 8 bits per channel,
    and optionally `masks` (P, height, width) in {0, 1, VOID_LABEL}, `boxes` (P, 4), `points` (a list of P arrays
    (N, 2), N may differ) and `point_labels` (P arrays (N,), 1 for foreground by default), all in pixels of the image,
    and `name` for messages. All examples of a batch have the same parts. `input_boxes` are those around the masks in a
    batch with masks but without boxes and points.

    Images of 16 bits or of floats are refused: which range of their values is black to white only their owner knows.
    transformers' Trainer needs `remove_unused_columns=False`, or it removes all parts before they arrive here.

    Args:
        processor: the model's `SamProcessor`, or its image processor.
    """

    def __init__(self, processor: Any):
        self.image_processor = getattr(processor, "image_processor", processor)
        if not callable(self.image_processor):
            raise TypeError(
                f"processor must be a SamProcessor or its image processor, got {type(processor).__name__}; load one "
                "with SamProcessor.from_pretrained"
            )

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch: `pixel_values` and, as far as given, `labels`, `input_boxes`, `input_points` and `input_labels`.

        Labels are (B, P, height, width) int8 like `pixel_values`, and void where an image was padded. Prompts that an
        image has fewer than others are padding: void labels, box 0, points labelled -10.

        Raises:
            TypeError, ValueError: naming the example and its part that cannot be used, and what to do.
        """
        given = check_batch(examples)
        images = [rgb_pixels(example["image"]) for example in examples]
        images = self.image_processor(images, return_tensors="pt", input_data_format="channels_last")
        batch = {"pixel_values": images["pixel_values"]}
        originals, resized = images["original_sizes"].tolist(), images["reshaped_input_sizes"].tolist()
        prompts = max(_prompts(example) for example in examples)
        if "masks" in given:
            size = batch["pixel_values"].shape[-2:]
            masks = zip((example["masks"] for example in examples), resized, strict=True)
            batch["labels"] = torch.stack([_fitted_mask(mask, to, size, prompts) for mask, to in masks])
        scales = [
            torch.tensor([new[1] / old[1], new[0] / old[0]]) for old, new in zip(originals, resized, strict=True)
        ]
        if "boxes" in given:
            boxes = [_float(e["boxes"]) * s.repeat(2) for e, s in zip(examples, scales, strict=True)]
            batch["input_boxes"] = torch.stack([_padded(box, prompts, 0) for box in boxes])
        if "points" in given:
            batch |= self._points(examples, scales, prompts)
        if "labels" in batch and not given & {"boxes", "points"}:
            batch["input_boxes"] = boxes_around(batch["labels"])
        return batch

    def _points(self, examples, scales, prompts):
        longest = max(len(points) for example in examples for points in example["points"])
        shape = len(examples), prompts, longest
        batch = {"input_points": torch.zeros(*shape, 2), "input_labels": torch.full(shape, PADDING_POINT)}
        for i, (example, scale) in enumerate(zip(examples, scales, strict=True)):
            for p, points in enumerate(example["points"]):
                labels = example.get("point_labels")
                batch["input_points"][i, p, : len(points)] = _float(points) * scale
                batch["input_labels"][i, p, : len(points)] = 1 if labels is None else _float(labels[p]).long()
        return batch


def _prompts(example):
    return next((len(example[name]) for name in ("masks", "boxes", "points") if example.get(name) is not None), 1)


def rgb_pixels(image):
    """(height, width, 3) of a PIL image or an array."""
    image = np.array(image.convert("RGB") if hasattr(image, "convert") else image)  # a copy, for PIL's is read-only
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image


def _float(values):
    return torch.from_numpy(np.asarray(values, np.float32))


def _padded(tensor, length, value):
    """Rows of `value` appended until there are `length`."""
    return torch.cat([tensor, tensor.new_full((length - len(tensor), *tensor.shape[1:]), value)])


def vanished(masks, size):
    """Numbers of the masks (P, height, width) of which no pixel is left in a model's input, (height, width)."""
    scale = min(side / old for side, old in zip(size, np.shape(masks)[1:], strict=True))
    if scale >= 1:
        return []
    resized = [max(1, int(side * scale + 0.5)) for side in np.shape(masks)[1:]]
    gone = (_fitted_mask(masks, resized, size, len(masks)) == VOID_LABEL).flatten(1).all(1)
    return gone.nonzero()[:, 0].tolist()


def _fitted_mask(mask, resized, size, prompts):
    """Labels (prompts, *size) of a mask (P, height, width) that fills `resized` of it, nearest neighbour.

    An object that has no pixel left becomes padding, for no prompt can be made of it.
    """
    mask = torch.from_numpy(np.asarray(mask).astype(np.int8).view(np.uint8))  # interpolation knows no int8
    mask = F.interpolate(mask[None], tuple(resized), mode="nearest-exact")[0].view(torch.int8)
    mask[(mask != 1).flatten(1).all(1)] = VOID_LABEL
    mask = F.pad(mask, (0, size[1] - resized[1], 0, size[0] - resized[0]), value=VOID_LABEL)
    return _padded(mask, prompts, VOID_LABEL)
