"""Segment everything: a grid of points over an image and over its crops, and every good mask once.

    images ──> crops ──> image embeddings ──> masks of each point ──> filters ──> run lengths ──> each once

Arguments, defaults and results are those of transformers' mask-generation pipeline 5.x, on every version. Masks stay
at the decoder's resolution until their predicted IoU has passed; only the box that can hold a pixel is scaled up, a
bounded number of bytes at once; what is kept of a mask are its run lengths.

Sizes are (height, width), points (x, y), boxes (x0, y0, x1, y1), in pixels of the image.

This file, `images_` and `run_lengths_sam_split.py` are copied into each saved model folder. They import torch,
transformers and the standard library, and open no file but the images they are given.

Source: Segment Anything (arXiv 2304.02643), appendix B.
"""

import contextlib
import difflib
import itertools
import math
import numbers
import os
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Pipeline
from transformers.utils import logging

from .images_sam_split import pixels_of
from .run_lengths_sam_split import (
    Axis,
    box_of,
    columns_of,
    compressed,
    counts,
    joined,
    mask_of,
    near_crop_edge,
    run_edges,
    suppress,
    without_small_regions,
)

DECODED_BYTES = 2**25  # of masks that the decoder returns at once


@dataclass
class SamSplitMaskGenerationOptions:
    """What `generate_masks` takes beside the images. The first sixteen are transformers' own.

    Args:
        points_per_batch: prompts decoded at once at most; None for as many as memory allows.
        points_per_crop: points along a side of the grid.
        crops_n_layers: layer i of the crops has 4**i of them; 0 for the whole image alone.
        crop_overlap_ratio: overlap of the first layer's crops, as a share of the image's shorter side.
        crop_n_points_downscale_factor: layer i has `points_per_crop / factor**i` points along a side.
        timeout: seconds to wait for an image from the web.
        pred_iou_thresh, stability_score_thresh: a mask must exceed them; 0 lets all pass.
        mask_threshold: the logit above which a pixel is inside.
        stability_score_offset: stability is the IoU of the masks at the threshold plus and minus this.
        max_hole_area, max_sprinkle_area: holes and islands of so many pixels or fewer are removed.
        crops_nms_thresh: box IoU with a better mask above which a mask is a duplicate.
        output_rle_mask: True for `rle_mask`, pycocotools' uncompressed run lengths; "compressed" for its strings.
        output_bboxes_mask: whether to return `bounding_boxes`, (masks, 4).
        batch_size: images or crops that the image encoder takes at once.
        num_workers: changes nothing; images are opened as they are needed.
        point_grids: instead of the regular grid, (N, 2) in [0, 1], (x, y) across a crop; a list has one per layer.
        input_points: instead of a grid, (N, 2) in pixels of the image; a list has one per image.
        output_masks: whether to return `masks`, a (height, width) bool tensor each.
        output_details: whether to return `points` (masks, 2), `stability_scores`, `areas` (masks,) in pixels and
            `crop_boxes` (masks, 4), the latter with exclusive ends.
        output_label_map: whether to return `label_map`, (height, width) int32: 0 where no mask is, else 1 + the index
            of the smallest mask there.
        image_mean, image_std: of the three channels, in [0, 1].
        progress: whether to show a bar for work that takes longer than a few seconds.
    """

    points_per_batch: int | None = 64
    points_per_crop: int = 32
    crops_n_layers: int = 0
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: float = 1
    timeout: float | None = None
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    mask_threshold: float = 0
    stability_score_offset: float = 1
    max_hole_area: int | None = None
    max_sprinkle_area: int | None = None
    crops_nms_thresh: float = 0.7
    output_rle_mask: bool | str = False
    output_bboxes_mask: bool = False
    batch_size: int | None = None
    num_workers: int | None = None
    point_grids: object = None
    input_points: object = None
    output_masks: bool = True
    output_details: bool = False
    output_label_map: bool = False
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    progress: bool = True

    def __post_init__(self):
        self.batch_size = 1 if self.batch_size is None else self.batch_size
        for name, least in ("points_per_batch", 1), ("points_per_crop", 1), ("crops_n_layers", 0), ("batch_size", 1):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and (not isinstance(value, numbers.Real) or math.isnan(value)):
                raise ValueError(f"{field.name} must be a number, got {value!r}")
        if self.output_rle_mask not in (False, True, "compressed"):
            raise ValueError(f'output_rle_mask must be False, True or "compressed", got {self.output_rle_mask!r}')
        if self.input_points is not None and self.point_grids is not None:
            raise ValueError("give either input_points, in pixels, or point_grids, in [0, 1], not both")


