"""Crops of a photograph of coins and their masks, as folders that `sam-split finetune` takes.

    python examples/coins.py OUT

The image is `coins.png` of scikit-image's own wheel (Greek coins from Pompeii, Brooklyn Museum; no known copyright
restrictions). The masks come from its documented recipe, a watershed of the gradient from markers of sure background
and sure coins, and are as good as that: shadows at a coin's rim may belong to it. `OUT/train` shows the coins on the
left of the image, `OUT/test` those on the right; no pixel is in both.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage import data, filters, measure, segmentation

SIDE = 128  # of a crop, in pixels
BORDER = 230  # column of the image where testing begins


def coin_masks(image):
    """A map of the coins in an image (height, width): 0 is background, each coin has a number.

    Source: "Comparing edge-based and region-based segmentation" in scikit-image's gallery.
    """
    markers = np.zeros(image.shape, int)
    markers[image < 30], markers[image > 150] = 1, 2
    coins = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(image), markers) == 2)
    found = measure.label(ndimage.binary_opening(coins, iterations=2))
    return found * np.isin(found, [region.label for region in measure.regionprops(found) if region.area >= 300])


def save_crops(image, objects, out, smallest, side=SIDE, rows=5, **columns):
    """Rows of square crops as `out`/PART/images and masks, without objects of fewer than `smallest` pixels.

    Args:
        image: (height, width), uint8.
        objects: (height, width), 0 for background, another number for each object.
        columns: PART -> the left edges of its crops.
    """
    for part, lefts in columns.items():
        for kind in ("images", "masks"):
            (out / part / kind).mkdir(parents=True)
        for y in np.linspace(0, image.shape[0] - side, rows).astype(int):
            for x in lefts:
                crop = np.s_[y : y + side, x : x + side]
                values, areas = np.unique(objects[crop], return_counts=True)
                large = values[(values > 0) & (areas >= smallest)]
                mask = sum(np.uint8(number) * (objects[crop] == value) for number, value in enumerate(large, start=1))
                Image.fromarray(image[crop]).save(out / part / "images" / f"{y:03d}-{x:03d}.png")
                Image.fromarray(mask).save(out / part / "masks" / f"{y:03d}-{x:03d}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    image = data.coins()
    train = np.linspace(0, BORDER - SIDE, 4).astype(int)
    test = np.linspace(BORDER, image.shape[1] - SIDE, 2).astype(int)
    save_crops(image, coin_masks(image), parser.parse_args().out, 200, train=train, test=test)


if __name__ == "__main__":
    main()
