"""Crops of a microscope's image of cell nuclei and their masks, as folders that `sam-split finetune` takes.

    pip download --no-deps stardist==0.9.2
    python examples/nuclei.py stardist-0.9.2-*.whl OUT

The image and its masks, 125 nuclei outlined by people, are data of stardist's wheel, which is read and not installed
(BSD licence; from the Data Science Bowl of 2018, Broad Bioimage Benchmark Collection BBBC038). `OUT/train` shows
the left three quarters of the image, `OUT/test` the rest; no pixel is in both.

A nucleus is about 24 pixels wide, and most are dim beside a few bright ones. So crops are small, for the model sees
them enlarged, and the square roots of the grey values are scaled to the range of most pixels.
"""

import argparse
import sys
import zipfile
from pathlib import Path

import numpy as np
from coins import save_crops
from PIL import Image

SIDE = 64  # of a crop, in pixels
BORDER = 384  # column of the image where testing begins


def brightened(image):
    """Grey values (height, width) from 0 to 255, by what is common in the part to train on."""
    low, high = np.percentile(image[:, :BORDER], [1, 99.8])  # as stardist normalises images
    return np.uint8(255 * np.sqrt(np.clip((image - low) / (high - low), 0, 1)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    try:
        with zipfile.ZipFile(args.wheel) as wheel:
            image, nuclei = (
                np.array(Image.open(wheel.open(f"stardist/data/images/{name}2d.tif"))) for name in ("img", "mask")
            )
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        sys.exit(f"{args.wheel} is not stardist's wheel: {error}; get it by pip download --no-deps stardist==0.9.2")
    train, test = range(0, BORDER, SIDE), range(BORDER, image.shape[1], SIDE)
    save_crops(brightened(image), nuclei, args.out, 40, SIDE, image.shape[0] // SIDE, train=train, test=test)


if __name__ == "__main__":
    main()