class SamSplitMaskGenerationPipeline(Pipeline):
    """transformers' `pipeline("mask-generation", ...)` on `generate_masks`; options as its keywords, here or per call.

    It takes an image, a list of images, or anything that yields images, for which it yields results.
    """

    _load_processor = _load_tokenizer = _load_feature_extractor = False
    _load_image_processor = None  # for its mean and deviation, where one can be loaded
    preprocess = _forward = postprocess = None  # `__call__` has no use for them

    def _sanitize_parameters(self, **options):
        _options(options)
        return options, {}, {}

    def __call__(self, image: object, **options: object) -> Any:
        defaults = {"batch_size": self._batch_size, **self._preprocess_params}
        for name in ("image_mean", "image_std"):
            if getattr(self.image_processor, name, None) is not None:
                defaults.setdefault(name, getattr(self.image_processor, name))
        return generate_masks(self.model, image, **{**defaults, **options})


def generate_masks(model: torch.nn.Module, images: Any, **options: object) -> Any:
    """Segment everything in images.

    Args:
        model: a `SamSplitModel`, with adapters or without.
        images: one image, a list of them, or anything that yields them. An image is a path, a URL, a PIL image, an
            array (height, width[, channels]) or a tensor ([channels, ]height, width): gray, RGB or RGBA, with 8 or 16
            bits, or floating point in [0, 1].
        options: see `SamSplitMaskGenerationOptions`.

    Returns:
        A dict for an image, with `scores` (masks,) in falling order and what the options ask for; a list of dicts for
        a list; an iterator for anything else. Tensors are on the CPU.

    Raises:
        TypeError: for an unknown option, and for what is no image.
        ValueError: for an option or an image out of range.
    """
    chosen = _options(options)
    one = isinstance(images, (str, os.PathLike)) or hasattr(images, "convert") or not hasattr(images, "__iter__")
    if one or 0 < getattr(images, "ndim", 0) < 4:
        points = None if chosen.input_points is None else [chosen.input_points]
        return next(_results(model, [images], points, chosen))
    results = _results(model, images, chosen.input_points, chosen)
    return list(results) if isinstance(images, (list, tuple)) or hasattr(images, "ndim") else results


def _options(given):
    known = [field.name for field in fields(SamSplitMaskGenerationOptions)]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            cure = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}"
            raise TypeError(f"{name!r} is no option of mask generation; {cure}")
    return SamSplitMaskGenerationOptions(**given)


def _results(model, images, points, options):
    """Yield a result per image; crops of one or of several images pass the encoder together."""
    layers = range(options.crops_n_layers + 1)
    total = None  # where it is known only once the images are open
    if points is None and hasattr(images, "__len__"):
        total = len(images) * sum(4**layer * len(_point_grid(layer, options)) for layer in layers)
    images = iter(images)
    points = itertools.repeat(None) if points is None else iter(points)
    jobs = (crop for image in images for crop in _crops(image, next(points, None), options, model.config))
    with logging.tqdm(total=total, desc="segment", unit="point", delay=3, disable=not options.progress) as bar:
        found = []
        while batch := list(itertools.islice(jobs, options.batch_size)):
            embeddings = _encode(model, batch, options)
            for crop, embedding in zip(batch, embeddings, strict=True):
                found += _decode(model, crop, embedding[None], options, bar)
                if crop.is_last:
                    yield _result(found, crop.full_size, options)
                    found = []


# Crops and points


@dataclass
class _Crop:
    """A part of an image: its pixels (3, height, width), where it lies, and the points (N, 2) to try, in its frame."""

    pixels: torch.Tensor
    left: int
    top: int
    full_size: tuple[int, int]
    points: torch.Tensor
    resized: tuple[int, ...]  # (height, width), its size inside the model's padded input
    is_last: bool = False


