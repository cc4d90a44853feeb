"""How good masks are."""

import torch
import torch.nn.functional as F

from ..modeling_sam_split import VOID_LABEL
from .checks import check_logits


def iou_and_dice(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
    predicted, wanted = (resized(logits, labels.shape[-2:]) > 0) & valid, labels == 1
    both = (predicted & wanted).flatten(2).sum(-1).double()
    union = (predicted | wanted).flatten(2).sum(-1)
    real = valid.flatten(2).any(-1)
    # Nothing wanted and nothing found is right.
    iou = torch.where(union > 0, both / union.clamp(min=1), 1.0).where(real, torch.nan)
    return iou, 2 * iou / (1 + iou)


def resized(logits, size):
    """Logits (B, P, h, w) at another size, (height, width), as they are if they have it."""
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
