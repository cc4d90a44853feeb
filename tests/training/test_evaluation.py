"""The evaluation's numbers are plain references', it leaves the model as it was, and holds little of a large image."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import AutoProcessor

from sam_split import VOID_LABEL, SamSplitModel
from sam_split.mask_generation_sam_split import SamSplitMaskGenerationOptions
from sam_split.training import (
    CachedImages,
    SamSplitCollator,
    boxes_around,
    drop_prefix,
    evaluate,
    evaluation,
    evaluation_table,
    prefix,
    recall,
    score_prompts,
)

ROOT = Path(__file__).parents[2]
QUIET = {"everything": False, "progress": False}
KINDS = {"box": "box", "1 click": "1_click", "3 clicks": "3_clicks"}


@pytest.fixture
def model(base):
    return SamSplitModel.from_pretrained(base)


@pytest.fixture(scope="module")
def processor(base):
    return AutoProcessor.from_pretrained(base)


@pytest.fixture(scope="module")
def coins(coins):
    """Three crops with coins, of different shapes; the first with void around a coin."""
    examples = []
    for path, cut in zip(sorted((coins / "test" / "images").iterdir())[::3], (128, 100, 90), strict=False):
        instances = np.asarray(Image.open(coins / "test" / "masks" / path.name))[:, :cut]
        image = Image.open(path).crop((0, 0, cut, 128))
        masks = [instances == value for value in np.unique(instances) if value]
        masks = np.stack([mask for mask in masks if mask.sum() >= 200]).astype(np.int8)
        examples.append({"name": path.name, "image": image, "masks": masks})
    examples[0]["masks"][0, :, :20] = VOID_LABEL
    return examples


def ious(found, objects):
    """IoU (masks, objects) of bool masks with objects in {0, 1, void}."""
    table = np.zeros((len(found), len(objects)))
    for i, mask in enumerate(found):
        for j, truth in enumerate(objects):
            inside, wanted = mask & (truth != VOID_LABEL), truth == 1
            table[i, j] = (inside & wanted).sum() / (inside | wanted).sum()
    return table


def recalls(found, scores, objects):
    """The recall at ten thresholds of an image's objects: the best masks first, each takes the best object left."""
    best = np.argsort(-np.asarray(scores), kind="stable")[:100]
    table = ious([found[i] for i in best], objects)
    matched = []
    for threshold in np.linspace(0.5, 0.95, 10):
        free = np.ones(len(objects), bool)
        for row in table:
            chosen = np.where(free, row, -1).argmax()
            free[chosen] &= row[chosen] < threshold if free[chosen] else False
        matched.append(~free)
    return np.array(matched)  # (thresholds, objects)


def random_scene(generator, objects, found, void):
    """Rectangles, and others near them, with scores that repeat."""

    def rectangles(corners):
        masks = np.zeros((len(corners), 60, 80), np.int8)
        for mask, (x, y, width, height) in zip(masks, corners, strict=True):
            mask[y : y + height, x : x + width] = 1
        return masks

    corners = np.column_stack([generator.integers(0, 60, objects), generator.integers(0, 40, objects)])
    corners = np.column_stack([corners, generator.integers(8, 20, (objects, 2))])
    chosen = corners[generator.integers(0, objects, found)]
    truth = rectangles(corners)
    if void:
        truth[::2, 20:30][truth[::2, 20:30] == 0] = VOID_LABEL
    masks = rectangles(np.maximum(chosen + generator.integers(-2, 3, (found, 4)), 0)) == 1
    return truth, masks, generator.integers(0, 40, found) / 40


