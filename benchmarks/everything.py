"""Everything-mode of each peer on one seeded image, with masks that are smooth although the weights are random.

Random weights make masks of noise, whose run lengths no real image has. So a smooth image embedding takes the place of
the encoder's after it has run, the four children of each place are alike in the upscaling, and the last layer of the
hypernetworks is eight times as large. The IoU threshold lets a third of the masks pass, that of stability nearly all.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import interpolate

SIZES = {480: (480, 640), 3000: (3000, 4000)}  # rows -> (height, width) of the image in pixels


def smooth(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stock's weights, changed so that masks are smooth and confident."""
    for key, value in weights.items():
        if "upscale_conv" in key and key.endswith("weight"):
            weights[key] = value.mean((2, 3), keepdim=True).expand_as(value).contiguous()
        elif "hypernetworks" in key and "proj_out" in key:
            weights[key] = 8 * value
    return weights


def replace_embedding(encoder: nn.Module, channels: int, grid: int) -> None:
    """Let an image encoder run, and return a smooth seeded embedding (1, C, H, W) in place of its own."""
    coarse = torch.randn(1, channels, 5, 5, generator=torch.Generator().manual_seed(3))
    embedding = 2 * interpolate(coarse, size=(grid, grid), mode="bicubic")

    def put(module, arguments, output):
        if isinstance(output, torch.Tensor):
            return embedding.to(output).expand_as(output)
        output.last_hidden_state = embedding.to(output.last_hidden_state).expand_as(output.last_hidden_state)
        return output

    encoder.register_forward_hook(put)


def generator(peer: str, model: nn.Module, case: dict) -> Callable[[], torch.Tensor]:
    """A call that segments everything and returns, for each pixel of the image, the number of masks on it."""
    from PIL import Image

    height, width = SIZES[case["image_rows"]]
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    image, side = pixels.numpy(), round(case["prompts"] ** 0.5)
    channels, grid = (32 if case["model"] == "tiny" else 256), case["size"] // 16
    replace_embedding(model.image_encoder if peer == "meta" else model.vision_encoder, channels, grid)
    limits = {
        "pred_iou_thresh": iou_threshold(peer, model, case),
        "stability_score_thresh": 0.01,
        "stability_score_offset": 0.05,
    }
    if peer == "ours":
        options = {**limits, "points_per_crop": side, "output_rle_mask": True, "output_masks": False}
        found = lambda: model.generate_masks(image, progress=False, **options)["rle_mask"]  # noqa: E731
    elif peer == "meta":
        found = _meta(model, image, points_per_side=side, output_mode="uncompressed_rle", **limits)
    else:
        from transformers import MaskGenerationPipeline, SamImageProcessor

        padded = {"height": case["size"], "width": case["size"]}
        processor = SamImageProcessor(size={"longest_edge": case["size"]}, pad_size=padded)
        segment = MaskGenerationPipeline(model=model, image_processor=processor, device=case.get("device", "cpu"))
        options = {**limits, "points_per_crop": side, "output_rle_mask": True}
        found = lambda: segment(Image.fromarray(image), **options)["rle_mask"]  # noqa: E731

    def call():
        return covered(found(), height * width)

    return call


def _meta(model, image, **options):
    from segment_anything import SamAutomaticMaskGenerator
    from segment_anything.modeling import Sam

    sam = Sam(model.image_encoder, model.prompt_encoder, model.mask_decoder).eval()
    segment = SamAutomaticMaskGenerator(sam, **options)
    return lambda: [mask["segmentation"] for mask in segment.generate(image)]


@torch.no_grad()
def iou_threshold(peer: str, model: nn.Module, case: dict) -> float:
    """The predicted IoU that a third of the masks of a coarse grid exceed."""
    size = case["size"]
    at = (torch.arange(8) + 0.5) * size / 8
    points = torch.stack([at.repeat(8), 0.75 * at.repeat_interleave(8)], dim=-1)[None, :, None]
    blank = torch.zeros(1, 3, size, size)
    if peer == "meta":
        sparse, dense = model.prompt_encoder((points[0], torch.ones(64, 1)), None, None)
        positions = model.prompt_encoder.get_dense_pe()
        scores = model.mask_decoder(model.image_encoder(blank), positions, sparse, dense, True)[1]
    else:
        scores = model(blank, input_points=points).iou_scores
    return float(scores.flatten().quantile(2 / 3))


def covered(runs: list[dict], pixels: int) -> torch.Tensor:
    """How many masks lie on each pixel, from pycocotools' uncompressed run lengths."""
    changes = torch.zeros(pixels + 1)
    for run in runs:
        ends = torch.tensor(run["counts"]).cumsum(0)
        changes.index_add_(0, ends[:-1], torch.tensor([1.0, -1.0]).repeat(len(ends))[: len(ends) - 1])
    return changes[:pixels].cumsum(0)
