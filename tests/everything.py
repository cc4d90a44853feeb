"""Photographs, oracles and thresholds for the tests of mask generation."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from models import meta_model, split_config, split_model, stock_model, tiny_config
from packaging.version import Version
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator
from skimage import data
from transformers import SamImageProcessor, SamModel, pipeline

from conversion import split_state_dict, to_meta
from conversion.cli.demo import TINY_SAM
from sam_split import SamSplitModel
from sam_split.mask_generation_sam_split import SamSplitMaskGenerationOptions, _crops, _encode

# Before 5.11 its own pipeline computes points and resized pixels in another way; crops fail in it at least until then.
VERSION = Version(transformers.__version__)
OLD, NO_CROPS = VERSION < Version("5.11"), VERSION < Version("5.23")

IOU_TOLERANCE = 1e-5

# Crops of real photographs, gray and in colour, wide and tall.
PHOTOGRAPHS = {
    "coins": Image.fromarray(data.coins()[:150, :230]).convert("RGB"),
    "astronaut": Image.fromarray(data.astronaut()[:190, 130:260]),
    "coffee": Image.fromarray(data.coffee()[150:290, 150:350]),
}


@functools.cache
def theirs(name="tiny_sam"):
    """Stock's model: the trained tiny SAM, or random weights of a geometry of which nothing was chosen."""
    return SamModel.from_pretrained(TINY_SAM).eval() if name == "tiny_sam" else stock_model(tiny_config(), seed=5)


@functools.cache
def ours(name="tiny_sam"):
    return split_model(theirs(name))


def stock_pipeline(name="tiny_sam", model=None):
    model = model or theirs(name)
    side = model.config.vision_config.image_size
    processor = SamImageProcessor.from_pretrained(TINY_SAM)
    processor.size, processor.pad_size = {"longest_edge": side}, {"height": side, "width": side}
    return pipeline("mask-generation", model=model, image_processor=processor, device="cpu")


@functools.cache
def model_for_meta():
    """Ours with the tiny SAM's weights and the decoder's epsilon as Meta has it."""
    model = SamSplitModel(split_config(theirs().config, layer_norm_eps=1e-5))
    model.load_state_dict(split_state_dict(theirs().state_dict()))
    return model.eval()


def meta_generator(**options):
    """Meta's generator with the tiny SAM's weights, on pixels that are resized as ours are."""
    sam = meta_model(theirs().config)
    sam.load_state_dict({**sam.state_dict(), **to_meta(model_for_meta().state_dict())})
    generator = SamAutomaticMaskGenerator(sam.eval(), **options)

    def resize(image):
        transform = generator.predictor.transform
        size = transform.get_preprocess_shape(*image.shape[:2], transform.target_length)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
        resized = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
        return resized[0].permute(1, 2, 0).numpy()

    generator.predictor.transform.apply_image = resize
    return generator


@functools.cache
def thresholds(name, photograph, layers, points, model=None):
    """Options for half of the masks by IoU and two thirds of those by stability, with no score within 1e-4 of them."""
    offset = 0.05 if name == "random" else 1  # random weights have small logits
    found = (model or ours(name)).generate_masks(
        PHOTOGRAPHS[photograph],
        points_per_crop=points,
        crops_n_layers=layers,
        pred_iou_thresh=0,
        stability_score_thresh=0,
        stability_score_offset=offset,
        crops_nms_thresh=1.0,
        output_masks=False,
        output_details=True,
        progress=False,
    )
    iou, stability = found["scores"], found["stability_scores"]
    iou_threshold = _between(iou, 0.5)
    stability_threshold = _between(stability[iou > iou_threshold], 0.35)
    return {
        "pred_iou_thresh": iou_threshold,
        "stability_score_thresh": stability_threshold,
        "stability_score_offset": offset,
        "crops_nms_thresh": 1.0 if name == "random" else 0.7,  # whose boxes are the whole image
    }


def _between(values, share):
    values = values[~values.isnan()].sort().values
    middle = int(share * len(values))
    nearby = values[max(0, middle - 20) : middle + 20]
    gap = nearby.diff().argmax()
    assert nearby.diff()[gap] > 2.2e-4
    return float(nearby[gap] + nearby[gap + 1]) / 2


