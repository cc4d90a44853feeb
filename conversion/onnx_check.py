"""Exported graphs in onnxruntime beside the model in torch: one image, and every kind of prompt."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .verification import Row, fixed_image

# Of the largest value: the float32 noise floor of ViT-B is about 1e-6.
LIMIT = 1e-4
# The least IoU of masks with those of float32.
LEAST_IOU = {"float16": 0.98, "int8": 0.9}


@dataclass(frozen=True)
class Case:
    """One kind of prompt: what the decoder's graph is fed, the earlier mask if there is one, and torch's results."""

    name: str
    feed: dict[str, Any]  # name -> numpy array
    mask: Any
    masks: torch.Tensor
    scores: torch.Tensor


@torch.no_grad()
def reference(model) -> tuple[Any, torch.Tensor, list[Case]]:
    """The image, its embedding and every kind of prompt, computed by a SamSplitModel in float32."""
    pixels = fixed_image(model.config)
    embeddings = model.get_image_embeddings(pixels)
    height, width = pixels.shape[2:]
    scale = torch.tensor([width, height], dtype=torch.float32)
    near, far = torch.tensor([0.3, 0.4]), torch.tensor([0.7, 0.6])
    points = torch.stack([near, far]) * scale  # (2, 2)
    box = torch.stack([torch.tensor([0.25, 0.25]), torch.tensor([0.75, 0.6])]) * scale  # two corners
    click = {"input_points": points[None, None, :1], "input_labels": torch.ones(1, 1, 1, dtype=torch.long)}
    clicks = {
        "input_points": torch.stack([points, points.flip(0)])[None],  # (1, 2, 2, 2)
        "input_labels": torch.tensor([[[1, 0], [1, -10]]]),
    }
    earlier = model(image_embeddings=embeddings, **click).pred_masks[:, 0, :1]  # (1, 1, 4 * H, 4 * W)
    boxes = {"input_boxes": torch.stack([box, box * 0.9])[None].flatten(2)}  # (1, 2, 4)
    prompts = {
        "a point": click,
        "points of two prompts": clicks,
        "two boxes": boxes,
        "points with boxes": {**clicks, **boxes},
        "a point and an earlier mask": {**click, "input_masks": earlier},
    }
    cases = []
    for name, inputs in prompts.items():
        output = model(image_embeddings=embeddings, **inputs)
        mask = inputs["input_masks"].numpy() if "input_masks" in inputs else None
        cases.append(Case(name, _feed(inputs), mask, output.pred_masks, output.iou_scores))
    return pixels.numpy(), embeddings, cases


def _feed(inputs):
    """Points and labels of a graph, where a box is two points."""
    points, labels = [], []
    if "input_points" in inputs:
        points, labels = [inputs["input_points"]], [inputs["input_labels"]]
    if "input_boxes" in inputs:
        corners = inputs["input_boxes"].unflatten(-1, (2, 2))  # (1, P, 2, 2)
        points.append(corners)
        labels.append(torch.tensor([2, 3]).expand(corners.shape[:3]))
    return {
        "input_points": torch.cat(points, dim=2).numpy(),
        "input_labels": torch.cat(labels, dim=2).numpy(),
    }


def compare(files: dict[str, Path], pixels, embeddings: torch.Tensor, cases: list[Case], precision: str) -> list[Row]:
    """Run the graphs as a client does, each fed with what the one before it gave.

    Args:
        files: name of each graph -> its file.
        pixels, embeddings, cases: of `reference`.
        precision: "float32", which is compared by values, or "float16" or "int8", compared by masks.

    Returns:
        The report; a row that did not pass is in it.
    """
    encoder = _session(files["vision_encoder"])
    names = ["image_embeddings", "image_positional_embeddings"]
    image = dict(zip(names, encoder.run(names, {"pixel_values": pixels}), strict=True))
    del encoder  # its memory, before there is the next
    decoder, masker = (_session(files[name]) for name in ("prompt_encoder_mask_decoder", "mask_prompt_encoder"))
    found = torch.from_numpy(image["image_embeddings"])
    rows = [_by_value("image embedding", [(found, embeddings)])] if precision == "float32" else []
    for case in cases:
        fed = dict(image)
        if case.mask is not None:
            feed = {"image_embeddings": image["image_embeddings"], "input_masks": case.mask}
            (fed["image_embeddings"],) = masker.run(None, feed)
        results = decoder.run(["iou_scores", "pred_masks"], {**fed, **case.feed})
        scores, masks = (torch.from_numpy(result) for result in results)
        if precision == "float32":
            rows.append(_by_value(case.name, [(scores, case.scores), (masks, case.masks)]))
        else:
            rows.append(_by_masks(case.name, masks, case.masks, LEAST_IOU[precision]))
    return rows


def _session(path: Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _by_value(name: str, pairs) -> Row:
    gap = max(((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs)
    return Row(name, f"differs by {gap:.1e} of the largest value; the limit is {LIMIT:g}", gap <= LIMIT)  # NaN fails


def _by_masks(name: str, ours: torch.Tensor, theirs: torch.Tensor, least: float) -> Row:
    ours, theirs = ours > 0, theirs > 0
    union = (ours | theirs).sum().item()
    iou = (ours & theirs).sum().item() / union if union else 1.0
    return Row(name, f"masks have an IoU of {iou:.4f} with those of float32; the least is {least:g}", iou >= least)
