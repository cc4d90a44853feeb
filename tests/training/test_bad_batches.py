"""What `sam_split.training` is given and cannot use ends in one message that says what was wrong and what to do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models import CHANNELS, GRID, IMAGE_SIZE, split_model, stock_model
from PIL import Image
from training_data import collator, example

from sam_split import VOID_LABEL
from sam_split.training import (
    boxes_around,
    correcting_clicks,
    drop_prefix,
    iou_and_dice,
    jitter_boxes,
    points_inside,
    prefix_hidden_states,
    simulate_prompts,
)

NAN = float("nan")
PARTS = {
    # image of 48 x 24 and one mask; what is changed, and a part of the message
    "no image": ({"image": None}, "has no image, .*remove_unused_columns=False"),
    "path as image": ({"image": "a.png"}, "got the path 'a.png'; open it"),
    "Path as image": ({"image": Path("a.png")}, "must be a PIL image or an array, got the path"),
    "nested list of words as image": ({"image": [["a"]]}, "image of example 'a.png' must be numbers, got <U1"),
    "16-bit array": ({"image": np.ones((48, 24), np.uint16)}, "8 bits per channel, got uint16; choose which values"),
    "16-bit PIL image": ({"image": Image.new("I;16", (24, 48))}, "8 bits per channel, got mode 'I;16'; choose"),
    "32-bit PIL image": ({"image": Image.new("I", (24, 48))}, "8 bits per channel, got mode 'I'"),
    "float PIL image": ({"image": Image.new("F", (24, 48))}, "8 bits per channel, got mode 'F'"),
    "floats from 0 to 1": ({"image": np.ones((48, 24, 3), np.float32)}, "8 bits per channel, got float32"),
    "float tensor": ({"image": torch.ones(48, 24, 3)}, "8 bits per channel, got float32"),
    "bool image": ({"image": np.ones((48, 24), bool)}, "8 bits per channel, got bool"),
    "channels first": ({"image": np.ones((3, 48, 24), np.uint8)}, r"got \(3, 48, 24\); move the channels last"),
    "four channels": (
        {"image": np.ones((48, 24, 4), np.uint8)},
        r"must be .*\(height, width, 3\), got \(48, 24, 4\)$",
    ),
    "empty image": ({"image": np.ones((0, 24, 3), np.uint8)}, r"got \(0, 24, 3\)"),
    "mask=": ({"mask": np.ones((1, 48, 24))}, "'mask' is no part of an example.* did you mean 'masks'"),
    "box=": ({"box": [[0, 0, 9, 9]]}, "did you mean 'boxes'"),
    "labels=": ({"labels": np.ones((1, 48, 24))}, "did you mean 'point_labels'"),
    "foreign field": ({"width": 24}, "'width' is no part .* it may have image, masks"),
    "masks of another size": ({"masks": np.ones((1, 48, 25))}, r"like its image, \(P, 48, 24\), got \(1, 48, 25\)"),
    "transposed masks": ({"masks": np.ones((1, 24, 48))}, r"like its image, \(P, 48, 24\), got \(1, 24, 48\)"),
    "label map": ({"masks": np.ones((48, 24), int)}, r"got \(48, 24\); a map with a number per object becomes"),
    "masks with a channel": ({"masks": np.ones((1, 1, 48, 24))}, r"got \(1, 1, 48, 24\)"),
    "path as masks": ({"masks": "a.png"}, r"must be \(P, height, width\), got str; load them as an array"),
    "number as masks": ({"masks": 1}, r"must be \(P, height, width\), got int"),
    "no masks": ({"masks": np.zeros((0, 48, 24))}, "example 'a.png' has no object"),
    "empty mask": ({"masks": np.zeros((1, 48, 24))}, r"masks \[0\] of example 'a.png' are empty"),
    "only void": ({"masks": np.full((1, 48, 24), VOID_LABEL)}, r"masks \[0\] of example 'a.png' are empty"),
    "255": ({"masks": np.full((1, 48, 24), 255)}, r"0, 1 or -100 \(void\), got 255; pass masks > 0"),
    "numbered masks": ({"masks": np.full((1, 48, 24), 7)}, r"must be 0, 1 or -100 \(void\), got 7$"),
    "probabilities": ({"masks": np.full((1, 48, 24), 0.5)}, r"must be 0, 1 or -100 \(void\), got 0.5"),
    "NaN masks": ({"masks": np.full((1, 48, 24), NAN)}, r"must be 0, 1 or -100 \(void\), got nan"),
    "masks with gradient": ({"masks": torch.ones(1, 48, 24, requires_grad=True)}, "masks of example 'a.png' must be"),
    "box outside": ({"boxes": [[0, 0, 25, 10]]}, r"inside its image of height 48 and width 24, got \[0, 0, 25, 10\]"),
    "box below": ({"boxes": [[0, 0, 10, 49]]}, r"got \[0, 0, 10, 49\]; clip it"),
    "box above": ({"boxes": [[0, -1, 10, 40]]}, r"got \[0, -1, 10, 40\]"),
    "box to the left": ({"boxes": [[-1, 0, 10, 40]]}, r"got \[-1, 0, 10, 40\]"),
    "box inverted in x": ({"boxes": [[9, 0, 3, 10]]}, r"box 0 of example 'a.png' must be \(x0, y0, x1, y1\) with"),
    "box inverted in y": ({"boxes": [[0, 9, 3, 3]]}, r"box 0 of example 'a.png' must be \(x0, y0, x1, y1\) with"),
    "COCO's box": ({"boxes": [[20, 5, 4, 9]]}, r"turn COCO's \(x, y, width, height\) into corners"),
    "NaN box": ({"boxes": [[0, 0, NAN, 10]]}, r"got \[0.0, 0.0, nan, 10.0\]"),
    "infinite box": ({"boxes": [[0, 0, float("inf"), 10]]}, r"got \[0.0, 0.0, inf, 10.0\]"),
    "one flat box": ({"boxes": [0, 0, 9, 9]}, r"boxes of example 'a.png' must be \(P, 4\), .*got \(4,\)"),
    "ragged boxes": ({"boxes": [[0, 0, 9, 9], [0, 0]]}, "boxes of example 'a.png' must be an array of numbers"),
    "named boxes": ({"boxes": {"x": 1}}, r"boxes of example 'a.png' must be \(P, 4\), got dict"),
    "unequal": (
        {"boxes": [[0, 0, 9, 9]] * 2},
        r"number of masks, boxes and points, got {'masks': 1, 'boxes': 2}",
    ),
    "point outside": ({"points": [[[25, 3]]]}, r"in pixels inside its image .*got \[25, 3\] for object 0"),
    "point below": ({"points": [[[3, 49]]]}, r"in pixels inside its image .*got \[3, 49\] for object 0"),
    "negative point": ({"points": [[[3, 4], [-1, 3]]]}, r"got \[-1, 3\] for object 0; leave it out"),
    "NaN point": ({"points": [[[NAN, 3]]]}, r"in pixels inside its image .*got \[nan, 3.0\]"),
    "points without objects": ({"points": [[4, 5]]}, r"a list of P arrays \(N, 2\) .*got \(2,\) for object 0"),
    "object without a point": ({"points": [np.zeros((0, 2))]}, r"N at least 1, got \(0, 2\) for object 0"),
    "words as points": ({"points": [[["a", "b"]]]}, r"points\[0\] of example 'a.png' must be numbers, got <U1"),
    "labels without points": ({"point_labels": [[1]]}, "point_labels without points; give both"),
    "labels for more objects": (
        {"points": [[[4, 5]]], "point_labels": [[1], [1]]},
        r"point_labels of example 'a.png' must be 1 arrays",
    ),
    "labels for more points": ({"points": [[[4, 5]]], "point_labels": [[1, 0]]}, r"must be \(1,\) for object 0"),
    "point label 2": ({"points": [[[4, 5]]], "point_labels": [[2]]}, r"1 \(foreground\), .*got \[2\] for object 0"),
    "point label NaN": ({"points": [[[4, 5]]], "point_labels": [[NAN]]}, r"1 \(foreground\), .*got \[nan\]"),
}


@pytest.mark.parametrize("case", PARTS)
def test_bad_part(case):
    change, message = PARTS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        collator()([example(48, 24, (4, 6, 9, 20)) | change])


GOOD = {
    "bool masks": {"masks": np.arange(48 * 24).reshape(1, 48, 24) < 99},
    "float masks": {"masks": (np.arange(48 * 24).reshape(1, 48, 24) < 99).astype(float)},
    "list of masks": {"masks": [np.arange(48 * 24).reshape(48, 24) < 99]},
    "uint16 masks": {"masks": (np.arange(48 * 24).reshape(1, 48, 24) < 99).astype(np.uint16)},
    "mask tensor": {"masks": torch.arange(48 * 24).reshape(1, 48, 24) < 99},
}


@pytest.mark.parametrize("case", GOOD)
def test_good_masks(case):
    labels = collator()([example(48, 24, (4, 6, 9, 20)) | GOOD[case]])["labels"]
    expected = collator()([example(48, 24, (4, 6, 9, 20)) | GOOD["bool masks"]])["labels"]
    assert torch.equal(labels, expected)
    assert (labels == 1).sum() == 4 * 99


def test_same_image_in_any_form():
    """PIL, array, tensor; grey as one channel or three."""
    image = example(48, 24, (4, 6, 9, 20))["image"]
    grey = np.repeat(image[..., :1], 3, 2)
    for first, *others in (
        (image, Image.fromarray(image), torch.from_numpy(image)),
        (grey, grey[..., 0], Image.fromarray(grey[..., 0])),
    ):
        expected = collator()([{"image": first}])["pixel_values"]
        for other in others:
            assert torch.equal(collator()([{"image": other}])["pixel_values"], expected)
    narrow = np.zeros((48, 3, 3), np.uint8)
    assert collator()([{"image": narrow}])["pixel_values"].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)


def other(**change):
    return {name: value for name, value in (example(48, 24, (4, 6, 9, 20)) | change).items() if value is not None}


BATCHES = {
    "empty": ([], "at least one example, got none"),
    "a dict": (other(), "must be a list of dicts, got dict; put a single one in a list"),
    "an array": (np.zeros((1, 3, 8, 8)), "must be a list of dicts, got ndarray"),
    "pairs": ([(1, 2)], "example 0 must be a dict of image, masks, .*, got tuple"),
    "what Trainer leaves": ([{}, {}], "example 0 has no image, only an empty dict; .*remove_unused_columns=False"),
    "masks for one": ([other(), other(masks=None, name="b")], "example 'b' has no masks, unlike the batch's first"),
    "boxes for one": ([other(), other(boxes=[[0, 0, 9, 9]], name="b")], "example 'b' has boxes, unlike the batch's"),
}


@pytest.mark.parametrize("case", BATCHES)
def test_bad_batch(case):
    batch, message = BATCHES[case]
    with pytest.raises((ValueError, TypeError), match=message):
        collator()(batch)


@pytest.mark.parametrize("processor", [None, "facebook/sam-vit-base"])
def test_bad_processor(processor):
    with pytest.raises(TypeError, match="must be a SamProcessor or its image processor, got"):
        type(collator())(processor)


@pytest.fixture(scope="module")
def model():
    return split_model(stock_model())


LABELS, LOGITS, BOXES = torch.ones(1, 2, 96, 96), torch.ones(1, 2, 24, 24), torch.tensor([[[1.0, 2, 30, 40]] * 2])
EMBEDDINGS, PIXELS = torch.ones(1, CHANNELS, GRID, GRID), torch.ones(1, 3, IMAGE_SIZE, IMAGE_SIZE)
REGION = LABELS == 1
CALLS = {
    "boxes of a list": (lambda m: boxes_around([[1]]), "labels must be a torch.Tensor"),
    "boxes of an array": (lambda m: boxes_around(np.ones((1, 1, 8, 8))), "labels must be a torch.Tensor"),
    "boxes without prompts": (
        lambda m: boxes_around(LABELS[0]),
        r"labels must be .*got \(2, 96",
    ),
    "boxes of 255": (lambda m: boxes_around(255 * LABELS), r"labels must be one of .*got 255.0; divide"),
    "boxes of NaN": (lambda m: boxes_around(NAN * LABELS), "labels must be one of .*got nan"),
    "jitter a list": (lambda m: jitter_boxes([[[0, 0, 1, 1]]], (8, 8)), "boxes must be a torch.Tensor"),
    "jitter flat boxes": (lambda m: jitter_boxes(BOXES[0], (96, 96)), r"boxes must be \(B, P, 4\), got \(2, 4\)"),
    "jitter points": (lambda m: jitter_boxes(BOXES[..., :2], (96, 96)), r"boxes must be \(B, P, 4\), got \(1, 2, 2\)"),
    "jitter NaN": (
        lambda m: jitter_boxes(BOXES * NAN, (96, 96)),
        "with x0 <= x1 and y0 <= y1, got NaN or",
    ),
    "jitter in x": (lambda m: jitter_boxes(BOXES[..., [2, 1, 0, 3]], (96, 96)), "with x0 <= x1 and y0 <= y1"),
    "jitter in y": (lambda m: jitter_boxes(BOXES[..., [0, 3, 2, 1]], (96, 96)), "with x0 <= x1 and y0 <= y1"),
    "jitter in a side": (lambda m: jitter_boxes(BOXES, 96), r"size must be \(height, width\), got 96"),
    "jitter in 3 sizes": (lambda m: jitter_boxes(BOXES, (3, 96, 96)), r"size must be \(height, width\), got"),
    "jitter in nothing": (lambda m: jitter_boxes(BOXES, (0, 96)), r"size, .* must be a number of at least 1, got 0"),
    "jitter backwards": (
        lambda m: jitter_boxes(BOXES, (96, 96), share=-1),
        "share must be a number of at least 0",
    ),
    "jitter by NaN": (lambda m: jitter_boxes(BOXES, (96, 96), limit=NAN), "limit must be a number of at least 0, got"),
    "points in labels": (lambda m: points_inside(LABELS), "region must be bool, got torch.float32; pass labels == 1"),
    "points in a plane": (lambda m: points_inside(REGION[0]), r"region must be \(B, P, h, w\), got"),
    "no points": (lambda m: points_inside(REGION, 0), "number must be an integer of at least 1, got 0"),
    "half a point": (lambda m: points_inside(REGION, 0.5), "number must be an integer of at least 1, got 0.5"),
    "clicks on a bool": (
        lambda m: correcting_clicks(LOGITS > 0, LABELS),
        "logits must be floating-point",
    ),
    "clicks on 3 masks": (
        lambda m: correcting_clicks(LOGITS[:, :, None], LABELS),
        r"pred_masks\[:, :, 0",
    ),
    "clicks on others": (lambda m: correcting_clicks(LOGITS[:, :1], LABELS), r"logits must be .*P is 2 in labels"),
    "clicks on 7": (lambda m: correcting_clicks(LOGITS, 7 * LABELS), "labels must be one of .*got 7.0"),
    "prompts of pixels": (
        lambda m: simulate_prompts(m, PIXELS[0], LABELS, 0),
        "image_embeddings must be",
    ),
    "prompts of others": (lambda m: simulate_prompts(m, torch.cat([EMBEDDINGS] * 2), LABELS, 0), "B is 1 in labels"),
    "prompts of 255": (lambda m: simulate_prompts(m, EMBEDDINGS, 255 * LABELS, 0), "labels must be one of .*got 255"),
    "prompts of a map": (
        lambda m: simulate_prompts(m, EMBEDDINGS, LABELS[0], 0),
        r"labels must be \(B, P, height",
    ),
    "rounds below 0": (
        lambda m: simulate_prompts(m, EMBEDDINGS, LABELS, -1),
        "rounds must be an integer of at least 0",
    ),
    "rounds of 1.5": (
        lambda m: simulate_prompts(m, EMBEDDINGS, LABELS, 1.5),
        "rounds must be an integer of at least 0",
    ),
    "rounds of True": (
        lambda m: simulate_prompts(m, EMBEDDINGS, LABELS, True),
        "rounds must be an integer of at",
    ),
    "IoU of a bool": (lambda m: iou_and_dice(LOGITS > 0, LABELS), "logits must be floating-point"),
    "IoU of 3 masks": (lambda m: iou_and_dice(LOGITS[:, :, None], LABELS), r"for example pred_masks\[:, :, 0\]"),
    "IoU of others": (lambda m: iou_and_dice(LOGITS[:, :1], LABELS), "P is 2 in labels"),
    "IoU with 255": (lambda m: iou_and_dice(LOGITS, 255 * LABELS), "labels must be one of .*got 255.0"),
    "prefix of 3": (lambda m: prefix_hidden_states(m, PIXELS, 3), "layers must be at most 2, .*got 3"),
    "prefix of -1": (lambda m: prefix_hidden_states(m, PIXELS, -1), "layers must be an integer of at least 0, got -1"),
    "drop 3": (lambda m: drop_prefix(m, 3), "layers must be at most 2, .*got 3"),
    "drop a half": (lambda m: drop_prefix(m, 0.5), "layers must be an integer of at least 0, got 0.5"),
}


@pytest.mark.parametrize("case", CALLS)
def test_bad_call(model, case):
    call, message = CALLS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        call(model)
