"""One evaluation for all: IoU from a box and from clicks, everything-mode's recall, and how true the predicted IoU is.

examples ──> image embedding ──> IoU from the box, 1 click, 3 clicks, and what was predicted ──┐
                 └──> everything-mode at its default thresholds ──> AR@100, recall at IoU 0.5 ─┴──> Evaluation
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn
from transformers.utils import logging

from ..mask_generation_sam_split import SamSplitMaskGenerationOptions, _crops, _decode, _result, inference
from ..run_lengths_sam_split import Axis, compressed, counts, joined, run_edges
from .collator import SamSplitCollator, rgb_pixels
from .prefix import CachedImages
from .prompts import boxes_around
from .recall import average_recall, mask_entry, object_entry
from .scores import score_prompts

# What is measured -> how tables call it, in their order.
MEASURES = {
    "iou_box": "IoU from the box",
    "iou_1_click": "IoU from 1 click",
    "iou_3_clicks": "IoU from 3 clicks",
    "average_recall": "everything-mode: AR@100",
    "recall_50": "everything-mode: objects found at IoU 0.5",
    "masks": "everything-mode: masks per image",
    "error_box": "error of the predicted IoU, box",
    "error_1_click": "error of the predicted IoU, 1 click",
    "error_3_clicks": "error of the predicted IoU, 3 clicks",
}
PIXELS_AT_ONCE = 2**25  # of masks that are resized or compared together


@dataclass
class Evaluation:
    """How good the masks of a model are.

    Args:
        means: measure (see `MEASURES`) -> its mean over all objects; `masks` over images.
        images: for each image its `name`, the number of its `objects`, and the same measures.
        masks: for each image the masks to draw, as `recall` describes them: its `objects`, those from the `box`, and
            what `everything`-mode found.
    """

    means: dict[str, float]
    images: list[dict[str, Any]]
    masks: list[dict[str, Any]] = field(repr=False)

    def __str__(self) -> str:
        return evaluation_table({"mean": self})

    def as_dict(self) -> dict[str, Any]:
        """Means and images, for a json file or a table of pandas."""
        return {"means": self.means, "images": self.images}


def evaluate(
    model: nn.Module,
    processor: Any,
    examples: Sequence[Mapping[str, Any]],
    *,
    everything: bool = True,
    progress: bool = True,
    cached: CachedImages | None = None,
) -> Evaluation:
    """Measure a model on examples with masks. It is in eval mode meanwhile, and afterwards as it was.

    Each image is encoded once.

    Args:
        model: a `SamSplitModel` or a PEFT model of one; `disable_adapter()` around the call measures the base.
        processor: the model's `SamProcessor`, or its image processor.
        examples: a sequence of dicts as for `SamSplitCollator`, each with masks; boxes and points are not used.
        everything: whether to segment everything as well, the slowest part.
        progress: whether to show a progress bar.
        cached: `CachedImages` of the examples, for a model whose first layers `drop_prefix` took away.

    Raises:
        TypeError, ValueError: naming the example that cannot be used, and what to do.
        ImportError: if pycocotools or scipy is missing; both come with the extra `train`.
    """
    if not len(examples):
        raise ValueError("examples must hold at least one example, got none; is the dataset empty?")
    collate = SamSplitCollator(processor)
    images, masks = [], []
    so_far: Counter[str] = Counter()
    bar = logging.tqdm(total=len(examples), desc="evaluate", unit="image", disable=not progress)
    with inference(model), bar:
        for index in range(len(examples)):
            example = examples[index]
            if not isinstance(example, Mapping) or example.get("masks") is None:
                raise ValueError(f"example {index} must be a dict with an image and masks to compare with")
            pixel_values = None if cached is None else cached[index]["pixel_values"][None]
            scores, found, embedding = _prompted(model, collate, example, pixel_values)
            row: dict[str, Any] = {"name": str(example.get("name", index)), "objects": len(found["objects"])}
            row |= {name: float(np.mean(values)) for name, values in scores.items()}
            if everything:
                found["everything"] = _everything(model, example["image"], embedding)
                row["masks"] = len(found["everything"])
            images.append(row)
            masks.append(found)
            so_far.update(objects=row["objects"], box=sum(scores["iou_box"]), click=sum(scores["iou_1_click"]))
            box, click = (so_far[kind] / so_far["objects"] for kind in ("box", "click"))
            bar.set_postfix_str(f"IoU from the box {box:.3f}, from 1 click {click:.3f}", refresh=False)
            bar.update()
    means = _means(images)
    if everything:
        means |= _recall(images, masks)
    for values in (means, *images):
        values |= {name: round(values[name], 6) for name in MEASURES if name in values}
    return Evaluation({name: means[name] for name in MEASURES if name in means}, images, masks)


def _prompted(model, collate, example, pixel_values=None):
    """Measure -> list of each object of an example; the masks of its objects and from their boxes; its embedding.

    Args:
        model, example: as for `evaluate`.
        collate: a `SamSplitCollator`.
        pixel_values: (1, H, W, C) of a model without its first layers; None for the example's own.
    """
    given = {name: example[name] for name in ("image", "name") if name in example}
    masks, boxed, embedding = example["masks"], [], None
    measures: dict[str, list[float]] = {}
    largest = max(math.prod(np.shape(masks)[1:]), math.prod(input_size(model.config)))
    step = max(1, PIXELS_AT_ONCE // largest)
    for first in range(0, max(1, len(masks)), step):  # without any mask, the collator says so
        batch = collate([{**given, "masks": masks[first : first + step]}])
        if embedding is None:
            pixel_values = batch["pixel_values"] if pixel_values is None else pixel_values
            embedding = model.get_image_embeddings(pixel_values.to(model.device))
        labels = batch["labels"].to(model.device)
        for kind, (true, predicted) in score_prompts(model, embedding, labels).items():
            # Not a number where the smaller input left nothing of an object: it cannot be segmented.
            true = true[0].double().nan_to_num(0)
            error = (true - predicted[0].double().nan_to_num(0)).abs()
            for name, values in (f"iou_{kind}", true), (f"error_{kind}", error):
                measures.setdefault(name.replace(" ", "_"), []).extend(values.tolist())
        output = model(image_embeddings=embedding, input_boxes=boxes_around(labels), multimask_output=False)
        boxed += _at_full_size(output.pred_masks[0, :, 0], input_size(model.config), np.shape(masks)[1:])
    return measures, {"objects": [object_entry(np.asarray(mask)) for mask in masks], "box": boxed}, embedding


def _at_full_size(logits, padded, size):
    """Masks as `recall` describes them, of logits (P, h, w) scaled up to an image as its processor does.

    Args:
        logits: (P, h, w).
        padded: (height, width) of the model's input.
        size: (height, width) of the image.
    """
    scale = min(padded[0] / size[0], padded[1] / size[1])
    kept = [max(1, int(side * scale + 0.5)) for side in size]
    down, across = (Axis(*sides, logits.device) for sides in zip(logits.shape[1:], padded, kept, size, strict=True))
    edges, _ = run_edges(logits, down, across, (0, 0), size[0], threshold=0.0, offset=0.0)
    lengths = [compressed(counts(joined(mask), size)) for mask in edges]
    return [mask_entry({"size": [int(side) for side in size], "counts": string}) for string in lengths]


def _everything(model, image, embedding):
    """What `generate_masks` finds at its defaults in an image with an embedding, as `recall` describes masks."""
    options = SamSplitMaskGenerationOptions(output_masks=False, output_rle_mask="compressed")
    (crop,) = _crops(rgb_pixels(image), None, options, model.config)
    found = _decode(model, crop, embedding, options, logging.tqdm(disable=True))
    result = _result(found, crop.full_size, options)
    return [
        mask_entry(segmentation, score=score)
        for segmentation, score in zip(result["rle_mask"], result["scores"].tolist(), strict=True)
    ]


def input_size(config):
    """(height, width) of what a model takes."""
    rows, columns = config.vision_config.grid
    return config.vision_config.patch_size * rows, config.vision_config.patch_size * columns


def _means(images):
    """Means over objects; the number of masks is an image's own."""
    objects = [image["objects"] for image in images]
    return {
        name: float(np.average([image[name] for image in images], weights=None if name == "masks" else objects))
        for name in MEASURES
        if name in images[0]
    }


