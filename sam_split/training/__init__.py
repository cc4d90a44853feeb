"""What fine-tuning needs beside the model: ragged examples to batches, prompts from masks, metrics, evaluation.

Shapes as in `modeling_sam_split`; points and boxes are (x, y) in pixels of the tensor they come from. What is random
takes a `generator`, and samples from torch's own when it is None. Augmentation, schedules and the loop itself come
from torchvision, datasets and transformers.

What needs the extra `train` stands in `trainer` (`PromptTrainer`) and in `finetuning` (`finetune`, which is what
`sam-split finetune` runs).
"""

from .checks import PADDING_POINT
from .collator import SamSplitCollator
from .data import Examples, find_examples, object_masks
from .evaluation import Evaluation, evaluate, evaluation_table
from .metrics import iou_and_dice
from .pictures import overlay_page, plot_gains
from .prefix import CachedImages, drop_prefix, prefix_hidden_states
from .presets import PRESETS, lora_config
from .prompts import (
    background_clicks,
    boxes_around,
    correcting_clicks,
    jitter_boxes,
    points_inside,
    simulate_prompts,
    some_objects,
    training_prompts,
)
from .scores import score_prompts

__all__ = [
    "PADDING_POINT",
    "PRESETS",
    "CachedImages",
    "Evaluation",
    "Examples",
    "SamSplitCollator",
    "background_clicks",
    "boxes_around",
    "correcting_clicks",
    "drop_prefix",
    "evaluate",
    "evaluation_table",
    "find_examples",
    "iou_and_dice",
    "jitter_boxes",
    "lora_config",
    "object_masks",
    "overlay_page",
    "plot_gains",
    "points_inside",
    "prefix_hidden_states",
    "score_prompts",
    "simulate_prompts",
    "some_objects",
    "training_prompts",
]
