"""What fine-tuning needs beside the model: ragged examples to batches, prompts from masks, metrics, a cached prefix.

Shapes as in `modeling_sam_split`; points and boxes are (x, y) in pixels of the tensor they come from. What is random
takes a `generator`, and samples from torch's own when it is None. Augmentation, schedules and the loop itself come
from torchvision, datasets and transformers.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .checks_sam_split import InputCheck
from .modeling_sam_split import VOID_LABEL
from .training_checks import (
    PADDING_POINT,
    check_batch,
    check_box_order,
    check_labels,
    check_layers,
    check_logits,
    check_number,
    check_size,
)


class SamSplitCollator:
    """Images of any size, each with any number of objects, to one batch for `SamSplitModel`.

    An example is a dict: `image`, a PIL image or an array (height, width) or (height, width, 3) of 8 bits per channel,
    and optionally `masks` (P, height, width) in {0, 1, VOID_LABEL}, `boxes` (P, 4), `points` (a list of P arrays
    (N, 2), N may differ) and `point_labels` (P arrays (N,), 1 for foreground by default), all in pixels of the image,
    and `name` for messages. All examples of a batch have the same parts. `input_boxes` are those around the masks in a
    batch with masks but without boxes and points.

    Images of 16 bits or of floats are refused: which range of their values is black to white only their owner knows.
    transformers' Trainer needs `remove_unused_columns=False`, or it removes all parts before they arrive here.

    Args:
        processor: the model's `SamProcessor`, or its image processor.
    """

    def __init__(self, processor):
        self.image_processor = getattr(processor, "image_processor", processor)
        if not callable(self.image_processor):
            raise TypeError(
                f"processor must be a SamProcessor or its image processor, got {type(processor).__name__}; load one "
                "with SamProcessor.from_pretrained"
            )

    def __call__(self, examples):
        """A batch: `pixel_values` and, as far as given, `labels`, `input_boxes`, `input_points` and `input_labels`.

        Labels are (B, P, height, width) int8 like `pixel_values`, and void where an image was padded. Prompts that an
        image has fewer than others are padding: void labels, box 0, points labelled -10.

        Raises:
            TypeError, ValueError: naming the example and its part that cannot be used, and what to do.
        """
        given = check_batch(examples)
        images = [_rgb(example["image"]) for example in examples]
        images = self.image_processor(images, return_tensors="pt", input_data_format="channels_last")
        batch = {"pixel_values": images["pixel_values"]}
        originals, resized = images["original_sizes"].tolist(), images["reshaped_input_sizes"].tolist()
        prompts = max(_prompts(example) for example in examples)
        if "masks" in given:
            size = batch["pixel_values"].shape[-2:]
            masks = zip((example["masks"] for example in examples), resized, strict=True)
            batch["labels"] = torch.stack([_fitted_mask(mask, to, size, prompts) for mask, to in masks])
        scales = [
            torch.tensor([new[1] / old[1], new[0] / old[0]]) for old, new in zip(originals, resized, strict=True)
        ]
        if "boxes" in given:
            boxes = [_float(e["boxes"]) * s.repeat(2) for e, s in zip(examples, scales, strict=True)]
            batch["input_boxes"] = torch.stack([_padded(box, prompts, 0) for box in boxes])
        if "points" in given:
            batch |= self._points(examples, scales, prompts)
        if "labels" in batch and not given & {"boxes", "points"}:
            batch["input_boxes"] = boxes_around(batch["labels"])
        return batch

    def _points(self, examples, scales, prompts):
        longest = max(len(points) for example in examples for points in example["points"])
        shape = len(examples), prompts, longest
        batch = {"input_points": torch.zeros(*shape, 2), "input_labels": torch.full(shape, PADDING_POINT)}
        for i, (example, scale) in enumerate(zip(examples, scales, strict=True)):
            for p, points in enumerate(example["points"]):
                labels = example.get("point_labels")
                batch["input_points"][i, p, : len(points)] = _float(points) * scale
                batch["input_labels"][i, p, : len(points)] = 1 if labels is None else _float(labels[p]).long()
        return batch


def _prompts(example):
    return next((len(example[name]) for name in ("masks", "boxes", "points") if example.get(name) is not None), 1)


def _rgb(image):
    """(height, width, 3) of a PIL image or an array."""
    image = np.array(image.convert("RGB") if hasattr(image, "convert") else image)  # a copy, for PIL's is read-only
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image


def _float(values):
    return torch.from_numpy(np.asarray(values, np.float32))


def _padded(tensor, length, value):
    """Rows of `value` appended until there are `length`."""
    return torch.cat([tensor, tensor.new_full((length - len(tensor), *tensor.shape[1:]), value)])


def _fitted_mask(mask, resized, size, prompts):
    """Labels (prompts, *size) of a mask (P, height, width) that fills `resized` of it, nearest neighbour."""
    mask = F.interpolate(_float(mask)[None], tuple(resized), mode="nearest-exact")[0].to(torch.int8)
    mask = F.pad(mask, (0, size[1] - resized[1], 0, size[0] - resized[0]), value=VOID_LABEL)
    return _padded(mask, prompts, VOID_LABEL)


def boxes_around(labels):
    """The smallest boxes (B, P, 4) that hold the pixels labelled 1 of (B, P, h, w); 0 where there is none.

    >>> labels = torch.zeros(1, 1, 8, 8)
    >>> labels[..., 2:5, 3:7] = 1
    >>> boxes_around(labels).tolist()  # (x0, y0, x1, y1)
    [[[3.0, 2.0, 6.0, 4.0]]]
    """
    check_labels(labels)
    inside = labels == 1
    columns, rows = inside.any(-2), inside.any(-1)  # (B, P, w) and (B, P, h)
    sides = []
    for hit in (columns, rows):
        length = hit.shape[-1]
        sides.append((hit.int().argmax(-1), length - 1 - hit.int().flip(-1).argmax(-1)))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], -1).float() * inside.any((-2, -1))[..., None]


def jitter_boxes(boxes, size, generator=None, share=0.1, limit=20.0):
    """Boxes (B, P, 4) whose sides have moved as a person's would, kept inside an image of `size`, (height, width).

    Each side moves by normal noise with a deviation of `share` of the box's width or height, `limit` pixels at most.

    Source: Segment Anything (arXiv 2304.02643), appendix A.
    """
    InputCheck()("boxes", boxes, ("B", "P", 4))
    check_box_order(boxes)
    for name, value in (("share", share), ("limit", limit)):
        check_number(name, value, 0)
    check_size(size)
    extent = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    noise = torch.randn(boxes.shape, generator=generator, device=boxes.device) * share * extent
    height, width = size
    last = torch.tensor([width, height, width, height], device=boxes.device) - 1.0
    moved = torch.minimum((boxes + noise.clamp(-limit, limit)).clamp(min=0), last)
    return torch.cat(
        [torch.minimum(moved[..., :2], moved[..., 2:]), torch.maximum(moved[..., :2], moved[..., 2:])], -1
    )


def points_inside(region, number=1, generator=None):
    """Points (B, P, N, 2) sampled uniformly from the true pixels of a bool (B, P, h, w), 0 where a region is empty."""
    InputCheck()("region", region, ("B", "P", "h", "w"))
    if region.dtype != torch.bool:
        raise ValueError(f"region must be bool, got {region.dtype}; pass labels == 1")
    check_number("number", number, 1, int)
    score = torch.rand(*region.shape[:2], number, 1, generator=generator, device=region.device)
    count = region.flatten(2).sum(-1)[..., None, None]  # (B, P, 1, 1)
    rank = (score * count).long() + 1
    place = torch.searchsorted(region.flatten(2).cumsum(-1), rank.flatten(2))  # (B, P, N), the rank-th true pixel
    place = torch.where(count[..., 0] > 0, place, 0)
    return torch.stack([place % region.shape[-1], place // region.shape[-1]], -1).float()


def correcting_clicks(logits, labels, generator=None):
    """A click on what each mask got wrong: foreground where it lacks the object, background where it overflows.

    Args:
        logits: (B, P, h, w), resized to the labels if of another size.
        labels: (B, P, height, width), 0, 1 or void.

    Returns:
        Points (B, P, 1, 2) in pixels of the labels and their labels (B, P, 1), padding where nothing is wrong.
    """
    check_logits(logits, labels)
    predicted = _resized(logits, labels.shape[-2:]) > 0
    wrong = (predicted != (labels == 1)) & (labels != VOID_LABEL)
    points = points_inside(wrong, 1, generator)
    x, y = points.long().unbind(-1)
    at = labels.flatten(2).gather(-1, y * labels.shape[-1] + x).long()  # (B, P, 1)
    return points, torch.where(wrong.flatten(2).any(-1, keepdim=True), at, PADDING_POINT)


@torch.no_grad()
def simulate_prompts(model, image_embeddings, labels, rounds, generator=None, points_only=None):
    """Prompts as a person gives them: a rough box or one click, then a click on an error of each mask that came out.

    With `rounds` sampled uniformly for each step, the expected gradient is that of the mean over all rounds, and a
    step keeps the activations of one forward pass instead of `rounds` + 1.

    Args:
        model: decodes the masks that are corrected; a `SamSplitModel` or a PEFT model of one.
        image_embeddings: (B, C, H, W).
        labels: (B, P, height, width) at the input's resolution.
        rounds: corrections, 0 for none.
        points_only: True to begin with a click, False with a box, None to choose one at random for the batch.

    Returns:
        Inputs of `forward`: `input_boxes` or `input_points` and `input_labels`, or both, and after a correction the
        last mask as `input_masks`; `multimask_output` only for a single click, which is ambiguous.

    Source: the interactive training of Segment Anything (arXiv 2304.02643), appendix A.
    """
    check = InputCheck()
    check_labels(labels, check)
    check("image_embeddings", image_embeddings, ("B", "C", "H", "W"), floating=True)
    check_number("rounds", rounds, 0, int)
    if points_only is None:
        points_only = bool(torch.rand((), generator=generator, device=labels.device) < 0.5)
    if points_only:
        points = points_inside(labels == 1, 1, generator)
        real = (labels == 1).flatten(2).any(-1, keepdim=True)
        prompts = {"input_points": points, "input_labels": torch.where(real, 1, PADDING_POINT)}
    else:
        prompts = {"input_boxes": jitter_boxes(boxes_around(labels), labels.shape[-2:], generator)}
    for correction in range(rounds):
        first = points_only and correction == 0
        output = model(image_embeddings=image_embeddings, **prompts, multimask_output=first)
        best = output.iou_scores.argmax(-1)[..., None, None, None].expand(-1, -1, -1, *output.pred_masks.shape[-2:])
        masks = output.pred_masks.gather(2, best)  # (B, P, 1, 4 * H, 4 * W)
        points, point_labels = correcting_clicks(masks[:, :, 0], labels, generator)
        if "input_points" in prompts:
            points = torch.cat([prompts["input_points"], points], dim=2)
            point_labels = torch.cat([prompts["input_labels"], point_labels], dim=2)
        prompts |= {"input_points": points, "input_labels": point_labels, "input_masks": masks.float()}
    return prompts | {"multimask_output": points_only and rounds == 0}


def iou_and_dice(logits, labels):
    """IoU and Dice of masks with the truth, void left out.

    Args:
        logits: (B, P, h, w), resized to the labels if of another size.
        labels: (B, P, height, width), 0, 1 or void.

    Returns:
        Two (B, P), NaN for padding, so that `nanmean` is the mean over prompts.

    >>> labels = torch.tensor([[[[1, 1, 0, 0]]]])
    >>> iou, dice = iou_and_dice(torch.tensor([[[[3.0, -3.0, -3.0, -3.0]]]]), labels)
    >>> iou.item(), round(dice.item(), 3)
    (0.5, 0.667)
    """
    check_logits(logits, labels)
    valid = labels != VOID_LABEL
    predicted, wanted = (_resized(logits, labels.shape[-2:]) > 0) & valid, labels == 1
    both = (predicted & wanted).flatten(2).sum(-1).double()
    union = (predicted | wanted).flatten(2).sum(-1)
    real = valid.flatten(2).any(-1)
    # Nothing wanted and nothing found is right.
    iou = torch.where(union > 0, both / union.clamp(min=1), 1.0).where(real, torch.nan)
    return iou, 2 * iou / (1 + iou)


def _resized(logits, size):
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)


@torch.no_grad()
def prefix_hidden_states(model, pixel_values, layers):
    """Tokens (B, H, W, C) after the first `layers` layers of the image encoder, to be kept for `drop_prefix`."""
    encoder = model.vision_encoder
    check_layers(encoder, layers)
    hidden_states = encoder.patch_embed(pixel_values)
    if encoder.pos_embed is not None:
        hidden_states = hidden_states + encoder.pos_embed
    for layer in encoder.layers[:layers]:
        hidden_states, _ = layer(hidden_states)
    return hidden_states


class PassThrough(nn.Module):
    """Stands where a dropped layer was, so that the others keep their names."""

    def forward(self, hidden_states, output_attentions=False):
        return hidden_states, None


def drop_prefix(model, layers):
    """Take away, in place, what `prefix_hidden_states` computed: its tokens become the model's `pixel_values`.

    The layers that stay keep their numbers, so an adapter trained this way fits the whole model.
    """
    encoder = model.vision_encoder
    check_layers(encoder, layers)
    encoder.patch_embed, encoder.pos_embed = nn.Identity(), None
    for index in range(layers):
        encoder.layers[index] = PassThrough()
    return model
