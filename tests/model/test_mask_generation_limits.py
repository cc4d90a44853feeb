"""Mask generation at its limits: deliberate bugs, scores at a threshold, memory, synchronisations, average recall."""

import contextlib
import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from everything import (
    PHOTOGRAPHS,
    Decoder,
    assert_as_meta,
    meta_options,
    metas_masks,
    model_for_meta,
    ours,
)
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from segment_anything.utils.amg import is_box_near_crop_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import nms

from sam_split import mask_generation_sam_split as generation
from sam_split import run_lengths_sam_split as runs

OPTIONS = {"points_per_crop": 4, "pred_iou_thresh": 0.2, "stability_score_thresh": 0.3, "output_bboxes_mask": True}


def wider_box(edges, height, original=runs.box_of):
    box = original(edges, height)
    return box and [*box[:2], box[2] + 1, box[3]]


def cut_support(self, start, end):
    return slice(int(self.first[start]), max(int(self.first[start]) + 1, int(self.last[end - 1])))


def cut_pixels(self, first, last, original=runs.Axis.reached):
    start, end = original(self, first, last)
    return start + 1, end


def suppress_last_first(boxes, scores, threshold, original=runs.suppress):
    return original(boxes, -scores, threshold)


def unbroken_columns(edges):
    return torch.cat([edges[:1], edges[-1:]])