@pytest.mark.parametrize("void", [False, True])
def test_average_recall_is_a_plain_references(void):
    generator = np.random.default_rng(0)
    scenes = [random_scene(generator, *counts, void) for counts in ((6, 9), (25, 140), (3, 0), (1, 4))]
    expected = [recalls(masks, scores, truth) for truth, masks, scores in scenes]
    objects = [[recall.object_entry(mask) for mask in truth] for truth, _, _ in scenes]
    found = [
        [
            recall.mask_entry(coco_mask.encode(np.asfortranarray(mask, np.uint8)), score=score)
            for mask, score in zip(masks, scores, strict=True)
        ]
        for _, masks, scores in scenes
    ]
    average, at_half, each = recall.average_recall(objects, found)
    together = np.concatenate(expected, axis=1)
    assert average == pytest.approx(together.mean(), abs=1e-12)
    assert at_half == pytest.approx(together[0].mean(), abs=1e-12)
    assert each == pytest.approx(np.array([(own.mean(), own[0].mean()) for own in expected]), abs=1e-12)
    assert 0.1 < average < at_half < 1
    assert each[2].tolist() == [0, 0]
    if void:  # matters here
        without = [[{**mask, "void": None} for mask in masks] for masks in objects]
        for mask in (mask for masks in without for mask in masks):
            del mask["void"]
        assert recall.average_recall(without, found)[0] < average


def test_nothing_found_is_zero():
    truth = np.zeros((2, 9, 9), np.int8)
    truth[:, 2:5, 3:6] = 1
    average, at_half, each = recall.average_recall([[recall.object_entry(mask) for mask in truth]] * 2, [[], []])
    assert (average, at_half, each.tolist()) == (0, 0, [[0, 0], [0, 0]])


def test_prompted_scores_are_means_over_objects(model, processor, coins):
    found = evaluate(model, processor, coins, **QUIET)
    collate, scores = SamSplitCollator(processor), []
    for row, example in zip(found.images, coins, strict=True):
        batch = collate([{"image": example["image"], "masks": example["masks"]}])
        with torch.no_grad():
            embeddings = model.get_image_embeddings(batch["pixel_values"])
            own = score_prompts(model, embeddings, batch["labels"])
        own = {kind: torch.stack(pair)[:, 0].double() for kind, pair in own.items()}
        scores.append(own)
        assert (row["name"], row["objects"]) == (example["name"], len(example["masks"]))
        for kind, name in KINDS.items():
            assert row[f"iou_{name}"] == pytest.approx(own[kind][0].mean().item(), abs=1e-6)
            assert row[f"error_{name}"] == pytest.approx((own[kind][0] - own[kind][1]).abs().mean().item(), abs=1e-6)
    for kind, name in KINDS.items():
        true, predicted = torch.cat([own[kind] for own in scores], dim=1)
        assert found.means[f"iou_{name}"] == pytest.approx(true.mean().item(), abs=1e-6)
        assert found.means[f"error_{name}"] == pytest.approx((true - predicted).abs().mean().item(), abs=1e-6)
    assert found.means["iou_box"] != pytest.approx(np.mean([row["iou_box"] for row in found.images]), abs=1e-4)
    assert 0.3 < found.means["iou_1_click"] < found.means["iou_box"] < 1
    assert list(found.means) == [f"{kind}_{name}" for kind in ("iou", "error") for name in KINDS.values()]
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False)) == {"means": found.means, "images": found.images}


def test_boxed_masks_are_the_processors(model, processor, coins):
    """At full resolution, to the pixel."""
    found = evaluate(model, processor, coins, **QUIET)
    for masks, example in zip(found.masks, coins, strict=True):
        batch = SamSplitCollator(processor)([{"image": example["image"], "masks": example["masks"]}])
        with torch.no_grad():
            boxes = boxes_around(batch["labels"])
            output = model(pixel_values=batch["pixel_values"], input_boxes=boxes, multimask_output=False)
        size = example["masks"].shape[1:]
        resized = [max(1, int(side * 128 / max(size) + 0.5)) for side in size]
        expected = processor.image_processor.post_process_masks(output.pred_masks, [size], [resized])[0][:, 0].numpy()
        ours = [coco_mask.decode(mask["segmentation"]) for mask in masks["box"]]
        assert np.array_equal(ours, expected)
        truth = [coco_mask.decode(mask["segmentation"]) for mask in masks["objects"]]
        assert np.array_equal(truth, example["masks"] == 1)
        assert all(mask["area"] == pixels.sum() > 100 for mask, pixels in zip(masks["objects"], truth, strict=True))