@torch.no_grad()
def assert_same_masks(model, image, found, expected, threshold=0):
    """Masks agree but where the logit is the threshold to 1e-5; returns the number of pixels that differ."""
    differing = 0
    for index, (mask, other) in enumerate(zip(found["masks"], expected, strict=True)):
        different = mask != torch.as_tensor(other)
        if different.any():
            logits = _logits(model, image, found["points"][index], found["crop_boxes"][index], different)
            assert (logits - threshold).abs().min(0).values.max() < 1e-5
            differing += int(different.sum())
    return differing


def _logits(model, image, point, crop_box, where):
    """Full-size logits (masks, pixels) of a point where `where` is true, by transformers' two interpolations."""
    left, top, right, bottom = crop_box.tolist()
    options = SamSplitMaskGenerationOptions()
    points = point[None] - torch.tensor([left, top])
    (crop,) = _crops(image.crop((left, top, right, bottom)), points, options, model.config)
    scale = torch.tensor([crop.resized[1] / (right - left), crop.resized[0] / (bottom - top)])
    output = model(image_embeddings=_encode(model, [crop], options), input_points=(points * scale)[None, :, None])
    side = model.config.vision_config.image_size
    scaled = F.interpolate(output.pred_masks[0], (side, side), mode="bilinear", align_corners=False)
    scaled = scaled[..., : crop.resized[0], : crop.resized[1]]
    scaled = F.interpolate(scaled, (bottom - top, right - left), mode="bilinear", align_corners=False)[0]
    return scaled[:, where[top:bottom, left:right]]


@functools.cache
def meta_options(photograph):
    return {"points_per_crop": 8, **thresholds("meta", photograph, 0, 8, model=model_for_meta())}


@functools.cache
def metas_masks(photograph):
    """What Meta's generator returns for the same weights, points, thresholds and resized pixels."""
    limits = dict(meta_options(photograph))
    points, nms = limits.pop("points_per_crop"), limits.pop("crops_nms_thresh")
    return meta_generator(points_per_side=points, box_nms_thresh=nms, **limits).generate(
        np.array(PHOTOGRAPHS[photograph])
    )


def assert_as_meta(photograph):
    """Number, order, boxes, crops, points, scores and pixels are those of Meta's generator."""
    model, image, expected = model_for_meta(), PHOTOGRAPHS[photograph], metas_masks(photograph)
    found = model.generate_masks(
        image, output_details=True, output_bboxes_mask=True, progress=False, **meta_options(photograph)
    )
    assert len(expected) == len(found["scores"]) > 4
    x0, y0, x1, y1 = found["bounding_boxes"].unbind(1)
    assert torch.stack([x0, y0, x1 - x0, y1 - y0], 1).tolist() == [mask["bbox"] for mask in expected]
    differing = assert_same_masks(model, image, found, [torch.from_numpy(mask["segmentation"]) for mask in expected])
    assert (found["areas"] - torch.tensor([mask["area"] for mask in expected])).abs().sum() <= differing
    left, top, right, bottom = found["crop_boxes"].unbind(1)
    assert torch.stack([left, top, right - left, bottom - top], 1).tolist() == [mask["crop_box"] for mask in expected]
    for name, theirs in ("scores", "predicted_iou"), ("stability_scores", "stability_score"):
        expected_scores = torch.tensor([mask[theirs] for mask in expected])
        torch.testing.assert_close(found[name], expected_scores, atol=IOU_TOLERANCE, rtol=0)
    expected_points = torch.tensor([mask["point_coords"][0] for mask in expected], dtype=torch.float32)
    torch.testing.assert_close(found["points"], expected_points, atol=1e-4, rtol=0)


class Decoder(torch.nn.Module):
    """The tiny SAM, whose masks and scores pass a function first."""

    def __init__(self, change):
        super().__init__()
        self.config, self.device, self.change = ours().config, torch.device("cpu"), change
        self.vision_encoder = ours().vision_encoder
        for name in ("image_embeddings", "prompt_embeddings", "image_wide_positional_embeddings"):
            setattr(self, f"get_{name}", getattr(ours(), f"get_{name}"))

    def mask_decoder(self, *inputs, least_iou):
        masks, ious, added = ours().mask_decoder(*inputs)
        return *self.change(masks, ious), added
