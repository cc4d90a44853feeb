"""`sam_split.training`: ragged examples make one batch, prompts follow from masks, a cached prefix changes nothing."""

import pytest
import torch
from models import IMAGE_SIZE, boxes, pixels, split_model, stock_model, targets
from peft import LoraConfig, get_peft_model
from training_data import collator, example

from sam_split import VOID_LABEL
from sam_split.training import (
    PADDING_POINT,
    boxes_around,
    correcting_clicks,
    drop_prefix,
    iou_and_dice,
    jitter_boxes,
    points_inside,
    prefix_hidden_states,
    simulate_prompts,
)


@pytest.fixture(scope="module")
def collate():
    return collator()


@pytest.fixture(scope="module")
def model():
    return split_model(stock_model())


def test_ragged_batch(collate, model):
    batch = collate([example(48, 24, (4, 6, 9, 20)), example(96, 96, (1, 2, 30, 40), (50, 50, 90, 95))])
    assert batch["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    labels = batch["labels"]
    assert labels.shape == (2, 2, IMAGE_SIZE, IMAGE_SIZE)
    assert labels[0, 0, 12:42, 8:20].eq(1).all(), "twice the size"
    assert labels[0, 0, :, :48].eq(1).sum() == 30 * 12
    assert labels[0, 0, :, 48:].eq(VOID_LABEL).all(), "the image's padding"
    assert labels[0, 1].eq(VOID_LABEL).all(), "a padding prompt"
    assert batch["input_boxes"].tolist() == [[[8, 12, 19, 41], [0, 0, 0, 0]], [[1, 2, 30, 40], [50, 50, 90, 95]]]
    output = model(**batch)
    alone = model(**collate([example(48, 24, (4, 6, 9, 20))]))
    torch.testing.assert_close(output.pred_masks[:1, :1], alone.pred_masks, rtol=1e-4, atol=1e-4)
    other = model(**collate([example(96, 96, (1, 2, 30, 40), (50, 50, 90, 95))]))
    torch.testing.assert_close(output.loss, (alone.loss + 2 * other.loss) / 3)


def test_given_boxes_and_ragged_points(collate):
    first = {"boxes": [[2, 3, 20, 40]], "points": [[[4, 5], [6, 7]]], "point_labels": [[1, 0]]}
    second = {"boxes": [[0, 0, 9, 9]] * 2, "points": [[[8, 9]], [[1, 1], [2, 2], [3, 3]]], "point_labels": None}
    batch = collate([example(48, 24, (4, 6, 9, 20), **first), example(96, 96, *[(1, 2, 30, 40)] * 2, **second)])
    assert batch["input_boxes"][0].tolist() == [[4, 6, 40, 80], [0, 0, 0, 0]]
    assert batch["input_points"][0, 0].tolist() == [[8, 10], [12, 14], [0, 0]]
    assert batch["input_labels"].tolist() == [
        [[1, 0, PADDING_POINT], [PADDING_POINT] * 3],
        [[1, PADDING_POINT, PADDING_POINT], [1, 1, 1]],
    ]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_jitter():
    box = torch.tensor([[[40.0, 30, 60, 80]]]).expand(500, 3, 4)
    moved = jitter_boxes(box, (96, 96), generator())
    deviation = (moved - box).std((0, 1))
    torch.testing.assert_close(deviation, torch.tensor([2.0, 5, 2, 5]), rtol=0.1, atol=0)
    assert torch.equal(moved, jitter_boxes(box, (96, 96), generator()))
    assert not torch.equal(moved, jitter_boxes(box, (96, 96), generator(1)))
    wild = jitter_boxes(box, (70, 64), generator(), share=3.0)
    at_corner = jitter_boxes(torch.tensor([[[0.0, 0, 9, 9]]]).expand(50, 1, 4), (70, 64), generator(), share=3.0)
    assert at_corner[..., :2].amin((0, 1)).tolist() == [0, 0], "the first row and column are in the image"
    assert (wild[..., :2] >= 0).all()
    assert (wild[..., 2:] <= torch.tensor([63.0, 69])).all()
    assert (wild[..., :2] <= wild[..., 2:]).all()
    assert (jitter_boxes(box, (960, 960), generator(), share=3.0) - box).abs().max() == 20


def test_points_inside():
    region = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    region[0, 0, 2:4, 5:8] = True
    points = points_inside(region, 600, generator())
    assert points.shape == (1, 2, 600, 2)
    seen, counts = points[0, 0].unique(dim=0, return_counts=True)
    assert seen.tolist() == [[x, y] for x in (5, 6, 7) for y in (2, 3)]
    assert counts.min() > 60, "uniform: 100 each"
    assert points[0, 1].eq(0).all()


def test_correcting_clicks():
    labels = torch.zeros(1, 4, 8, 8, dtype=torch.int8)
    labels[..., :4] = 1
    labels[0, 3] = VOID_LABEL
    logits = torch.where(labels == 1, 1.0, -1.0)
    logits[0, 0, 5, 2] = -1.0  # lacks a pixel of the object
    logits[0, 1, 6, 7] = 1.0  # has one too many
    points, point_labels = correcting_clicks(logits, labels, generator())
    assert points[0, :2, 0].tolist() == [[2, 5], [7, 6]]
    assert point_labels[..., 0].tolist() == [[1, 0, PADDING_POINT, PADDING_POINT]]


@pytest.mark.parametrize("points_only", [True, False])
def test_simulated_prompts(model, points_only):
    labels = targets(IMAGE_SIZE)
    labels[0, 2] = VOID_LABEL
    embeddings = model.get_image_embeddings(pixels())
    for rounds in (0, 1, 3):
        prompts = simulate_prompts(model, embeddings, labels, rounds, generator(), points_only)
        assert ("input_boxes" in prompts) != points_only
        assert prompts["multimask_output"] == (points_only and rounds == 0)
        clicks = prompts["input_points"].shape[2] if "input_points" in prompts else 0
        assert clicks == points_only + rounds
        if points_only:
            assert prompts["input_labels"][:, :2, 0].eq(1).all(), "the first click is on the object"
        if clicks:
            assert prompts["input_labels"][0, 2].eq(PADDING_POINT).all(), "padding is never clicked on"
        assert ("input_masks" in prompts) == (rounds > 0)
        assert not any(torch.is_tensor(value) and value.requires_grad for value in prompts.values())
        again = simulate_prompts(model, embeddings, labels, rounds, generator(), points_only)
        assert all(torch.equal(torch.as_tensor(prompts[name]), torch.as_tensor(again[name])) for name in prompts)
        model(image_embeddings=embeddings, **prompts, labels=labels).loss.backward()
        embeddings = embeddings.detach()


def test_iou_and_dice():
    labels = torch.zeros(1, 3, 4, 4)
    labels[0, 0, :2] = 1  # 8 pixels
    labels[0, 0, 3] = VOID_LABEL
    labels[0, 2] = VOID_LABEL
    logits = torch.full((1, 3, 4, 4), -1.0)
    logits[0, 0, 1:] = 1.0  # 4 right, 4 wrong, 4 void
    iou, dice = iou_and_dice(logits, labels)
    assert iou[0, :2].tolist() == [4 / 12, 1.0]
    assert dice[0, :2].tolist() == [0.5, 1.0]
    assert iou[0, 2].isnan()
    assert dice[0, 2].isnan()
    assert iou_and_dice(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 8, 8))[0].item() == 1.0


