"""What training refuses, in one message that says what to do: examples, batches and arguments."""

import difflib
from collections.abc import Mapping

import numpy as np

from ..checks_sam_split import InputCheck, check_values
from ..modeling_sam_split import VOID_LABEL

PADDING_POINT = -10  # the label of points that fill up a batch
PARTS = ("image", "masks", "boxes", "points", "point_labels", "name")  # of an example
LABELS = {1: "object", 0: "background", VOID_LABEL: "void"}


def check_batch(examples):
    """The parts that every example has, checked one by one and against each other."""
    if not isinstance(examples, (list, tuple)):
        raise TypeError(f"examples must be a list of dicts, got {type(examples).__name__}; put a single one in a list")
    if not examples:
        raise ValueError("examples must hold at least one example, got none; is the dataset empty?")
    parts = []
    for index, example in enumerate(examples):
        name = example.get("name", index) if isinstance(example, Mapping) else index
        check_example(example, name)
        parts.append({part for part in ("masks", "boxes", "points") if example.get(part) is not None})
        if missing := parts[0] ^ parts[-1]:
            part = min(missing)
            raise ValueError(
                f"example {name!r} has {'no ' if part in parts[0] else ''}{part}, unlike the batch's first; give all "
                "examples the same parts"
            )
    return parts[0]


def check_example(example, name):
    """Raise unless an example has an image, and masks, boxes and points that fit it and each other.

    Args:
        example: as for `SamSplitCollator`.
        name: what to call it.

    Raises:
        TypeError, ValueError: naming the example and the part, what was given and what to do.
    """
    if not isinstance(example, Mapping):
        raise TypeError(f"example {name!r} must be a dict of {', '.join(PARTS)}, got {type(example).__name__}")
    for part in example:
        if part not in PARTS:
            close = difflib.get_close_matches(str(part), PARTS, 1)
            cure = f"did you mean {close[0]!r}?" if close else f"it may have {', '.join(PARTS)}; remove the rest"
            raise ValueError(f"{part!r} is no part of an example, in example {name!r}; {cure}")
    if example.get("image") is None:
        raise ValueError(
            f"example {name!r} has no image, only {', '.join(example) or 'an empty dict'}; with transformers' Trainer "
            "set remove_unused_columns=False"
        )
    height, width = _image_size(example["image"], name)
    counts = {}
    for part, shape in (("masks", "(P, height, width)"), ("boxes", "(P, 4)"), ("points", "a list of P arrays (N, 2)")):
        if example.get(part) is not None:
            if not hasattr(example[part], "__len__") or isinstance(example[part], (str, bytes, Mapping)):
                given = type(example[part]).__name__
                raise TypeError(f"{part} of example {name!r} must be {shape}, got {given}; load them as an array")
            counts[part] = len(example[part])
    if 0 in counts.values():
        raise ValueError(f"example {name!r} has no object: leave such images out")
    if example.get("masks") is not None:
        _check_masks(example["masks"], name, height, width)
    if example.get("boxes") is not None:
        _check_boxes(_array(example["boxes"], "boxes", name), name, height, width)
    if example.get("points") is not None:
        _check_points(example["points"], name, height, width)
    if example.get("point_labels") is not None:
        _check_point_labels(example, name)
    if len(set(counts.values())) > 1:
        raise ValueError(f"example {name!r} must have the same number of masks, boxes and points, got {counts}")


