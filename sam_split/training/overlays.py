"""Masks over an image, from COCO's run lengths: each tinted and outlined, small ones above large ones."""

from typing import Any

import numpy as np

# Okabe and Ito's colours, which people with every kind of colour vision tell apart; without the black.
COLOURS = np.array(
    [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)]
)
TINT = 0.55  # share of the colour inside a mask
LEAST_SIDE = 800  # pixels; overlays of smaller images are drawn larger


def mask_of(segmentation: dict[str, Any]) -> np.ndarray:
    """COCO's compressed run lengths as a (height, width) bool mask."""
    height, width = segmentation["size"]
    counts = run_lengths(segmentation["counts"])
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def run_lengths(compressed: str) -> np.ndarray:
    """The numbers of pixels outside and inside in turn, in column-major order, from COCO's string of them."""
    digits = np.frombuffer(compressed.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    is_last = digits & 32 == 0  # of its number
    starts = np.flatnonzero(np.concatenate([[True], is_last[:-1]]))
    place = np.arange(len(digits)) - np.repeat(starts, np.diff(np.append(starts, len(digits))))
    values = np.add.reduceat((digits & 31) << (5 * place), starts)
    negative = digits[is_last] & 16 != 0
    values -= negative * (1 << (5 * (place[is_last] + 1)))
    # From the fourth on, numbers are differences to the last but one.
    values[1::2], values[2::2] = values[1::2].cumsum(), values[2::2].cumsum()
    return values


def label_map(annotations: list[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """(height, width): 0 where no mask is, else the number, from 1, of the smallest mask there."""
    labels = np.zeros(size, dtype=np.int32)
    for index in sorted(range(len(annotations)), key=lambda index: -annotations[index]["area"]):
        labels[mask_of(annotations[index]["segmentation"])] = index + 1
    return labels


def overlay(pixels: np.ndarray, annotations: list[dict[str, Any]], colours: list[int] | None = None) -> np.ndarray:
    """The image in pale grey with its masks tinted and outlined, (height, width, 3) bytes.

    A small image is enlarged by a whole number, so that outlines are thin beside what they surround.

    Args:
        pixels: (height, width, 3) bytes.
        annotations: the masks.
        colours: index of each in `COLOURS`; None for `distinct_colours`.
    """
    labels = label_map(annotations, pixels.shape[:2])
    scale = max(1, LEAST_SIDE // max(labels.shape))
    labels, pixels = (values.repeat(scale, axis=0).repeat(scale, axis=1) for values in (labels, pixels))
    indices = np.array(distinct_colours(annotations) if colours is None else colours, dtype=int)
    colour = np.concatenate([np.zeros((1, 3)), COLOURS[indices]]).astype(np.float32)  # by label
    # Pale, because a colour over black looks like another one.
    drawn = (0.65 * pixels.mean(-1, dtype=np.float32) + 80)[..., None].repeat(3, axis=-1)
    inside = labels > 0
    drawn[inside] += TINT * (colour[labels[inside]] - drawn[inside])
    edge = _differs(labels, max(1, round(max(labels.shape) / 700)))
    drawn[edge] = np.where(inside[edge][:, None], colour[labels[edge]], 255)  # white outside
    return drawn.round().astype(np.uint8)


def _differs(labels: np.ndarray, width: int) -> np.ndarray:
    """Whether a pixel with another label lies within `width` pixels, in its row or column."""
    differs = np.zeros(labels.shape, dtype=bool)
    for step in range(1, width + 1):
        for ours, theirs in (((slice(step, None),), (slice(-step),)), ((..., slice(step, None)), (..., slice(-step)))):
            different = labels[ours] != labels[theirs]
            differs[ours] |= different
            differs[theirs] |= different
    return differs


def distinct_colours(annotations: list[dict[str, Any]]) -> list[int]:
    """The index in `COLOURS` for each mask: of the colour whose nearest use is the farthest away."""
    boxes = np.array([annotation["bbox"] for annotation in annotations]).reshape(-1, 4)
    centres = boxes[:, :2] + boxes[:, 2:] / 2
    nearest = np.empty((len(COLOURS), len(boxes)))
    nearest[:] = np.inf
    chosen = []
    for index, centre in enumerate(centres):
        colour = int(nearest[:, index].argmax())
        chosen.append(colour)
        nearest[colour] = np.minimum(nearest[colour], np.linalg.norm(centres - centre, axis=1))
    return chosen
