"""Images and the masks of their objects, from a folder, from COCO's annotations or from a Hugging Face dataset."""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checks import check_example
from .coco import coco_readers
from .collator import vanished

MASK_SUFFIXES = ".png", ".tif", ".tiff"


class Examples(Sequence[dict[str, Any]]):
    """Examples as `SamSplitCollator` takes them, each read when it is asked for.

    Args:
        readers: name -> a function that returns an image (PIL) and its masks (P, height, width).
        digests: name -> SHA-256 of name, image and masks, as far as they have been read.
    """

    def __init__(self, readers: Mapping[str, Callable[[], tuple[Any, Any]]], digests: Mapping[str, str] | None = None):
        self.readers, self.digests = dict(readers), dict(digests or {})
        self.names = list(self.readers)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]  # no slices
        name = self.names[index]
        try:
            image, masks = self.readers[name]()
            example = {"name": name, "image": image, "masks": masks}
            check_example(example, name)
            image.load()  # PIL decodes a file when it is first used
        except (OSError, ValueError, TypeError, SyntaxError) as error:  # PIL has three ways to refuse a file
            raise ValueError(f"{name}: {error}; correct or remove it, or pass --skip-bad") from error
        return example

    def usable(self, skip_bad: bool = False, size: Sequence[int] | None = None) -> "Examples":
        """These examples once each has been read; those that cannot be used raise ValueError or are left out.

        Args:
            skip_bad: whether to leave them out.
            size: (height, width) of a model's input: objects that vanish there cannot be used; None if all can.
        """
        kept, digests, in_pieces = {}, {}, 0
        for index, name in enumerate(self.names):
            try:
                example = self[index]
                if size is not None:
                    _check_prompts(example["masks"], name, size)
                digests[name] = _digest(**example)
                in_pieces += _is_in_pieces(example["masks"])
                kept[name] = self.readers[name]
            except ValueError as error:
                if not skip_bad:
                    raise
                print(f"skipped {error}", file=sys.stderr)
        if not kept:
            raise ValueError("no image can be used; add images" + ", or mend what is named above" * bool(self.names))
        if 2 * in_pieces > len(kept):
            print(
                f"{in_pieces} of {len(kept)} images have one object each, in pieces that do not touch; if every piece "
                "is an object, number them: scipy.ndimage.label(mask)[0]",
                file=sys.stderr,
            )
        return Examples(kept, digests)

    def digest(self) -> str:
        """SHA-256 of the names, images and masks of all examples, which `usable` has read."""
        return hashlib.sha256("".join(self.digests[name] for name in self.names).encode()).hexdigest()

    def held_out(self, share: float, seed: int = 0) -> "tuple[Examples, Examples]":
        """These examples without some, and some: about `share` of all, sampled by `seed`, one at least."""
        if len(self) < 2:
            raise ValueError(
                f"at least two images are needed, one of them to test on, got {len(self)}; "
                "add images, or name those to test on with --val"
            )
        order = np.random.default_rng(seed).permutation(len(self))
        chosen = {self.names[i] for i in order[: max(1, round(share * len(self)))]}
        kept, out = (
            {name: reader for name, reader in self.readers.items() if (name in chosen) == of_chosen}
            for of_chosen in (False, True)
        )
        return Examples(kept, self.digests), Examples(out, self.digests)


def _check_prompts(masks, name, size):
    if gone := vanished(masks, size):
        raise ValueError(
            f"{name}: no prompt can be made for masks {gone}, which have no pixel left at the model's {size[0]} x "
            f"{size[1]}; cut the image into smaller ones, leave these objects out, or pass --skip-bad"
        )


def _is_in_pieces(masks):
    """Whether the only object of an image is in several pieces, as all objects of a mask of 0 and 255 are."""
    from scipy import ndimage

    return len(masks) == 1 and ndimage.label(masks[0] == 1, np.ones((3, 3)))[1] > 1


def _digest(name, image, masks):
    shapes = f"{name}\0{image.mode}\0{image.size}\0{masks.shape}\0"
    return hashlib.sha256(shapes.encode() + image.tobytes() + masks.astype(np.int8).tobytes()).hexdigest()