def _recall(images, masks):
    """The recall of all images, and each image's own in its row."""
    average, at_half, each = average_recall(
        [image["objects"] for image in masks], [image["everything"] for image in masks]
    )
    for image, own in zip(images, each.tolist(), strict=True):
        image |= dict(zip(("average_recall", "recall_50"), own, strict=True))
    return {"average_recall": average, "recall_50": at_half}


def evaluation_table(evaluations: Mapping[str, Evaluation]) -> str:
    """Name -> evaluation as a table in Markdown; of two, with what changed from the first to the second."""
    parts = list(evaluations.values())
    objects, images = sum(image["objects"] for image in parts[0].images), len(parts[0].images)
    head = [f"{images} image{'s' * (images != 1)}, {objects} object{'s' * (objects != 1)}", *evaluations]
    lines = [head, *([label, *_cells(name, parts)] for name, label in MEASURES.items() if name in parts[0].means)]
    if len(parts) == 2:
        lines[0].append("change")
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


def _cells(name, parts):
    values = [part.means[name] for part in parts]
    digits = 1 if name == "masks" else 3
    cells = [f"{value:.{digits}f}" for value in values]
    return [*cells, signed(values[1] - values[0], digits)] if len(values) == 2 else cells


def signed(change, digits=3):
    return f"{round(change, digits) + 0.0:+.{digits}f}"  # + 0.0, for there is no -0.000