def _crops(image, input_points, options, config):
    """The crops of an image, layer by layer, those of no pixel left out."""
    pixels = pixels_of(image, options.timeout)
    size = height, width = tuple(pixels.shape[1:])
    found = []
    for layer in range(options.crops_n_layers + 1):
        for left, top, right, bottom in _crop_boxes(layer, size, options.crop_overlap_ratio):
            if right <= left or bottom <= top:
                continue
            sides = torch.tensor([right - left, bottom - top])
            if input_points is None:
                points = _point_grid(layer, options) * sides
            else:
                points = torch.as_tensor(input_points, dtype=torch.float32).cpu()
                if points.ndim != 2 or points.shape[1] != 2:
                    raise ValueError(f"input_points must be (N, 2) per image, got {tuple(points.shape)}")
                points = points - torch.tensor([left, top])
                points = points[((points >= 0) & (points < sides)).all(1)] if layer else points
            rows, columns = (config.vision_config.patch_size * side for side in config.vision_config.grid)
            scale = min(rows / (bottom - top), columns / (right - left))
            resized = tuple(max(1, int(side * scale + 0.5)) for side in (bottom - top, right - left))
            found.append(_Crop(pixels[:, top:bottom, left:right], left, top, (height, width), points, resized))
    found[-1].is_last = True
    return found


def _crop_boxes(layer, size, overlap_ratio):
    """The (left, top, right, bottom) of a layer's 4**layer crops, column by column; right and bottom are exclusive."""
    number, (height, width) = 2**layer, size
    overlap = int(overlap_ratio * min(size) * (2 / number)) if layer else 0
    across, down = (math.ceil((overlap * (number - 1) + side) / number) for side in (width, height))
    lefts, tops = ([(length - overlap) * index for index in range(number)] for length in (across, down))
    return [(x, y, min(x + across, width), min(y + down, height)) for x in lefts for y in tops]


def _point_grid(layer, options):
    """The (N, 2) points of a layer's crops, (x, y) in [0, 1]."""
    if options.point_grids is not None:
        grids = options.point_grids
        if isinstance(grids, (list, tuple)) and layer >= len(grids):
            raise ValueError(
                f"point_grids has {len(grids)} grids, and layer {layer} of the crops needs one of its own"
            )
        grid = torch.as_tensor(grids[layer] if isinstance(grids, (list, tuple)) else grids, dtype=torch.float32)
        if grid.ndim != 2 or grid.shape[1] != 2 or not bool(((grid >= 0) & (grid <= 1)).all()):
            raise ValueError(f"a point grid must be (N, 2) in [0, 1], got {tuple(grid.shape)} or values beyond")
        return grid
    number = int(options.points_per_crop / options.crop_n_points_downscale_factor**layer)
    if number < 1:
        raise ValueError(
            f"points_per_crop={options.points_per_crop} leaves no point in layer {layer} with "
            f"crop_n_points_downscale_factor={options.crop_n_points_downscale_factor}; lower one or raise the other"
        )
    side = torch.linspace(1 / (2 * number), 1 - 1 / (2 * number), number)
    return torch.stack([side.repeat(number), side.repeat_interleave(number)], dim=-1)


# The model


@contextlib.contextmanager
def inference(model):
    """No gradients and no dropout inside; each module is then as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _encode(model, crops, options):
    """The image embeddings (B, C, H, W) of crops, resized on bytes as transformers' processor does."""
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (options.image_mean, options.image_std))
    pixel_values = torch.zeros(len(crops), *model.vision_encoder.patch_embed.expected_shape)  # no second copy of it
    for image, crop in zip(pixel_values, crops, strict=True):
        resized = crop.pixels
        if resized.shape[1:] != crop.resized:
            # A contiguous (1, 3, height, width): other strides are resized by other arithmetic.
            resized = resized[None].contiguous()
            resized = F.interpolate(resized, crop.resized, mode="bilinear", align_corners=False, antialias=True)[0]
        image[:, : resized.shape[1], : resized.shape[2]] = resized.float().sub(mean).div(std)
    with inference(model):
        return model.get_image_embeddings(pixel_values.to(model.device))


@dataclass
class _Found:
    """A mask that has passed the filters."""

    edges: torch.Tensor
    box: list[int]
    score: float
    stability: float
    point: list[float]
    crop_box: list[int]


