"""Every wrong input of the model raises one error that says what was given and what is expected."""

import re

import pytest
import torch
from models import CHANNELS, GRID, IMAGE_SIZE, boxes, draw, masks, pixels, points, split_model, stock_model
from PIL import Image
from transformers import BatchFeature

from sam_split import SamSplitConfig, SamSplitMaskDecoderConfig, SamSplitPromptEncoderConfig, SamSplitVisionConfig


@pytest.fixture(scope="module")
def ours():
    return split_model(stock_model())


def embeddings(*shape: int) -> torch.Tensor:
    return draw(*(shape or (2, CHANNELS, GRID, GRID)), seed=1)


POINTS, LABELS = points(1)["input_points"], points(1)["input_labels"]
BOXES, MASKS = boxes()["input_boxes"], masks()["input_masks"]
PIXELS = {"pixel_values": pixels()}
LOSS_LABELS = torch.ones(2, 1, 24, 24, dtype=torch.long)

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
    "no_prompt_in_boxes": (
        {**PIXELS, "input_boxes": BOXES[:, :0]},
        "input_boxes holds no prompt (P = 0); leave it out",
    ),
    "labels_without_points": ({**PIXELS, "input_labels": LABELS}, "input_labels were given without input_points"),
    "labels_of_other_points": (
        {**PIXELS, "input_points": POINTS, "input_labels": LABELS[:, :, :3]},
        "input_labels must be (B, P, N), got (2, 3, 3); B is 2 in pixel_values; P is 3 in input_points; N is 4",
    ),
    "labels_with_an_axis_too_many": (
        {**PIXELS, "input_points": POINTS, "input_labels": LABELS[..., None]},
        "input_labels must be (B, P, N), got (2, 3, 4, 1)",
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
        "input_boxes must be (B, P, 4), got (2, 2, 4); B is 2 in pixel_values; P is 3 in input_points",
    ),
    "masks_too_large": (
        {**PIXELS, "input_masks": draw(2, 1, 96, 96, seed=1)},
        "input_masks must be (B, 1, 24, 24) or (B, P, 1, 24, 24) or (B, 24, 24), got (2, 1, 96, 96)",
    ),
    "masks_with_channels": (
        {**PIXELS, "input_masks": MASKS.repeat(1, 3, 1, 1)},
        "input_masks must be (B, 1, 24, 24) or (B, P, 1, 24, 24) or (B, 24, 24), got (2, 3, 24, 24)",
    ),
    "masks_of_other_prompts": (
        {**PIXELS, "input_points": POINTS, **masks(2)},
        "got (2, 2, 1, 24, 24); B is 2 in pixel_values; P is 3 in input_points",
    ),
    "points_of_other_images": (
        {**PIXELS, "input_points": POINTS[:1]},
        "input_points must be (B, P, N, 2), got (1, 3, 4, 2); B is 2 in pixel_values",
    ),
    "boxes_of_other_images": (
        {**PIXELS, "input_boxes": BOXES[:1]},
        "input_boxes must be (B, P, 4), got (1, 3, 4); B is 2 in pixel_values",
    ),
    "masks_of_other_images": ({**PIXELS, "input_masks": MASKS[:1]}, "got (1, 1, 24, 24); B is 2 in pixel_values"),
    "points_of_other_embeddings": (
        {"image_embeddings": embeddings()[:1], "input_points": POINTS},
        "input_points must be (B, P, N, 2), got (2, 3, 4, 2); B is 1 in image_embeddings",
    ),
    "pixels_as_bytes": (
        {"pixel_values": torch.zeros(2, 3, 96, 96, dtype=torch.uint8)},
        "pixel_values must be floating-point, got torch.uint8; SamProcessor makes them",
    ),
    "pixels_as_integers": ({"pixel_values": pixels().long()}, "pixel_values must be floating-point, got torch.int64"),
    "pixels_as_bools": ({"pixel_values": pixels() > 0}, "pixel_values must be floating-point, got torch.bool"),
    "pixels_elsewhere": ({"pixel_values": pixels().to("meta")}, "pixel_values is on meta and the model on cpu"),
    "embeddings_as_integers": (
        {"image_embeddings": embeddings().long()},
        "image_embeddings must be floating-point, got torch.int64",
    ),
    "embeddings_elsewhere": (
        {"image_embeddings": embeddings().to("meta")},
        "image_embeddings is on meta and the model on cpu",
    ),
    "points_elsewhere": (
        {**PIXELS, "input_points": POINTS.to("meta")},
        "input_points must be where pixel_values is, on cpu, got meta; move all inputs to model.device",
    ),
    "boxes_elsewhere": ({**PIXELS, "input_boxes": BOXES.to("meta")}, "input_boxes must be where pixel_values is"),
    "masks_elsewhere": ({**PIXELS, "input_masks": MASKS.to("meta")}, "input_masks must be where pixel_values is"),
    "points_as_bools": ({**PIXELS, "input_points": POINTS > 0}, "input_points must be real numbers, got torch.bool"),
    "boxes_as_bools": ({**PIXELS, "input_boxes": BOXES > 0}, "input_boxes must be real numbers, got torch.bool"),
    "boxes_as_complex": (
        {**PIXELS, "input_boxes": BOXES + 5j},
        "input_boxes must be real numbers, got torch.complex64",
    ),
    "masks_as_bools": ({**PIXELS, "input_masks": MASKS > 0}, "input_masks must be floating-point, got torch.bool"),
    "masks_as_bytes": ({**PIXELS, "input_masks": MASKS.byte()}, "input_masks must be floating-point, got torch.uint8"),
    "label_7": (
        {**PIXELS, "input_points": POINTS, "input_labels": LABELS * 7},
        "input_labels must be one of 1 (foreground), 0 (background), -1 (not a point), -10 (padding), got 7",
    ),
    "label_half": ({**PIXELS, "input_points": POINTS, "input_labels": LABELS * 0.5}, "got 0.5"),
    "label_nan": ({**PIXELS, "input_points": POINTS, "input_labels": LABELS * float("nan")}, "got nan"),
    "label_minus_2": ({**PIXELS, "input_points": POINTS, "input_labels": LABELS * -2}, "got -2"),
    "loss_labels_255": ({**PIXELS, "labels": 255 * LOSS_LABELS}, "got 255; divide a mask read from a PNG by 255"),
    "loss_labels_nan": ({**PIXELS, "labels": float("nan") * LOSS_LABELS}, "labels must be one of 1 (inside), 0"),
    "loss_labels_without_prompts": (
        {**PIXELS, "labels": LOSS_LABELS[:, 0]},
        "labels must be (B, P, 96, 96) or (B, P, 24, 24), got (2, 24, 24)",
    ),
    "loss_labels_of_other_prompts": (
        {**PIXELS, "input_boxes": BOXES, "labels": LOSS_LABELS},
        "got (2, 1, 24, 24); B is 2 in pixel_values; P is 3 in input_boxes",
    ),
    "loss_labels_of_more_than_no_prompt": (
        {**PIXELS, "labels": LOSS_LABELS.expand(2, 2, 24, 24)},
        "got (2, 2, 24, 24); B is 2 in pixel_values; P is 1 in a call without prompts",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_forward(ours, case):
    inputs, message = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        ours(**inputs)
    assert type(error.value) is ValueError
    assert len(error.value.args) == 1, "one message, not a tuple of pieces"


# What is no tensor, or no argument at all: the message must name it, and what would be right.
MISTAKEN = {
    "pixels_as_array": ({"pixel_values": pixels().numpy()}, "pixel_values must be a torch.Tensor", "got ndarray"),
    "a_processors_whole_result": (
        {"pixel_values": BatchFeature(PIXELS)},
        "pixel_values must be a torch.Tensor",
        "got BatchFeature; call model(**inputs)",
    ),
    "pixels_as_image": (
        {"pixel_values": Image.new("RGB", (96, 96))},
        "pixel_values must be a torch.Tensor",
        "got Image",
    ),
    "embeddings_as_list": (
        {"image_embeddings": [1.0]},
        "image_embeddings must be a torch.Tensor (B, 32, 6, 6)",
        "list",
    ),
    "points_as_list": (
        {**PIXELS, "input_points": [[[[1, 2]]]]},
        "input_points must be a torch.Tensor (B, P, N, 2)",
        "list",
    ),
    "points_as_array": ({**PIXELS, "input_points": POINTS.numpy()}, "input_points must be a torch.Tensor", "ndarray"),
    "labels_as_list": (
        {**PIXELS, "input_points": POINTS, "input_labels": [[[1]]]},
        "input_labels must be a torch.Tensor",
        "list",
    ),
    "boxes_as_list": (
        {**PIXELS, "input_boxes": [[[1, 2, 3, 4]]]},
        "input_boxes must be a torch.Tensor (B, P, 4)",
        "list",
    ),
    "masks_as_array": ({**PIXELS, "input_masks": MASKS.numpy()}, "input_masks must be a torch.Tensor", "ndarray"),
    "loss_labels_as_list": ({**PIXELS, "labels": [[0]]}, "labels must be a torch.Tensor", "list"),
    "similarity_as_number": (
        {**PIXELS, "attention_similarity": 1.0},
        "attention_similarity must be a torch.Tensor",
        "float",
    ),
    "target_as_list": ({**PIXELS, "target_embedding": [1.0]}, "target_embedding must be a torch.Tensor", "list"),
    "input_box": ({**PIXELS, "input_box": BOXES}, "'input_box' is no argument", "did you mean 'input_boxes'?"),
    "boxes": ({**PIXELS, "boxes": BOXES}, "'boxes' is no argument", "did you mean 'input_boxes'?"),
    "point_coords": ({**PIXELS, "input_point": POINTS}, "'input_point' is no argument", "'input_points'?"),
    "label": ({**PIXELS, "label": LOSS_LABELS}, "'label' is no argument", "did you mean 'labels'?"),
    "mask_input": ({**PIXELS, "input_mask": MASKS}, "'input_mask' is no argument", "did you mean 'input_masks'?"),
    "multimask": ({**PIXELS, "multimask": False}, "'multimask' is no argument", "did you mean 'multimask_output'?"),
    "images": ({"pixels": pixels(), **PIXELS}, "'pixels' is no argument", "did you mean 'pixel_values'?"),
    "embedding": ({**PIXELS, "image_embedding": 1}, "'image_embedding' is no argument", "'image_embeddings'?"),
    "stranger": (
        {**PIXELS, "xyz": 1},
        "'xyz' is no argument of SamSplitModel.forward",
        "it takes pixel_values, input_points",
    ),
    "multimask_as_word": ({**PIXELS, "multimask_output": "no"}, "multimask_output must be True or False", "got 'no'"),
}


@pytest.mark.parametrize("case", MISTAKEN)
def test_mistaken_arguments(ours, case):
    inputs, *messages = MISTAKEN[case]
    with pytest.raises(TypeError) as error:
        ours(**inputs)
    assert all(message in str(error.value) for message in messages), error.value


def test_what_a_processor_passes_beside_is_accepted(ours):
    sizes = torch.tensor([[90, 96]])
    ours(**PIXELS, original_sizes=sizes, reshaped_input_sizes=sizes, input_ids=None)


def test_bool_labels_mean_foreground_and_background(ours):
    """A lone point gets a partner labelled -1, which a bool could not hold."""
    labels = torch.tensor([1, 0, 1, 1]).expand(2, 3, 4)
    with torch.no_grad():
        outputs = [
            ours(**PIXELS, input_points=POINTS, input_labels=kind).pred_masks for kind in (labels, labels.bool())
        ]
        others = ours(**PIXELS, input_points=POINTS).pred_masks
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], others)


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