def find_examples(
    source: str | Path, split: str = "train", image_column: str = "image", mask_column: str = "mask"
) -> Examples:
    """The examples of a folder or a Hugging Face dataset.

    Args:
        source: a folder with `images/NAME.png` (or .jpg) and `masks/NAME.png` (or .tif; 8 or 16 bits), 0 for
            background, another value per object; a folder with `images/` and COCO's `annotations.json` (polygons or
            run lengths; crowds are void); or a saved dataset or the Hub id of one, with columns of images and of such
            masks.
        split, image_column, mask_column: of a dataset.

    Raises:
        ValueError: if it is none of these.
    """
    folder = Path(source)
    if (folder / "annotations.json").is_file():
        return Examples(coco_readers(folder))
    if (folder / "images").is_dir():
        return Examples(_folder_readers(folder))
    return Examples(_dataset_readers(str(source), split, image_column, mask_column))


def object_masks(instances: Any, size: Sequence[int] | None = None) -> np.ndarray:
    """Masks (P, height, width) of a map in which 0 is background and every other value one object.

    Args:
        instances: (height, width), whole numbers.
        size: (width, height) of its image, if it is to be compared.

    Raises:
        ValueError: if it has another shape or size, or other numbers.
    """
    instances = np.asarray(instances)
    if instances.ndim != 2:
        raise ValueError(f"a mask must have one channel, got shape {instances.shape}; save it in mode L or I;16")
    if instances.dtype.kind == "f" and not np.array_equal(instances, np.round(instances)):  # nor NaN
        raise ValueError("a mask must hold whole numbers, 0 and one for each object; save it in mode L or I;16")
    if size is not None and instances.shape[::-1] != tuple(size):
        width, height = instances.shape[::-1]
        raise ValueError(f"its mask is {width} x {height} pixels, and the image {size[0]} x {size[1]}")
    values = np.unique(instances)
    return (instances == values[values > 0][:, None, None]).view(np.int8)


def _folder_readers(folder):
    from PIL import Image

    if not (folder / "masks").is_dir():
        raise ValueError(
            f"{folder} holds no folder masks/; put a mask there for each image, or COCO's annotations.json"
        )
    found = sorted((folder / "masks").iterdir(), reverse=True)  # of two for one image the .png counts
    masks = {path.stem: path for path in found if path.suffix.lower() in MASK_SUFFIXES}
    images: dict[str, Path] = {}
    for path in sorted((folder / "images").glob("[!.]*")):
        if path.stem not in masks:
            where = folder / "masks" / path.stem
            raise ValueError(f"{path} has no mask {where}.png (nor .tif, .tiff); add it, or take the image away")
        if path.stem in images:
            raise ValueError(f"{images[path.stem]} and {path} have one mask, {masks[path.stem]}; rename one of them")
        images[path.stem] = path

    def read(path):
        image = Image.open(path)
        return image, object_masks(Image.open(masks[path.stem]), image.size)

    return {path.name: lambda path=path: read(path) for path in images.values()}


def _dataset_readers(source, split, image_column, mask_column):
    data = _dataset(source, split)
    for column in (image_column, mask_column):
        if column not in data.column_names:
            raise ValueError(f"{source} has no column {column!r}; it has {', '.join(data.column_names)}")

    def read(index):
        row = data[index]
        return row[image_column], object_masks(row[mask_column], getattr(row[image_column], "size", None))

    return {f"row {index}": lambda index=index: read(index) for index in range(len(data))}


def _dataset(source, split):
    import datasets

    folder = Path(source)
    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or source.count("/") > 1:
            raise ValueError(
                f"{source} is not a folder; name a folder with images/ and masks/, or a dataset on the Hub"
            )
        try:
            return datasets.load_dataset(source, split=split)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{source} is neither a folder nor a dataset that the Hub gives: {reason}") from error
    if not list(folder.glob("dataset_*.json")):
        raise ValueError(
            f"{source} holds neither images/ and masks/, nor images/ and annotations.json, nor a saved dataset; "
            "`sam-split finetune --help` shows what DATA may be"
        )
    data = datasets.load_from_disk(source)
    if isinstance(data, dict):
        if split not in data:
            raise ValueError(f"{source} has no split {split!r}; name one with --split: {', '.join(data)}")
        data = data[split]
    return data
