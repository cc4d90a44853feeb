"""Prompts from masks, as a person would give them: rough boxes, clicks, and clicks on what a mask got wrong."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..checks_sam_split import InputCheck
from ..modeling_sam_split import VOID_LABEL
from .checks import PADDING_POINT, check_box_order, check_labels, check_logits, check_number, check_size
from .metrics import resized

FIRST_PROMPTS = {"box": False, "points": True, "mixed": None}  # what a step begins with: a click?


def boxes_around(labels: torch.Tensor) -> torch.Tensor:
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


def jitter_boxes(
    boxes: torch.Tensor,
    size: Sequence[int],
    generator: torch.Generator | None = None,
    share: float = 0.1,
    limit: float = 20.0,
) -> torch.Tensor:
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


def points_inside(region: torch.Tensor, number: int = 1, generator: torch.Generator | None = None) -> torch.Tensor:
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


def correcting_clicks(
    logits: torch.Tensor, labels: torch.Tensor, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A click on what each mask got wrong: foreground where it lacks the object, background where it overflows.

    Args:
        logits: (B, P, h, w), resized to the labels if of another size.
        labels: (B, P, height, width), 0, 1 or void.

    Returns:
        Points (B, P, 1, 2) in pixels of the labels and their labels (B, P, 1), padding where nothing is wrong.
    """
    check_logits(logits, labels)
    predicted = resized(logits, labels.shape[-2:]) > 0
    wrong = (predicted != (labels == 1)) & (labels != VOID_LABEL)
    points = points_inside(wrong, 1, generator)
    x, y = points.long().unbind(-1)
    at = labels.flatten(2).gather(-1, y * labels.shape[-1] + x).long()  # (B, P, 1)
    return points, torch.where(wrong.flatten(2).any(-1, keepdim=True), at, PADDING_POINT)


@torch.no_grad()
def simulate_prompts(
    model: nn.Module,
    image_embeddings: torch.Tensor,
    labels: torch.Tensor,
    rounds: int,
    generator: torch.Generator | None = None,
    points_only: bool | None = None,
) -> dict[str, Any]:
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
        prompts: dict[str, Any] = {"input_points": points, "input_labels": torch.where(real, 1, PADDING_POINT)}
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


def some_objects(labels: torch.Tensor, number: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """At most `number` of each image's objects, chosen at random: (B, number, height, width)."""
    check_labels(labels)
    check_number("number", number, 1, int)
    if labels.shape[1] <= number:
        return labels
    real = (labels != VOID_LABEL).flatten(2).any(-1)
    order = torch.rand(real.shape, generator=generator, device=labels.device) + real  # padding comes last
    chosen = order.topk(number).indices
    return labels[torch.arange(len(labels), device=labels.device)[:, None], chosen]


def background_clicks(
    labels: torch.Tensor, number: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Single clicks where no object is, and labels that say so: what is cut out there is worth nothing.

    Pixels that are void for any object are left alone. Objects without a mask count as background, so this needs
    images in which every object is labelled.

    Args:
        labels: (B, P, height, width), 0, 1 or void.
        number: clicks per image.

    Returns:
        Points (B, number, 1, 2), their labels (B, number, 1), padding where an image has no background, and labels
        (B, number, height, width), 0, or void where it is unknown; a prompt of padding is void everywhere.
    """
    check_labels(labels)
    real = (labels != VOID_LABEL).flatten(2).any(-1)[..., None, None]  # (B, P, 1, 1)
    unknown = ((labels == VOID_LABEL) & real).any(1, keepdim=True) | ~real.any(1, keepdim=True)  # (B, 1, h, w)
    background = ~unknown & (labels != 1).all(1, keepdim=True)
    points = points_inside(background, number, generator).transpose(1, 2)
    found = background.flatten(2).any(-1, keepdim=True).expand(-1, number, -1)  # (B, number, 1)
    nothing = torch.where(unknown | ~found[..., None], VOID_LABEL, 0).to(labels.dtype)
    return points, torch.where(found, 1, PADDING_POINT), nothing.expand(-1, number, *labels.shape[-2:])


def training_prompts(
    model: nn.Module,
    image_embeddings: torch.Tensor,
    labels: torch.Tensor,
    prompts: str = "mixed",
    corrections: int = 1,
    background: int = 4,
    objects: int = 8,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Any], torch.Tensor]:
    """What one training step is prompted with: boxes or clicks, some of them corrected, and clicks on background.

    Args:
        model, image_embeddings, labels: as for `simulate_prompts`.
        prompts: "box", "points", or "mixed" for one of the two at random in each step.
        corrections: a step has from 0 to this many correcting clicks, each number as often.
        background: clicks on the background beside single clicks on objects; 0 if not every object is labelled.
        objects: of each image at most.

    Returns:
        Inputs of `forward` as from `simulate_prompts`, and the labels of these prompts.
    """
    if prompts not in FIRST_PROMPTS:
        raise ValueError(f"prompts must be one of {', '.join(FIRST_PROMPTS)}, got {prompts!r}")
    check_number("corrections", corrections, 0, int)
    check_number("background", background, 0, int)
    chosen = some_objects(labels, objects, generator)
    rounds = int(torch.randint(corrections + 1, (), generator=generator, device=labels.device))
    first_click = FIRST_PROMPTS[prompts]
    inputs = simulate_prompts(model, image_embeddings, chosen, rounds, generator, points_only=first_click)
    if background and inputs["multimask_output"]:
        points, point_labels, nothing = background_clicks(labels, background, generator)
        inputs["input_points"] = torch.cat([inputs["input_points"], points], dim=1)
        inputs["input_labels"] = torch.cat([inputs["input_labels"], point_labels], dim=1)
        chosen = torch.cat([chosen, nothing], dim=1)
    return inputs, chosen