def _array(values, part, name):
    """Numbers as an array."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # a ragged list, a tensor of a GPU or with gradient
        raise TypeError(f"{part} of example {name!r} must be an array of numbers on the CPU: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{part} of example {name!r} must be numbers, got {array.dtype} in {type(values).__name__}")
    return array


def _image_size(image, name):
    """(height, width) of an image of 8 bits per channel."""
    if hasattr(image, "getbands"):
        if image.mode == "F" or image.mode.startswith("I"):
            raise ValueError(_range_message(f"mode {image.mode!r}", name))
        return image.height, image.width
    if isinstance(image, (str, bytes)) or hasattr(image, "__fspath__"):
        raise TypeError(f"image of example {name!r} must be a PIL image or an array, got the path {image!r}; open it")
    image = _array(image, "image", name)
    if image.dtype != np.uint8:
        raise ValueError(_range_message(str(image.dtype), name))
    if 0 in image.shape or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        cure = "; move the channels last with image.transpose(1, 2, 0)" if image.ndim == 3 and len(image) == 3 else ""
        raise ValueError(
            f"image of example {name!r} must be (height, width) or (height, width, 3), got {image.shape}{cure}"
        )
    return image.shape[:2]


def _range_message(kind, name):
    return (
        f"image of example {name!r} must have 8 bits per channel, got {kind}; choose which values are black and white "
        "and pass np.uint8(255 * ((image - black) / (white - black)).clip(0, 1))"
    )


def _check_masks(masks, name, height, width):
    masks = _array(masks, "masks", name)
    if masks.ndim != 3 or masks.shape[1:] != (height, width):
        cure = "; a map with a number per object becomes [map == i for i in np.unique(map) if i]"
        raise ValueError(
            f"masks of example {name!r} must be (P, height, width) like its image, (P, {height}, {width}), got "
            f"{masks.shape}{cure if masks.ndim == 2 else ''}"
        )
    unknown = masks[np.logical_and.reduce([masks != label for label in LABELS])]  # np.isin is slower
    if unknown.size:
        cure = "; pass masks > 0" if unknown[0] == 255 else ""
        raise ValueError(
            f"masks of example {name!r} must be 0, 1 or {VOID_LABEL} (void), got {unknown[0].item()}{cure}"
        )
    empty = np.flatnonzero((masks != 1).all((1, 2))).tolist()
    if empty:
        raise ValueError(f"masks {empty} of example {name!r} are empty: leave out what cannot be seen")


def _check_boxes(boxes, name, height, width):
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes of example {name!r} must be (P, 4), (x0, y0, x1, y1) each, got {boxes.shape}")
    x0, y0, x1, y1 = boxes.T
    good = (x0 >= 0) & (y0 >= 0) & (x1 <= width) & (y1 <= height) & (x0 <= x1) & (y0 <= y1)  # never with NaN
    if not good.all():
        first = int(np.flatnonzero(~good)[0])
        raise ValueError(
            f"box {first} of example {name!r} must be (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1 in pixels inside "
            f"its image of height {height} and width {width}, got {boxes[first].tolist()}; clip it to the image, turn "
            "COCO's (x, y, width, height) into corners"
        )


def _check_points(points, name, height, width):
    for index, group in enumerate(points):
        group = _array(group, f"points[{index}]", name)
        if group.ndim != 2 or group.shape[1] != 2 or not len(group):
            raise ValueError(
                f"points of example {name!r} must be a list of P arrays (N, 2) with N at least 1, got {group.shape} "
                f"for object {index}"
            )
        good = (group >= 0).all(1) & (group <= (width, height)).all(1)
        if not good.all():
            raise ValueError(
                f"points of example {name!r} must be (x, y) in pixels inside its image of height {height} and width "
                f"{width}, got {group[~good][0].tolist()} for object {index}; leave it out"
            )


def _check_point_labels(example, name):
    points, labels = example.get("points"), example["point_labels"]
    if points is None:
        raise ValueError(f"example {name!r} has point_labels without points; give both")
    if not hasattr(labels, "__len__") or len(labels) != len(points):
        raise ValueError(f"point_labels of example {name!r} must be {len(points)} arrays (N,), like its points")
    for index, (group, expected) in enumerate(zip(labels, points, strict=True)):
        group = _array(group, f"point_labels[{index}]", name)
        if group.shape != (len(expected),):
            raise ValueError(
                f"point_labels of example {name!r} must be ({len(expected)},) for object {index}, like its points, "
                f"got {group.shape}"
            )
        if not np.isin(group, (1, 0, -1, PADDING_POINT)).all():
            raise ValueError(
                f"point_labels of example {name!r} must be 1 (foreground), 0 (background), -1 (not a point) or "
                f"{PADDING_POINT} (padding), got {group.tolist()} for object {index}"
            )


def check_labels(labels, check=None):
    (check or InputCheck())("labels", labels, ("B", "P", "height", "width"))
    check_values("labels", labels, LABELS)


def check_logits(logits, labels):
    check = InputCheck()
    check_labels(labels, check)
    hint = "choose one mask per prompt, for example pred_masks[:, :, 0]" if getattr(logits, "ndim", 0) == 5 else ""
    check("logits", logits, ("B", "P", "h", "w"), floating=True, hint=hint)


def check_number(name, value, least, kind=(int, float)):
    """Raise unless `value` is of a kind of number and at least `least`."""
    whole = "an integer" if kind is int else "a number"
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} must be {whole} of at least {least}, got {value!r}")
    if not value >= least:  # NaN as well
        raise ValueError(f"{name} must be {whole} of at least {least}, got {value!r}")


def check_box_order(boxes):
    if boxes.isnan().any() or (boxes[..., :2] > boxes[..., 2:]).any():
        raise ValueError("boxes must be (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1, got NaN or an inverted box")


def check_size(size):
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"size must be (height, width), got {size!r}")
    for value in size:
        check_number("size, (height, width),", value, 1)


def check_layers(encoder, layers):
    check_number("layers", layers, 0, int)
    if layers > len(encoder.layers):
        raise ValueError(f"layers must be at most {len(encoder.layers)}, those of the image encoder, got {layers}")
