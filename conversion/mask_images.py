"""Masks as images: one per mask, a label map, an overlay; drawn from COCO's annotations of an image."""

from pathlib import Path

import numpy as np

from sam_split.training.overlays import label_map, mask_of, overlay

from .errors import ConversionError

LARGEST_LABEL = 2**16 - 1


def draw_masks(folder: Path, annotations: list[dict], pixels=None) -> None:
    """0001.png and so on, white inside and black outside, in the order of the annotations."""
    from PIL import Image

    folder.mkdir()
    for number, annotation in enumerate(annotations, start=1):
        Image.fromarray(mask_of(annotation["segmentation"])).save(folder / f"{number:04}.png")


def draw_labels(path: Path, annotations: list[dict], pixels: np.ndarray) -> None:
    """A label map as a PNG of 16 bits.

    Args:
        path: to write to.
        annotations: of the image.
        pixels: (height, width, 3), for their size.
    """
    from PIL import Image

    if len(annotations) > LARGEST_LABEL:
        raise ConversionError(f"{len(annotations)} masks are too many for a label map of 16 bits; use --format png")
    labels = label_map(annotations, pixels.shape[:2])
    Image.fromarray(labels.astype(np.uint16)).save(path, format="PNG")


def draw_overlay(path: Path, annotations: list[dict], pixels: np.ndarray) -> None:
    """The image with its masks, small ones above large ones, as a JPEG.

    Args:
        path: to write to.
        annotations: of the image.
        pixels: (height, width, 3) bytes.
    """
    from PIL import Image

    Image.fromarray(overlay(pixels, annotations)).save(path, format="JPEG", quality=92, subsampling=0)