def test_everything_mode_is_measured_at_its_defaults(model, processor, coins, monkeypatch):
    """Recall is that of what `generate_masks` finds; the tiny SAM finds more below the default thresholds."""
    given, low = [], {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.6, "points_per_crop": 12}

    def lower(**options):
        given.append(options.keys())
        return SamSplitMaskGenerationOptions(**options, **low)

    monkeypatch.setattr(evaluation, "SamSplitMaskGenerationOptions", lower)
    found = evaluate(model, processor, coins, progress=False)
    assert given == [{"output_masks", "output_rle_mask"}] * len(coins)
    statistics = {name: getattr(processor.image_processor, name) for name in ("image_mean", "image_std")}
    expected = []
    for row, example in zip(found.images, coins, strict=True):
        pixels = np.array(example["image"].convert("RGB"))
        masks = model.generate_masks(pixels, **low, **statistics)
        expected.append(recalls([mask.numpy() for mask in masks["masks"]], masks["scores"], example["masks"]))
        assert row["masks"] == len(masks["masks"])
        assert row["average_recall"] == pytest.approx(expected[-1].mean(), abs=1e-6)
        assert row["recall_50"] == pytest.approx(expected[-1][0].mean(), abs=1e-6)
    expected = np.concatenate(expected, axis=1)
    assert found.means["average_recall"] == pytest.approx(expected.mean(), abs=1e-6)
    assert found.means["recall_50"] == pytest.approx(expected[0].mean(), abs=1e-6)
    assert found.means["masks"] == pytest.approx(np.mean([row["masks"] for row in found.images]), abs=1e-6)
    assert 0.1 < found.means["average_recall"] < found.means["recall_50"]


def test_an_image_without_found_masks_counts_as_nothing_found(model, processor, coins, monkeypatch):
    strict = functools.partial(SamSplitMaskGenerationOptions, pred_iou_thresh=1e9)
    monkeypatch.setattr(evaluation, "SamSplitMaskGenerationOptions", strict)
    found = evaluate(model, processor, coins[:2], progress=False)
    for values in (found.means, *found.images):
        assert (values["average_recall"], values["recall_50"], values["masks"]) == (0, 0, 0)
    assert "AR@100                   | 0.000 |" in str(found)


def test_an_object_that_vanishes_at_the_models_resolution_is_not_found(model, processor):
    """It counts as IoU 0, and is padding in a batch: it is neither prompted nor trained on."""
    masks = np.zeros((2, 1200, 800), np.int8)
    masks[0, 100:400, 100:600], masks[1, 790:792, 5:7] = 1, 1
    example = {"name": "a", "image": np.full((1200, 800), 90, np.uint8), "masks": masks}
    alone = evaluate(model, processor, [{**example, "masks": masks[:1]}], **QUIET).means
    both = evaluate(model, processor, [example], **QUIET).means
    assert alone["iou_box"] > 0.1
    for kind in KINDS.values():
        assert both[f"iou_{kind}"] == pytest.approx(alone[f"iou_{kind}"] / 2, abs=1e-4)
    batch = SamSplitCollator(processor)([example])
    assert (batch["labels"][0, 1] == VOID_LABEL).all()
    assert (batch["labels"][0, 0] == 1).any()
    assert batch["input_boxes"][0, 1].tolist() == [0, 0, 0, 0]


def test_many_objects_are_measured_in_pieces(model, processor, coins, monkeypatch):
    """And the image is encoded once, for everything-mode as well."""
    whole = evaluate(model, processor, coins[:1], progress=False)
    sizes, encoded, encode = [], [], model.get_image_embeddings

    def in_piece(model, embeddings, labels):
        sizes.append(labels.shape[1])
        return score_prompts(model, embeddings, labels)

    monkeypatch.setattr(evaluation, "score_prompts", in_piece)
    monkeypatch.setattr(model, "get_image_embeddings", lambda pixels: encoded.append(1) or encode(pixels))
    monkeypatch.setattr(evaluation, "PIXELS_AT_ONCE", 2 * 128 * 128)
    pieces = evaluate(model, processor, coins[:1], progress=False)
    assert sizes == [2, 2, 1]
    assert len(encoded) == 1
    assert pieces.images[0] == pytest.approx(whole.images[0], abs=2e-6)
    assert pieces.masks == whole.masks


