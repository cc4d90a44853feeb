"""Masks of everything are those of transformers' pipeline and of Meta's generator: number, order, boxes and pixels."""

import numpy as np
import pytest
import torch
from everything import (
    IOU_TOLERANCE,
    NO_CROPS,
    OLD,
    PHOTOGRAPHS,
    assert_as_meta,
    assert_same_masks,
    ours,
    stock_pipeline,
    theirs,
    thresholds,
)
from models import split_model
from peft import LoraConfig, get_peft_model
from pycocotools import mask as coco
from transformers import SamModel

from conversion import fuse_state_dict

CASES = [
    *(("tiny_sam", photograph, layers) for photograph in PHOTOGRAPHS for layers in (0, 1)),
    *(("random", photograph, 0) for photograph in PHOTOGRAPHS),
    ("random", "astronaut", 1),
    ("tiny_sam", "coffee", 2),
]


def assert_same(model, image, found, expected):
    assert len(expected["scores"]) > 4, "too few masks to compare"
    assert len(found["scores"]) == len(expected["scores"])
    assert torch.equal(found["bounding_boxes"], expected["bounding_boxes"].long())
    torch.testing.assert_close(found["scores"], expected["scores"], atol=IOU_TOLERANCE, rtol=0)
    assert_same_masks(model, image, found, expected["masks"])


@pytest.mark.skipif(OLD, reason="this version's own pipeline resizes in another way")
@pytest.mark.parametrize(("name", "photograph", "layers"), CASES)
def test_stock_pipeline(name, photograph, layers):
    if layers and NO_CROPS:
        pytest.skip("this version's own pipeline fails on crops")
    points = 4 if layers == 2 else 8
    options = {
        "points_per_crop": points,
        "crops_n_layers": layers,
        "output_bboxes_mask": True,
        **thresholds(name, photograph, layers, points),
    }
    expected = stock_pipeline(name)(PHOTOGRAPHS[photograph], **options)
    found = ours(name).generate_masks(PHOTOGRAPHS[photograph], progress=False, output_details=True, **options)
    assert_same(ours(name), PHOTOGRAPHS[photograph], found, expected)


def test_stock_pipeline_of_every_version():
    image = PHOTOGRAPHS["astronaut"].crop((0, 0, 128, 90))  # as large as the model's input: nothing is resized
    options = {"points_per_crop": 8, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.5, "output_bboxes_mask": True}
    found = ours().generate_masks(image, output_details=True, **options)
    assert_same(ours(), image, found, stock_pipeline()(image, **options))


@pytest.mark.parametrize("photograph", PHOTOGRAPHS)
def test_meta(photograph):
    assert_as_meta(photograph)


def test_run_lengths_are_those_of_pycocotools():
    found = ours().generate_masks(
        PHOTOGRAPHS["coins"],
        points_per_crop=6,
        pred_iou_thresh=0,
        stability_score_thresh=0,
        output_rle_mask="compressed",
        output_details=True,
        progress=False,
    )
    uncompressed = ours().generate_masks(
        PHOTOGRAPHS["coins"],
        points_per_crop=6,
        pred_iou_thresh=0,
        stability_score_thresh=0,
        output_rle_mask=True,
        progress=False,
    )["rle_mask"]
    assert len(found["masks"]) > 10
    for mask, run_lengths, counts, area in zip(
        found["masks"], found["rle_mask"], uncompressed, found["areas"].tolist(), strict=True
    ):
        expected = coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        assert run_lengths["counts"] == expected["counts"].decode()
        assert run_lengths["size"] == expected["size"]
        assert coco.frPyObjects(counts, *counts["size"]) == expected
        assert coco.area(expected) == area == mask.sum()


def test_an_adapter_is_stock_with_the_merged_weights():
    torch.manual_seed(0)
    image = PHOTOGRAPHS["coffee"].crop((0, 0, 128, 100))  # as large as the model's input: nothing is resized
    options = {"points_per_crop": 8, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.4, "output_bboxes_mask": True}
    adapted = get_peft_model(split_model(theirs()), LoraConfig(target_modules=["q", "v"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.03)
    found = adapted.generate_masks(image, output_details=True, **options)
    merged = adapted.merge_and_unload()
    stock = SamModel(theirs().config)
    stock.load_state_dict({**stock.state_dict(), **fuse_state_dict(merged.state_dict())})
    expected = stock_pipeline(model=stock.eval())(image, **options)
    assert_same(merged, image, found, expected)
    assert found["scores"].tolist() != ours().generate_masks(image, **options)["scores"].tolist()
