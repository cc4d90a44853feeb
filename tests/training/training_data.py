"""A collator of the tiny model, examples for it, folders of images and masks, and the scripts in `examples`."""

import importlib.util
from pathlib import Path

import numpy as np
from models import IMAGE_SIZE, TINY
from PIL import Image
from transformers import SamImageProcessor

from sam_split.training import SamSplitCollator

EXAMPLES = Path(__file__).parents[2] / "examples"


def script(name):
    """A script of `examples` as a module."""
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), EXAMPLES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def image_folder(folder, number=4, size=(40, 60)):
    """`images/` of noise and `masks/` with two rectangles each, (height, width) in `size`."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    height, width = size
    for i in range(number):
        image = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        mask = np.zeros(size, np.uint8)
        mask[height // 8 : height // 2, width // 8 : width // 2] = 1
        mask[5 * height // 8 : -2, width // 2 : -4 - i] = 255
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    return folder