def test_what_frozen_layers_computed_gives_the_same(model, processor, coins, tmp_path):
    expected = evaluate(model, processor, coins[:2], progress=False)
    cached = CachedImages(coins[:2], SamSplitCollator(processor), model.eval(), 3, tmp_path)
    assert evaluate(drop_prefix(model, 3), processor, coins[:2], progress=False, cached=cached) == expected


def test_what_is_encoded_is_counted(model, processor, coins, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(prefix.logging, "tqdm", lambda items, **options: made.append(options) or items)
    for show in (True, False):
        CachedImages(coins[:1], SamSplitCollator(processor), model.eval(), 1, tmp_path, show)
    assert [(options["desc"], options["unit"], options["disable"]) for options in made] == [
        ("encode", "image", False),
        ("encode", "image", True),
    ]


def adapted(model, **options):
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q", "v"], **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return adapted


def test_adapters_on_off_and_merged(model, processor, coins):
    before = evaluate(model, processor, coins[:2], **QUIET)
    peft = adapted(model, lora_dropout=0.5)
    peft.train()
    peft.base_model.model.mask_decoder.eval()
    modes = {name: module.training for name, module in peft.named_modules()}
    after = evaluate(peft, processor, coins[:2], **QUIET)
    assert modes == {name: module.training for name, module in peft.named_modules()}
    assert all(parameter.grad is None for parameter in peft.parameters())
    assert abs(after.means["iou_box"] - before.means["iou_box"]) > 1e-3, "the adapter matters"
    assert evaluate(peft, processor, coins[:2], **QUIET) == after, "no dropout"
    with peft.disable_adapter():
        assert evaluate(peft, processor, coins[:2], **QUIET) == before
    merged = evaluate(peft.merge_and_unload(), processor, coins[:2], **QUIET)
    assert merged.means == pytest.approx(after.means, abs=5e-3)  # pixels whose logit is almost 0


def test_a_mode_is_restored_after_an_error(model, processor, coins):
    model.train()
    with pytest.raises(ValueError, match=r"example '1.png' has no object"):
        evaluate(model, processor, [{"name": "1.png", "image": coins[0]["image"], "masks": []}], **QUIET)
    assert model.training
    assert model.mask_decoder.training


def test_bfloat16(model, processor, coins):
    expected = evaluate(model, processor, coins[:1], **QUIET).means
    found = evaluate(model.bfloat16(), processor, coins[:1], **QUIET).means
    assert found == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "at least one example, got none"),
        ([{"image": np.zeros((9, 9), np.uint8)}], "example 0 must be a dict with an image and masks"),
        (["a.png"], "example 0 must be a dict with an image and masks"),
        (
            [{"image": np.zeros((9, 9), np.uint8), "masks": np.zeros((1, 9, 9))}],
            r"masks \[0\] of example .* are empty",
        ),
        ([{"image": np.zeros((9, 9), np.uint8), "masks": np.ones((9, 9))}], r"masks of example 0 must be \(P, height"),
    ],
)
def test_bad_examples(model, processor, examples, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, processor, examples, **QUIET)


def test_table(model, processor, coins):
    before = evaluate(model, processor, coins[:1], **QUIET)
    after = evaluate(adapted(model), processor, coins[:1], **QUIET)
    lines = evaluation_table({"base": before, "adapted": after}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["1 image, 5 objects", "base", "adapted", "change"]
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + len(before.means)
    for (label, *values), (name, value) in zip(cells[2:], before.means.items(), strict=True):
        assert label == evaluation.MEASURES[name]
        assert values == [f"{value:.3f}", f"{after.means[name]:.3f}", f"{after.means[name] - value:+.3f}"]