def _decode(model, crop, embedding, options, bar):
    """The masks of a crop's points that pass the filters, in the points' order."""
    found, device = [], embedding.device
    (height, width), patch = crop.pixels.shape[1:], model.config.vision_config.patch_size
    rows, columns = model.config.vision_config.grid
    down = Axis(4 * rows, patch * rows, crop.resized[0], height, device)
    across = Axis(4 * columns, patch * columns, crop.resized[1], width, device)
    positions = model.get_image_wide_positional_embeddings()
    ratio = torch.tensor([crop.resized[1] / width, crop.resized[0] / height])
    corner = torch.tensor([crop.left, crop.top])
    limit = DECODED_BYTES // (12 * down.matrix.shape[1] * across.matrix.shape[1])  # three masks in float32
    for points in crop.points.split(max(1, min(options.points_per_batch or limit, limit))):
        if not len(points):
            continue
        with inference(model):
            prompts = model.get_prompt_embeddings((points * ratio).to(device)[None, :, None])  # of (1, P, 1, 2)
            least = options.pred_iou_thresh if options.pred_iou_thresh > 0 else None
            masks, scores, _ = model.mask_decoder(embedding, positions, *prompts, True, least_iou=least)
            per_point = scores.shape[2]
            masks, scores = masks[0].flatten(0, 1), scores.flatten().float()  # (P * M, 4 * H, 4 * W), (P * M,)
            if options.pred_iou_thresh > 0:
                kept = (scores > options.pred_iou_thresh).nonzero()[:, 0]
                masks, scores = masks[kept], scores[kept]
            else:
                kept = torch.arange(len(scores))
            limits = options.mask_threshold, options.stability_score_offset
            edges, stability = run_edges(masks, down, across, (crop.left, crop.top), crop.full_size[0], *limits)
            del masks  # before the next are decoded
        places = (points + corner)[kept.cpu() // per_point]
        for mask, score, stable, place in zip(edges, scores.tolist(), stability, places.tolist(), strict=True):
            if options.stability_score_thresh > 0 and not stable > options.stability_score_thresh:
                continue
            box = box_of(mask, crop.full_size[0]) or [crop.left, crop.top, crop.left, crop.top]
            crop_box = [crop.left, crop.top, crop.left + width, crop.top + height]
            if not near_crop_edge(box, crop_box, crop.full_size):
                found.append(_Found(joined(mask), box, score, stable, place, crop_box))
        bar.update(len(points))
    return found


# Results


def _result(found, size, options):
    """The masks of an image, best first, each once, as the options ask for."""
    boxes = torch.tensor([mask.box for mask in found], dtype=torch.long).view(-1, 4)
    scores = torch.tensor([mask.score for mask in found], dtype=torch.float32)
    found = [found[index] for index in suppress(boxes, scores, options.crops_nms_thresh).tolist()]
    if options.max_hole_area or options.max_sprinkle_area:
        found = _without_small_regions(found, size, options)
    areas = torch.tensor([int((mask.edges[1::2] - mask.edges[::2]).sum()) for mask in found], dtype=torch.long)
    result = {"scores": torch.tensor([mask.score for mask in found], dtype=torch.float32)}
    if options.output_masks:
        result = {"masks": [mask_of(mask.edges, size) for mask in found], **result}
    if options.output_rle_mask:
        write = compressed if options.output_rle_mask == "compressed" else torch.Tensor.tolist
        result["rle_mask"] = [{"size": list(size), "counts": write(counts(mask.edges, size))} for mask in found]
    if options.output_bboxes_mask:
        result["bounding_boxes"] = torch.tensor([mask.box for mask in found], dtype=torch.long).view(-1, 4)
    if options.output_details:
        result["points"] = torch.tensor([mask.point for mask in found]).view(-1, 2)
        result["stability_scores"] = torch.tensor([mask.stability for mask in found])
        result["areas"] = areas
        result["crop_boxes"] = torch.tensor([mask.crop_box for mask in found], dtype=torch.long).view(-1, 4)
    if options.output_label_map:
        result["label_map"] = torch.zeros(size, dtype=torch.int32)
        for index in areas.argsort(descending=True, stable=True).tolist():
            result["label_map"][mask_of(found[index].edges, size)] = index + 1
    return result


def _without_small_regions(found, size, options):
    """Fill small holes, drop small islands, and suppress anew, masks that were changed after those that were not."""
    changed = []
    for mask in found:
        edges = without_small_regions(mask.edges, size, options.max_hole_area or 0, options.max_sprinkle_area or 0)
        changed.append(not torch.equal(edges, mask.edges))
        if changed[-1]:
            mask.edges = edges
            mask.box = box_of(columns_of(edges, size[0]), size[0])
    boxes = torch.tensor([mask.box for mask in found], dtype=torch.long).view(-1, 4)
    kept = suppress(boxes, -torch.tensor(changed, dtype=torch.float32), options.crops_nms_thresh)
    return [found[index] for index in kept.sort().values.tolist()]