def test_boxes_around():
    labels = torch.zeros(1, 2, 9, 7)
    labels[0, 0, 3:8, 2:4] = 1
    assert boxes_around(labels).tolist() == [[[2, 3, 3, 7], [0, 0, 0, 0]]]


def test_cached_prefix_equals_the_whole_model():
    """Same loss and same gradients, bit for bit, with adapters in the layers that stay."""
    torch.manual_seed(0)
    whole, cut = split_model(stock_model()), split_model(stock_model())
    hidden_states = prefix_hidden_states(cut, pixels(), 1)
    assert hidden_states.shape == (2, 6, 6, 32)
    drop_prefix(cut, 1)
    config = LoraConfig(r=4, target_modules=["q", "v"], layers_to_transform=[1], layers_pattern="layers")
    whole, cut = get_peft_model(whole, config), get_peft_model(cut, config)
    trainable = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    assert trainable.keys() == {name for name, p in cut.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.normal_()
            cut.get_parameter(name).copy_(parameter)
    losses = []
    for model, inputs in ((whole, pixels()), (cut, hidden_states)):
        losses.append(model(pixel_values=inputs, **boxes(), labels=targets()).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    for name, parameter in trainable.items():
        assert parameter.grad.abs().max() > 0, name
        assert torch.equal(parameter.grad, cut.get_parameter(name).grad), name
