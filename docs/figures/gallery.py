"""Held-out images and their masks, by a base and with an adapter: the pictures of `gallery.md`.

    python docs/figures/gallery.py BASE ADAPTER DATA OUT.jpg

BASE is what `sam-split convert` made, DATA as for `sam-split evaluate`. The images are not chosen by hand: their IoU
from one click gained the least, the median and the most.
"""

import argparse

import numpy as np
import torch
from matplotlib.figure import Figure
from peft import PeftModel
from transformers import AutoModel, AutoProcessor

from sam_split.training import evaluate, find_examples
from sam_split.training.collator import rgb_pixels
from sam_split.training.overlays import distinct_colours, overlay
from sam_split.training.recall import object_entry
from sam_split.training.scores import deepest_points

COLUMNS = ("one click each", "base", "adapted", "marked in the data", "everything, base", "everything, adapted")


@torch.no_grad()
def masks_of_clicks(model, processor, pixels, clicks):
    """The mask of each click that the model thinks best, as `object_entry` has it."""
    inputs = processor(pixels, input_points=[[[click] for click in clicks]], return_tensors="pt")
    outputs = model(**inputs)
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    masks = processor.post_process_masks(outputs.pred_masks, *sizes)[0]  # (clicks, 3, height, width)
    best = outputs.iou_scores[0].argmax(-1)
    return [object_entry(masks[click, index].numpy()) for click, index in enumerate(best.tolist())]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("base", "adapter", "data", "out"):
        parser.add_argument(name)
    args = parser.parse_args()
    examples, processor = find_examples(args.data), AutoProcessor.from_pretrained(args.base)
    model = PeftModel.from_pretrained(
        AutoModel.from_pretrained(args.base, trust_remote_code=True), args.adapter
    ).eval()
    with model.disable_adapter():
        before = evaluate(model, processor, examples)
    after = evaluate(model, processor, examples)

    gains = [b["iou_1_click"] - a["iou_1_click"] for a, b in zip(before.images, after.images, strict=True)]
    order = np.argsort(gains, kind="stable")
    rows = {"least": order[0], "median": order[len(order) // 2], "most": order[-1]}
    figure = Figure(figsize=(2.1 * len(COLUMNS), 2.25 * len(rows)), layout="constrained")
    for axes, (title, index) in zip(figure.subplots(len(rows), len(COLUMNS)), rows.items(), strict=True):
        pixels, objects = rgb_pixels(examples[index]["image"]), before.masks[index]["objects"]
        colours = distinct_colours(objects)
        clicks = deepest_points(torch.from_numpy(np.asarray(examples[index]["masks"]) == 1)[None])[0][0].tolist()
        adapted = masks_of_clicks(model, processor, pixels, clicks)
        with model.disable_adapter():
            plain = masks_of_clicks(model, processor, pixels, clicks)
        everything = (evaluation.masks[index]["everything"] for evaluation in (before, after))
        drawn = [pixels, *(overlay(pixels, masks, colours) for masks in (plain, adapted, objects))]
        drawn += [overlay(pixels, masks) for masks in everything]
        for axis, picture in zip(axes, drawn, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
        axes[0].plot(*zip(*clicks, strict=True), "o", color="white", markeredgecolor="black", markersize=6)
        axes[0].set_ylabel(f"{title} gain: {gains[index]:+.2f}")
        for axis, evaluation in zip(axes[1:3], (before, after), strict=True):
            axis.set_xlabel(f"IoU {evaluation.images[index]['iou_1_click']:.2f}")
        if index == order[0]:
            for axis, column in zip(axes, COLUMNS, strict=True):
                axis.set_title(column, fontsize=11)
    figure.savefig(args.out, dpi=100)


if __name__ == "__main__":
    main()
