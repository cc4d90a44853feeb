"""What masks are worth from a box, from one click and from three, and what the model says that they are worth."""

import numpy as np
import torch
from torch import nn

from ..modeling_sam_split import VOID_LABEL
from .checks import PADDING_POINT, check_labels, check_number
from .metrics import iou_and_dice, resized
from .prompts import boxes_around


def deepest_points(region):
    """The pixel of each region that is farthest from its edge, the first of several: (B, P, 2), 0 where it is empty.

    Args:
        region: bool (B, P, h, w). Outside the image is no region.

    Returns:
        Points (B, P, 2), (x, y), and their distances (B, P) from the nearest pixel outside, 0 where it is empty.
    """
    from scipy.ndimage import distance_transform_edt

    boxes = boxes_around(region.to(torch.int8)).long()
    points, depths = torch.zeros(*region.shape[:2], 2), torch.zeros(region.shape[:2])
    for at in np.ndindex(*region.shape[:2]):
        x0, y0, x1, y1 = boxes[at].tolist()
        inside = np.pad(region[at][y0 : y1 + 1, x0 : x1 + 1].cpu().numpy(), 1)
        if inside.any():
            distance = distance_transform_edt(inside)
            y, x = np.unravel_index(distance.argmax(), distance.shape)
            points[at] = torch.tensor([x0 + x - 1.0, y0 + y - 1.0])
            depths[at] = float(distance[y, x])
    return points.to(region.device), depths.to(region.device)


def deepest_errors(logits, labels):
    """The click that corrects a mask best: in the middle of what it lacks or of what is too much, the deeper of both.

    Returns:
        Points (B, P, 1, 2) and their labels (B, P, 1), padding where nothing is wrong.
    """
    predicted = resized(logits, labels.shape[-2:]) > 0
    lacking, lacking_depth = deepest_points(~predicted & (labels == 1))
    excess, excess_depth = deepest_points(predicted & (labels == 0))
    more = lacking_depth >= excess_depth
    points = torch.where(more[..., None], lacking, excess)
    kinds = torch.where(more, 1, 0).where(torch.maximum(lacking_depth, excess_depth) > 0, PADDING_POINT)
    return points[:, :, None], kinds[..., None]


@torch.no_grad()
def score_prompts(
    model: nn.Module, image_embeddings: torch.Tensor, labels: torch.Tensor, prompts_at_once: int = 32
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """True and predicted IoU of the masks of each object, from its box, from one click and from three.

    The first click is as far from the object's edge as can be, the others as deep inside what is wrong; nothing is
    random. One click gives three masks, of which the model chooses; then it gives one, from the clicks and its last.

    Args:
        model: a `SamSplitModel` or a PEFT model of one, in eval mode.
        image_embeddings: (B, C, H, W).
        labels: (B, P, height, width) at the input's resolution, 0, 1 or void.
        prompts_at_once: of each image; more need more memory.

    Returns:
        {"box", "1 click", "3 clicks"}, each the true and the predicted IoU, both (B, P) and NaN for padding.

    Source: evaluation in Segment Anything (arXiv 2304.02643), appendix D.2.
    """
    check_labels(labels)
    check_number("prompts_at_once", prompts_at_once, 1, int)
    pieces = [_score(model, image_embeddings, piece) for piece in labels.split(prompts_at_once, dim=1)]
    return {
        kind: tuple(torch.cat([piece[kind][which] for piece in pieces], dim=1) for which in (0, 1))
        for kind in pieces[0]
    }


def _score(model, image_embeddings, labels):
    real = (labels != VOID_LABEL).flatten(2).any(-1)

    def decode(multimask_output=False, **prompts):
        output = model(image_embeddings=image_embeddings, **prompts, multimask_output=multimask_output)
        best = output.iou_scores.argmax(-1, keepdim=True)  # (B, P, 1)
        at = best[..., None, None].expand(-1, -1, -1, *output.pred_masks.shape[-2:])
        mask, predicted = output.pred_masks.gather(2, at), output.iou_scores.gather(2, best)[..., 0]
        return mask, (iou_and_dice(mask[:, :, 0], labels)[0], predicted.where(real, torch.nan))

    scores = {"box": decode(input_boxes=boxes_around(labels))[1]}
    points, depths = deepest_points(labels == 1)
    points, kinds = points[:, :, None], torch.where(depths > 0, 1, PADDING_POINT)[..., None]
    mask, scores["1 click"] = decode(True, input_points=points, input_labels=kinds)
    for _ in range(2):
        more, more_kinds = deepest_errors(mask[:, :, 0], labels)
        points, kinds = torch.cat([points, more], dim=2), torch.cat([kinds, more_kinds], dim=2)
        mask, scores["3 clicks"] = decode(input_points=points, input_labels=kinds, input_masks=mask.float())
    return scores
