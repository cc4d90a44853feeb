"""Every wrong input raises one ValueError that says what was given and what is expected."""

import re

import pytest
import torch
from models import CHANNELS, GRID, IMAGE_SIZE, boxes, draw, masks, pixels, points, split_model, stock_model

from sam_split import SamSplitConfig, SamSplitMaskDecoderConfig, SamSplitPromptEncoderConfig, SamSplitVisionConfig


@pytest.fixture(scope="module")
def ours():
    return split_model(stock_model())


def embeddings(*shape: int) -> torch.Tensor:
    return draw(*(shape or (2, CHANNELS, GRID, GRID)), seed=1)


POINTS, LABELS = points(1)["input_points"], points(1)["input_labels"]
BOXES, MASKS = boxes()["input_boxes"], masks()["input_masks"]
PIXELS = {"pixel_values": pixels()}

# What is given, and what the message must say: the argument, what is expected and what came.
WRONG = {
    "no_image": ({}, "pixel_values or image_embeddings, got neither"),
    "two_images": ({**PIXELS, "image_embeddings": embeddings()}, "pixel_values or image_embeddings, got both"),
    "pixels_without_batch": ({"pixel_values": pixels()[0]}, "pixel_values must be (B, 3, 96, 96), got (3, 96, 96)"),
    "pixels_too_small": (
        {"pixel_values": pixels()[..., :80]},
        "pixel_values must be (B, 3, 96, 96), got (2, 3, 96, 80)",
    ),
    "pixels_grey": ({"pixel_values": pixels()[:, :1]}, "pixel_values must be (B, 3, 96, 96), got (2, 1, 96, 96)"),
    "pixels_channels_last": (
        {"pixel_values": pixels().permute(0, 2, 3, 1)},
        "pixel_values must be (B, 3, 96, 96), got (2, 96, 96, 3)",
    ),
    "embeddings_of_another_grid": (
        {"image_embeddings": embeddings(2, CHANNELS, 4, 4)},
        "image_embeddings must be (B, 32, 6, 6), got (2, 32, 4, 4)",
    ),
    "embeddings_without_batch": (
        {"image_embeddings": embeddings()[0]},
        "image_embeddings must be (B, 32, 6, 6), got (32, 6, 6)",
    ),
    "points_without_prompts": (
        {**PIXELS, "input_points": POINTS[:, 0]},
        "input_points must be (B, P, N, 2), got (2, 4, 2)",
    ),
    "points_in_space": (
        {**PIXELS, "input_points": POINTS.repeat(1, 1, 1, 2)[..., :3]},
        "input_points must be (B, P, N, 2), got (2, 3, 4, 3)",
    ),
    "no_prompt_in_boxes": ({**PIXELS, "input_boxes": BOXES[:, :0]}, "hold no prompt (P = 0); leave them out"),
    "labels_without_points": ({**PIXELS, "input_labels": LABELS}, "input_labels were given without input_points"),
    "labels_of_other_points": (
        {**PIXELS, "input_points": POINTS, "input_labels": LABELS[:, :, :3]},
        "input_labels must be (B, P, N) = (2, 3, 4) like input_points, got (2, 3, 3)",
    ),
    "labels_with_an_axis_too_many": (
        {**PIXELS, "input_points": POINTS, "input_labels": LABELS[..., None]},
        "input_labels must be (B, P, N) = (2, 3, 4) like input_points, got (2, 3, 4, 1)",
    ),
    "boxes_without_prompts": (
        {**PIXELS, "input_boxes": BOXES[:, 0]},
        "input_boxes must be (B, P, 4), got (2, 4); add the prompt axis with input_boxes[:, None]",
    ),
    "boxes_as_corners": (
        {**PIXELS, "input_boxes": BOXES.unflatten(-1, (2, 2))},
        "input_boxes must be (B, P, 4), got (2, 3, 2, 2)",
    ),
    "boxes_of_other_prompts": (
        {**PIXELS, "input_points": POINTS, "input_boxes": BOXES[:, :2]},
        "input_points and input_boxes must have as many prompts, got 3 and 2",
    ),
    "masks_too_large": (
        {**PIXELS, "input_masks": draw(2, 1, 96, 96, seed=1)},
        "input_masks must be (B, 1, 24, 24) or (B, P, 1, 24, 24), got (2, 1, 96, 96)",
    ),
    "masks_with_channels": (
        {**PIXELS, "input_masks": MASKS.repeat(1, 3, 1, 1)},
        "input_masks must be (B, 1, 24, 24) or (B, P, 1, 24, 24), got (2, 3, 24, 24)",
    ),
    "masks_of_other_prompts": (
        {**PIXELS, "input_points": POINTS, **masks(2)},
        "input_masks must have as many prompts as points and boxes, got 2 and 3",
    ),
    "points_of_other_images": (
        {**PIXELS, "input_points": POINTS[:1]},
        "input_points are for 1 images, and there are 2",
    ),
    "boxes_of_other_images": ({**PIXELS, "input_boxes": BOXES[:1]}, "input_boxes are for 1 images, and there are 2"),
    "masks_of_other_images": ({**PIXELS, "input_masks": MASKS[:1]}, "input_masks are for 1 images, and there are 2"),
    "points_of_other_embeddings": (
        {"image_embeddings": embeddings()[:1], "input_points": POINTS},
        "input_points are for 2 images, and there are 1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_forward(ours, case):
    inputs, message = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        ours(**inputs)
    assert type(error.value) is ValueError
    assert len(error.value.args) == 1, "one message, not a tuple of pieces"


PERSAM = {**PIXELS, "input_points": POINTS, "input_labels": LABELS}  # 3 prompts of 5 + 4 + 1 tokens


@pytest.mark.parametrize(
    ("inputs", "name"),
    [
        ({"attention_similarity": draw(6, 1, 1, 35, seed=1)}, "attention_similarity"),
        ({"attention_similarity": draw(4, 1, 1, 36, seed=1)}, "attention_similarity"),
        ({"target_embedding": draw(2, 1, 1, 31, seed=1)}, "target_embedding"),
        ({"target_embedding": draw(3, 1, 1, 32, seed=1)}, "target_embedding"),
    ],
    ids=[
        "similarity_of_another_grid",
        "similarity_of_other_prompts",
        "target_of_other_channels",
        "target_of_other_images",
    ],
)
def test_personalisation(ours, inputs, name):
    with pytest.raises(ValueError, match=f"{name} must") as error:
        ours(**PERSAM, **inputs)
    assert str(tuple(inputs[name].shape)) in str(error.value)


@pytest.mark.parametrize(
    ("method", "case"),
    [
        ("get_image_embeddings", "pixels_too_small"),
        ("get_prompt_embeddings", "boxes_without_prompts"),
        ("get_prompt_embeddings", "points_in_space"),
        ("get_prompt_embeddings", "masks_too_large"),
    ],
)
def test_parts(ours, method, case):
    inputs, message = WRONG[case]
    if method == "get_prompt_embeddings":
        inputs = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(ours, method)(**inputs)


CONFIGS = {
    "heads": (
        SamSplitVisionConfig,
        {"num_attention_heads": 5},
        "hidden_size=768 must be a multiple of num_attention_heads=5",
    ),
    "negative": (
        SamSplitVisionConfig,
        {"num_hidden_layers": -1},
        "num_hidden_layers must be a positive integer, got -1",
    ),
    "string": (SamSplitVisionConfig, {"hidden_size": "768"}, "hidden_size must be a positive integer, got '768'"),
    "image_size": (SamSplitVisionConfig, {"image_size": 1000}, "image_size=1000 must be a multiple of patch_size=16"),
    "image_sizes": (SamSplitVisionConfig, {"image_size": [1024]}, "image_size must be an int or (height, width)"),
    "activation": (SamSplitVisionConfig, {"hidden_act": "gleu"}, "hidden_act must be one of"),
    "window": (SamSplitVisionConfig, {"window_size": -1}, "window_size must be"),
    "global_layers": (SamSplitVisionConfig, {"global_attn_indexes": [-1]}, "global_attn_indexes must be"),
    "dropout": (SamSplitVisionConfig, {"attention_dropout": 1.0}, "attention_dropout must be in [0, 1), got 1.0"),
    "points": (SamSplitPromptEncoderConfig, {"num_point_embeddings": 3}, "num_point_embeddings must be 4"),
    "mask_channels": (
        SamSplitPromptEncoderConfig,
        {"mask_input_channels": 6},
        "mask_input_channels must be a multiple of 4",
    ),
    "decoder_heads": (SamSplitMaskDecoderConfig, {"num_attention_heads": 3}, "hidden_size=256"),
    "iou_depth": (SamSplitMaskDecoderConfig, {"iou_head_depth": 1}, "iou_head_depth must be at least 2, got 1"),
    "channels": (SamSplitConfig, {"vision_config": {"output_channels": 128}}, "vision_config.output_channels=128"),
    "geometry": (
        SamSplitConfig,
        {"vision_config": {"image_size": 512}, "prompt_encoder_config": {"image_size": 1024}},
        "vision_config has image_size=512",
    ),
}


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_backend_runs_or_raises(name):
    model = split_model(stock_model())
    model.vision_encoder.config._attn_implementation = name
    with pytest.raises(ValueError, match=f"attn_implementation='{name}' cannot add relative positions; use 'sdpa'"):
        model(**PIXELS)


@pytest.mark.parametrize("case", CONFIGS)
def test_config(case):
    config_class, fields, message = CONFIGS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        config_class(**fields)


def test_config_round_trip(tmp_path):
    config = SamSplitConfig({"image_size": [IMAGE_SIZE, 128], "global_attn_indexes": (1, 2)})
    config.save_pretrained(tmp_path)
    again = SamSplitConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.vision_config.grid == (6, 8)
    assert SamSplitConfig(**again.to_dict()).to_dict() == config.to_dict()
