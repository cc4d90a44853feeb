"""A collator of the tiny model, and examples for it."""

import numpy as np
from models import IMAGE_SIZE, TINY
from transformers import SamImageProcessor

from sam_split.training import SamSplitCollator


def collator():
    side = 4 * IMAGE_SIZE // TINY["vision_config"]["patch_size"]
    return SamSplitCollator(
        SamImageProcessor(
            size={"longest_edge": IMAGE_SIZE},
            pad_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            mask_size={"longest_edge": side},
            mask_pad_size={"height": side, "width": side},
        )
    )


def example(height, width, *corners, **more):
    """An image with one rectangle (x0, y0, x1, y1), both corners inside it, for each of `corners`."""
    masks = np.zeros((len(corners), height, width), np.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, corners, strict=True):
        mask[y0 : y1 + 1, x0 : x1 + 1] = 1
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return {"image": image, "masks": masks, "name": "a.png", **more}
