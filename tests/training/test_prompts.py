"""What a training step is prompted with, and how masks are scored, beside plain references."""

import numpy as np
import pytest
import torch
from models import IMAGE_SIZE, pixels, split_model, stock_model
from scipy.ndimage import distance_transform_edt
from transformers import TrainingArguments

from sam_split import VOID_LABEL, segmentation_loss
from sam_split.training import (
    PADDING_POINT,
    background_clicks,
    boxes_around,
    iou_and_dice,
    score_prompts,
    some_objects,
    training_prompts,
)
from sam_split.training.scores import deepest_errors, deepest_points
from sam_split.training.trainer import PromptTrainer


@pytest.fixture(scope="module")
def model():
    return split_model(stock_model()).eval()


@pytest.fixture(scope="module")
def embeddings(model):
    with torch.no_grad():
        return model.get_image_embeddings(pixels(2))


def scene(size=IMAGE_SIZE):
    """Two images: three objects, one of them with void pixels, and one object beside padding."""
    labels = torch.full((2, 3, size, size), VOID_LABEL, dtype=torch.int8)
    labels[0] = 0
    labels[0, 0, 5:30, 8:40] = 1
    labels[0, 1, 50:90, 50:70] = 1
    labels[0, 2, 70:80, 10:30] = 1
    labels[0, 2, 80:84, 10:30] = VOID_LABEL
    labels[1, 0, :, :60] = 0
    labels[1, 0, 20:50, 10:50] = 1
    return labels


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_background_clicks_are_on_no_object_and_on_nothing_unknown():
    labels = scene()
    points, kinds, nothing = background_clicks(labels, 500, seeded())
    assert points.shape == (2, 500, 1, 2)
    assert kinds.eq(1).all()
    for image in range(2):
        x, y = points[image, :, 0].long().unbind(-1)
        under = labels[image][:, y, x]  # (P, 500)
        real = (labels[image] != VOID_LABEL).flatten(1).any(-1)
        assert under[real].eq(0).all()
    assert nothing[0, :, 80:84, 10:30].eq(VOID_LABEL).all()
    assert nothing[1, :, :, 60:].eq(VOID_LABEL).all()
    assert nothing[0, :, :50].eq(0).all(), "objects too: a mask that runs onto them is worth nothing"
    free = (labels[0] == 0).all(0)
    cells = torch.zeros_like(free)
    x, y = points[0, :, 0].long().unbind(-1)
    cells[y, x] = True
    assert cells.sum() > 450, "spread over the background"
    assert free[y, x].all()


def test_background_clicks_of_an_image_without_background_are_padding():
    labels = scene()
    labels[1] = VOID_LABEL
    labels[1, 0] = 1
    points, kinds, nothing = background_clicks(labels, 3, seeded())
    assert kinds[0].eq(1).all()
    assert kinds[1].eq(PADDING_POINT).all()
    assert nothing[1].eq(VOID_LABEL).all()
    assert points[1].eq(0).all()


def test_some_objects_leaves_padding_out_while_there_are_objects():
    labels = scene()
    counts = torch.zeros(3)
    for seed in range(60):
        kept = some_objects(labels, 2, seeded(seed))
        assert kept.shape[1] == 2
        assert kept[1].eq(1).flatten(1).any(-1).sum() == 1, "the second image has one"
        for row in kept[0]:
            counts += torch.stack([torch.equal(row, other) * torch.ones(()) for other in labels[0]])
    assert counts.sum() == 120
    assert counts.min() > 25
    assert some_objects(labels, 3) is labels


def test_each_kind_of_step(model, embeddings):
    labels, seen = scene(), set()
    for seed in range(40):
        prompts, chosen = training_prompts(model, embeddings, labels, corrections=1, generator=seeded(seed))
        boxes, points, corrected = (f"input_{name}" in prompts for name in ("boxes", "points", "masks"))
        seen.add((boxes, points, corrected))
        clicks = points and not boxes and not corrected
        assert prompts["multimask_output"] == clicks
        assert chosen.shape[1] == 3 + 4 * clicks
        if clicks:
            assert prompts["input_points"].shape == (2, 7, 1, 2)
            assert chosen[0, 3:].eq(1).sum() == 0
        output = model(image_embeddings=embeddings, **prompts, labels=chosen)
        assert output.loss.isfinite()
    assert seen == {(True, False, False), (False, True, False), (True, True, True), (False, True, True)}


@pytest.mark.parametrize(("prompts", "boxes"), [("box", True), ("points", False)])
def test_one_kind_of_step(model, embeddings, prompts, boxes):
    for seed in range(8):
        inputs, _ = training_prompts(model, embeddings, scene(), prompts, 2, generator=seeded(seed))
        assert ("input_boxes" in inputs) == boxes


def test_the_same_seed_gives_the_same_step(model, embeddings):
    one, two = (training_prompts(model, embeddings, scene(), generator=seeded(5)) for _ in range(2))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "kinds"), [("mixed", ["box", "points"]), ("box", ["box"]), ("points", ["points"])])
def test_a_trainers_step_of_mixed_prompts_has_boxes_and_clicks(model, tmp_path, kind, kinds):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, seed=7, disable_tqdm=True, label_names=["labels"])
    trainer = PromptTrainer(model, arguments, prompts={"prompts": kind, "corrections": 2}, focal=3.0)
    inputs = {"pixel_values": pixels(), "labels": scene()}
    loss = trainer.compute_loss(model, inputs)
    embeddings, generator = model.get_image_embeddings(pixels()), batch_generator(7, 0, 0)
    losses = []
    for first in kinds:
        prompts, labels = training_prompts(model, embeddings, scene(), first, 2, generator=generator)
        output = model(image_embeddings=embeddings, **prompts)
        losses.append(segmentation_loss(output.pred_masks, output.iou_scores, labels, 3.0, iou_power=1))
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-6, atol=0)


