"""Crops of a microscope's image of cell nuclei and their masks, as folders that `sam-split finetune` takes.

    pip download --no-deps stardist==0.9.2
    python examples/nuclei.py stardist-0.9.2-*.whl OUT

The image and its masks, 125 nuclei outlined by people, are data of stardist's wheel, which is read and not installed
(BSD licence; from the Data Science Bowl of 2018, Broad Bioimage Benchmark Collection BBBC038). `OUT/train` shows
the left three quarters of the image, `OUT/test` the rest; no pixel is in both.
"""

import argparse
import sys
import zipfile
from pathlib import Path

import numpy as np
from coins import SIDE, save_crops
from PIL import Image


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
    lefts = range(0, image.shape[1], SIDE)
    save_crops(image.astype(np.uint8), nuclei, args.out, 40, train=lefts[:3], test=lefts[3:])  # grey values up to 235


if __name__ == "__main__":
    main()