MUTATIONS = {
    "box": (generation, "box_of", wider_box),
    "support": (runs.Axis, "support", cut_support),
    "pixels": (runs.Axis, "reached", cut_pixels),
    "suppression": (generation, "suppress", suppress_last_first),
    "runs": (generation, "joined", unbroken_columns),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(monkeypatch, name):
    assert_as_meta("coffee")
    owner, attribute, mutant = MUTATIONS[name]
    monkeypatch.setattr(owner, attribute, mutant)
    with pytest.raises(AssertionError):
        assert_as_meta("coffee")


def test_scores_at_a_threshold_do_not_pass():
    everything = {**OPTIONS, "crops_nms_thresh": 1.0, "output_details": True}
    found = ours().generate_masks(PHOTOGRAPHS["coffee"], **everything)
    for name, option in ("scores", "pred_iou_thresh"), ("stability_scores", "stability_score_thresh"):
        limit = float(found[name].sort().values[len(found[name]) // 2])
        fewer = ours().generate_masks(PHOTOGRAPHS["coffee"], **{**everything, option: limit})
        assert len(fewer["scores"]) == (found[name] > limit).sum() > 0


def test_a_logit_at_the_threshold_is_outside():
    def change(masks, scores):
        masks[:] = -3.0
        masks[..., 8:20, 4:30] = 0.5  # exactly the threshold, and interpolated to it
        masks[..., 10:14, 10:14] = 4.0
        return masks, scores

    image = PHOTOGRAPHS["coffee"].resize((64, 64))  # as large as the mask
    options = {**OPTIONS, "mask_threshold": 0.5, "stability_score_thresh": 0}
    found = generation.generate_masks(Decoder(change), image, **options)
    assert found["bounding_boxes"].tolist() == [[10, 10, 13, 13]] or found["bounding_boxes"][0].tolist() == [
        9,
        9,
        14,
        14,
    ]


def test_suppression_is_torchvisions():
    generator = np.random.default_rng(0)
    for size in (0, 1, 30, 300):
        corners = generator.integers(0, 40, (size, 4))
        boxes = torch.from_numpy(np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:] // 2], 1)).float()
        scores = torch.from_numpy(generator.integers(0, 50, size) / 50).float()  # with ties
        for threshold in (0.0, 0.1, 0.5, 2 / 3, 0.7, 1.0):
            assert torch.equal(runs.suppress(boxes, scores, threshold), nms(boxes, scores, threshold))


def test_the_edge_of_a_crop_is_metas():
    generator = np.random.default_rng(0)
    crop, size = [30, 50, 230, 180], (180, 400)
    seen = set()
    for _ in range(400):
        box = sorted(generator.integers(30, 231, 2)), sorted(generator.integers(50, 181, 2))
        box = [int(box[0][0]), int(box[1][0]), int(box[0][1]), int(box[1][1])]
        shifted = torch.tensor([box]) - torch.tensor([[30, 50, 30, 50]])
        expected = bool(is_box_near_crop_edge(shifted, crop, [0, 0, size[1], size[0]])[0])
        assert runs.near_crop_edge(box, crop, size) == expected
        seen.add(expected)
    assert seen == {True, False}
    assert runs.near_crop_edge([50, 90, 100, 120], crop, size)
    assert not runs.near_crop_edge([51, 90, 100, 120], crop, size)


def test_pieces_of_a_mask_make_the_same_mask(monkeypatch):
    options = {**OPTIONS, "output_rle_mask": True, "output_details": True}
    expected = ours().generate_masks(PHOTOGRAPHS["coffee"], **options)
    monkeypatch.setattr(runs, "work_bytes", lambda device: 9000)
    found = ours().generate_masks(PHOTOGRAPHS["coffee"], **options)
    assert found["rle_mask"] == expected["rle_mask"]
    assert torch.equal(found["stability_scores"], expected["stability_scores"])


def test_many_masks_at_once_make_the_same_masks(monkeypatch):
    """As on an accelerator, where masks share a box."""
    options = {**OPTIONS, "output_rle_mask": True, "output_details": True}
    expected = ours().generate_masks(PHOTOGRAPHS["coffee"], **options)
    monkeypatch.setattr(runs, "masks_at_once", lambda device, crop_bytes: 7)
    found = ours().generate_masks(PHOTOGRAPHS["coffee"], **options)
    assert found["rle_mask"] == expected["rle_mask"]
    assert torch.equal(found["stability_scores"], expected["stability_scores"])


class Synchronisations(TorchDispatchMode):
    """Counts what an accelerator would have to be waited for."""

    WAITS = "nonzero", "masked_select", "unique", "equal"

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.WAITS:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_synchronisations_do_not_grow_with_the_masks(monkeypatch):
    """`run_edges` waits for extents, and twice per piece, however many masks there are."""
    monkeypatch.setattr(runs, "masks_at_once", lambda device, crop_bytes: 1000)
    monkeypatch.setattr(runs, "work_bytes", lambda device: 2**28)
    counted = []
    down, across = runs.Axis(64, 128, 96, 150, "cpu"), runs.Axis(64, 128, 128, 200, "cpu")
    for number in 10, 200:
        masks = torch.nn.functional.interpolate(
            torch.randn(1, number, 8, 8, generator=torch.Generator().manual_seed(0)), (64, 64), mode="bilinear"
        )[0]
        with Synchronisations() as waits:
            edges, _ = runs.run_edges(masks, down, across, (0, 0), 150, 0.0, 0.5)
        assert sum(len(mask) > 0 for mask in edges) > number / 2
        counted.append(waits.found.count("nonzero"))
    assert counted[0] == counted[1] <= 2


def test_a_batch_of_points_waits_as_often_for_few_masks_as_for_many(monkeypatch):
    monkeypatch.setattr(runs, "masks_at_once", lambda device, crop_bytes: 1000)
    monkeypatch.setattr(runs, "work_bytes", lambda device: 2**28)
    called = []

    def counting(name, method):
        return lambda self, *args: called.append(name) or method(self, *args)

    for name in ("cpu", "tolist", "item", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
    waits, masks = [], []
    for iou in 0.8, 0.3:
        called.clear()
        options = {"points_per_crop": 8, "pred_iou_thresh": iou, "stability_score_thresh": 0, "crops_nms_thresh": 1.0}
        masks.append(len(ours().generate_masks(PHOTOGRAPHS["coffee"], output_masks=False, **options)["scores"]))
        waits.append(len(called))
    assert masks[1] > 5 * masks[0] > 0
    assert waits[0] == waits[1] <= 16


def resident():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@contextlib.contextmanager
def peak(result):
    """Add to `result` the bytes that the process grew by at most."""
    before, stop, highest = resident(), threading.Event(), [0]

    def watch():
        while not stop.is_set():
            highest[0] = max(highest[0], resident())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    stop.set()
    thread.join()
    result.append(highest[0] - before)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_memory_does_not_grow_with_masks_times_pixels():
    image = torch.from_numpy(np.array(PHOTOGRAPHS["coffee"].resize((4000, 3000)))).permute(2, 0, 1)
    options = {**OPTIONS, "output_masks": False, "output_rle_mask": "compressed", "crops_nms_thresh": 1.0}
    ours().generate_masks(image, **{**options, "points_per_crop": 2})
    grown, number = [], []
    for points in 2, 10:
        with peak(grown):
            number.append(len(ours().generate_masks(image, **{**options, "points_per_crop": points})["scores"]))
    assert number[1] > 10 * number[0] > 0
    assert max(grown) < 300e6, "25 masks of 12 MP in bool alone"
    assert grown[1] - grown[0] < 80e6


def test_average_recall_is_metas():
    rng = np.random.default_rng(0)
    images, truth, theirs, mine = [], [], [], []
    for index, (name, image) in enumerate(PHOTOGRAPHS.items(), start=1):
        expected = metas_masks(name)
        images.append({"id": index, "height": image.height, "width": image.width})
        # Any truth serves: some of the masks, damaged, which are found at some of the IoU thresholds.
        for mask in expected[::3]:
            damaged = mask["segmentation"].copy()
            damaged[rng.integers(0, 2, damaged.shape[0]).astype(bool) & (rng.random(damaged.shape[0]) < 0.5)] = False
            truth.append(annotation(damaged, index, len(truth) + 1))
        for mask in expected:
            theirs.append({**annotation(mask["segmentation"], index), "score": mask["predicted_iou"]})
        found = model_for_meta().generate_masks(
            image, output_rle_mask="compressed", output_masks=False, **meta_options(name)
        )
        for run_lengths, score in zip(found["rle_mask"], found["scores"].tolist(), strict=True):
            mine.append({"image_id": index, "category_id": 1, "segmentation": run_lengths, "score": score})
    expected = average_recall(images, truth, theirs)
    assert 0.1 < expected < 0.95
    assert average_recall(images, truth, mine) == pytest.approx(expected, abs=1e-12)


def annotation(mask, image, identity=0):
    run_lengths = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "id": identity,
        "image_id": image,
        "category_id": 1,
        "iscrowd": 0,
        "segmentation": {"size": run_lengths["size"], "counts": run_lengths["counts"].decode()},
        "area": int(mask.sum()),
        "bbox": coco_mask.toBbox(run_lengths).tolist(),
    }


def average_recall(images, truth, found):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": images, "annotations": truth, "categories": [{"id": 1, "name": "thing"}], "info": {}}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "segm")
        evaluation.params.useCats, evaluation.params.maxDets = 0, [1, 10, 100]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[8]