def batch_generator(seed, step, batch):
    return seeded(int(np.random.SeedSequence([seed, step, batch]).generate_state(1)[0]))


def test_without_background_clicks(model, embeddings):
    for seed in range(8):
        _, chosen = training_prompts(model, embeddings, scene(), "points", 0, background=0, generator=seeded(seed))
        assert chosen.shape[1] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": "boxes"}, "prompts must be one of box, points, mixed, got 'boxes'"),
        ({"corrections": -1}, "corrections must be an integer of at least 0"),
        ({"background": 1.5}, "background must be an integer"),
        ({"objects": 0}, "number must be an integer of at least 1"),
    ],
)
def test_what_a_step_refuses(model, embeddings, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        training_prompts(model, embeddings, scene(), **change)


def test_loss_of_background_clicks_by_its_formula():
    """Focal and dice loss of the emptiest mask, and the squares of all predicted IoUs, in float64."""
    logits = torch.randn(1, 2, 3, 16, 16, dtype=torch.float64, generator=seeded())
    ious = torch.rand(1, 2, 3, dtype=torch.float64, generator=seeded(1))
    nothing = torch.zeros(1, 2, 16, 16)
    p = 1 / (1 + np.exp(-logits.numpy()))
    focal = (0.75 * p**2 * -np.log(1 - p)).mean((-2, -1))
    dice = 1 - 1 / (p.sum((-2, -1)) + 1)
    expected = ((20 * focal + dice).min(-1) + (ious.numpy() ** 2).mean(-1)).mean()
    torch.testing.assert_close(segmentation_loss(logits, ious, nothing).item(), expected, rtol=1e-12, atol=0)


def test_deepest_points_are_those_of_a_distance_map_of_the_whole_image():
    random = torch.rand(2, 3, 40, 50, generator=seeded()) < 0.8
    random[1, 2] = False
    points, depths = deepest_points(random)
    for at in np.ndindex(2, 3):
        distance = distance_transform_edt(np.pad(random[at].numpy(), 1))[1:-1, 1:-1]
        x, y = points[at].long().tolist()
        assert depths[at] == pytest.approx(distance.max())
        assert distance[y, x] == distance.max()
    assert points[1, 2].tolist() == [0, 0]


def test_deepest_errors():
    labels = torch.zeros(1, 4, 32, 32, dtype=torch.int8)
    labels[0, :, 4:21, 4:21] = 1
    logits = torch.where(labels == 1, 5.0, -5.0)
    logits[0, 0, 4:21, 4:15] = -5.0  # lacks eleven columns, whose middle is column 9
    logits[0, 1, 24:31, 2:9] = 5.0  # seven too many
    logits[0, 2, 24:31, 2:9] = 5.0
    labels[0, 2, 24:31, 2:9] = VOID_LABEL
    points, kinds = deepest_errors(logits, labels)
    assert points[0, 0].tolist() == [[9, 9]]
    assert points[0, 1].tolist() == [[5, 27]]
    assert kinds[0, :, 0].tolist() == [1, 0, PADDING_POINT, PADDING_POINT]


@torch.no_grad()
def test_scores_are_those_of_prompts_given_one_by_one(model, embeddings):
    labels = scene()
    scores = score_prompts(model, embeddings, labels, prompts_at_once=2)
    assert set(scores) == {"box", "1 click", "3 clicks"}
    for true, predicted in scores.values():
        assert true.isnan().tolist() == predicted.isnan().tolist() == [[False] * 3, [False, True, True]]
    for image, prompt in ((0, 0), (0, 1), (0, 2), (1, 0)):
        alone = {"image_embeddings": embeddings[image : image + 1]}
        target = labels[image : image + 1, prompt : prompt + 1]

        def iou(mask, target=target):
            return iou_and_dice(mask, target)[0].item()

        boxed = model(**alone, input_boxes=boxes_around(target), multimask_output=False)
        points = deepest_points(target == 1)[0][:, :, None]
        kinds = torch.ones(1, 1, 1, dtype=torch.int64)
        clicked = model(**alone, input_points=points, input_labels=kinds, multimask_output=True)
        best = clicked.iou_scores.argmax()
        found = {
            "box": (iou(boxed.pred_masks[:, :, 0]), boxed.iou_scores.item()),
            "1 click": (iou(clicked.pred_masks[:, :, best]), clicked.iou_scores.max().item()),
        }
        mask = clicked.pred_masks[:, :, best]
        for _ in range(2):
            more, more_kinds = deepest_errors(mask, target)
            points, kinds = torch.cat([points, more], 2), torch.cat([kinds, more_kinds], 2)
            output = model(
                **alone,
                input_points=points,
                input_labels=kinds,
                input_masks=mask[:, :, None],
                multimask_output=False,
            )
            mask = output.pred_masks[:, :, 0]
        found["3 clicks"] = iou(mask), output.iou_scores.item()
        for kind, expected in found.items():
            given = [tensor[image, prompt].item() for tensor in scores[kind]]
            assert given == pytest.approx(expected, abs=1e-3), kind
