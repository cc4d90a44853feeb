"""Crops of a photograph and masks of its coins, as a folder that `sam-split finetune` takes.

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
BORDER = 230  # column of the photograph where testing begins


def coin_masks(image):
    """A map of the coins in an image (height, width): 0 is background, each coin has a number.

    Source: "Comparing edge-based and region-based segmentation" in scikit-image's gallery.
    """
    markers = np.zeros(image.shape, int)
    markers[image < 30], markers[image > 150] = 1, 2
    coins = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(image), markers) == 2)
    found = measure.label(ndimage.binary_opening(coins, iterations=2))
    return found * np.isin(found, [region.label for region in measure.regionprops(found) if region.area >= 300])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    image = data.coins()
    coins = coin_masks(image)
    rows = np.linspace(0, image.shape[0] - SIDE, 5).astype(int)
    for part, first, last, number in (("train", 0, BORDER, 4), ("test", BORDER, image.shape[1], 2)):
        for kind in ("images", "masks"):
            (out / part / kind).mkdir(parents=True)
        for y in rows:
            for x in np.linspace(first, last - SIDE, number).astype(int):
                crop = np.s_[y : y + SIDE, x : x + SIDE]
                mask = coins[crop]
                large = [value for value in np.unique(mask) if value and (mask == value).sum() >= 200]
                mask = sum(np.uint8(number) * (mask == value) for number, value in enumerate(large, start=1))
                Image.fromarray(image[crop]).save(out / part / "images" / f"{y:03d}-{x:03d}.png")
                Image.fromarray(mask).save(out / part / "masks" / f"{y:03d}-{x:03d}.png")


if __name__ == "__main__":
    main()
