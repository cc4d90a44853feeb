"""Images and the masks of their objects from COCO's annotations."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..modeling_sam_split import VOID_LABEL
from .overlays import run_lengths

FARTHEST = 2**20  # pixels; pycocotools draws every pixel of an edge, also of those outside the image


def coco_readers(folder):
    """Name -> a function that returns an image and its masks, for a folder with `images/` and `annotations.json`."""
    from PIL import Image
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(None):
            coco = COCO(folder / "annotations.json")
        images = {image["file_name"]: image["id"] for image in coco.dataset["images"]}
        for image in images:
            if ".." in Path(image).parts or Path(image).is_absolute():
                raise ValueError(f"its image {image!r} is not below images/")
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(
            f"{folder / 'annotations.json'} is not in COCO's format ({_reason(error)}); it must hold images, "
            "annotations and categories"
        ) from error

    def read(name, number):
        image = Image.open(folder / "images" / name)
        try:
            return image, _masks(coco, number, (image.height, image.width))
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"its annotations are not in COCO's format: {_reason(error)}") from error

    return {name: lambda name=name, number=number: read(name, number) for name, number in images.items()}


def _reason(error):
    """In words: a KeyError says nothing but the key."""
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _masks(coco, number, size):
    """Masks (P, *size) of an image's objects, void where a crowd is, for its members have no masks of their own.

    Polygons are cut off at the image's edges; an object that leaves no pixel inside is left out.
    """
    objects, crowd = [], np.zeros(size, bool)
    for annotation in coco.loadAnns(coco.getAnnIds(number)):
        _check_segmentation(annotation)
        mask = coco.annToMask(annotation).astype(np.int8)
        if mask.shape != size:
            raise ValueError(f"annotations.json says that its (height, width) is {mask.shape}, but it is {size}")
        if annotation.get("iscrowd"):
            crowd |= mask > 0
        elif mask.any():
            objects.append(mask)
    masks = np.stack(objects) if objects else np.zeros((0, *size), np.int8)
    masks[:, crowd] = np.where(masks[:, crowd] == 1, 1, VOID_LABEL)
    return masks


def _check_segmentation(annotation):
    """Raise for what pycocotools reads as something else, or crashes on."""
    segmentation, name = annotation.get("segmentation"), f"annotation {annotation['id']}"
    if not segmentation:
        raise ValueError(f"{name} has no segmentation; masks are needed, boxes do not do")
    if isinstance(segmentation, Mapping):
        height, width = segmentation["size"]
        counts = segmentation["counts"]
        lengths = run_lengths(counts) if isinstance(counts, str) else np.array(counts)
        if lengths.sum() != height * width or (lengths < 0).any():
            raise ValueError(f"{name} has run lengths of {lengths.sum()} pixels, but its size is {height} x {width}")
        return
    for polygon in segmentation:
        try:
            points = np.array(polygon, float)
        except (ValueError, TypeError):
            raise ValueError(f"{name} has a polygon of {polygon!r:.40}; expected numbers, x and y in turn") from None
        if points.ndim != 1 or len(points) < 6 or len(points) % 2:
            raise ValueError(f"{name} has a polygon of {points.size} numbers; (x, y) of at least 3 corners are needed")
        if not (np.abs(points) < FARTHEST).all():  # nor NaN
            raise ValueError(f"{name} has a polygon with a corner at {points[~(np.abs(points) < FARTHEST)][0]} pixels")
