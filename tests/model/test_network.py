"""The released ViT-B through our converter meets the scores that transformers' own tests publish.

Opt-in, because it downloads 375 MB from the Hugging Face Hub: `nox -s network`.
"""

import io
import urllib.request

import pytest
import torch
from parity import assert_same_outputs, stock_forward
from PIL import Image
from transformers import AutoModel, AutoProcessor, SamModel

from conversion import convert

pytestmark = pytest.mark.network

CHECKPOINT = "facebook/sam-vit-base"
CAR = (
    "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/transformers/model_doc/sam-car.png"
)

# Prompt, in pixels of the picture, and the predicted IoU of its last mask.
# Source: tests/models/sam/test_modeling_sam.py of huggingface/transformers.
PUBLISHED = {
    "no_prompt": ({}, 0.4515),
    "one_point": ({"input_points": [[[400, 650]]], "input_labels": [[1]]}, 0.9675),
    "two_points": ({"input_points": [[[400, 650], [800, 650]]], "input_labels": [[1, 1]]}, 0.9762),
    "box": ({"input_boxes": [[[75, 275, 1725, 850]]]}, 0.7937),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released") / "sam_vit_base_split"
    convert(CHECKPOINT, folder)
    return folder


@pytest.fixture(scope="module")
def car():
    with urllib.request.urlopen(CAR, timeout=60) as answer:
        return Image.open(io.BytesIO(answer.read())).convert("RGB")


@pytest.mark.parametrize("prompt", PUBLISHED)
def test_published_scores(folder, car, prompt):
    arguments, expected = PUBLISHED[prompt]
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        scores = model(**processor(images=car, return_tensors="pt", **arguments)).iou_scores
    assert scores.flatten()[-1].item() == pytest.approx(expected, abs=1e-3)


def test_same_as_stock(folder, car):
    inputs = AutoProcessor.from_pretrained(CHECKPOINT)(images=car, input_points=[[[400, 650]]], return_tensors="pt")
    inputs = {name: inputs[name] for name in ("pixel_values", "input_points")}
    with torch.no_grad():
        theirs = stock_forward(SamModel.from_pretrained(CHECKPOINT).eval(), **inputs)
        assert_same_outputs(stock_forward(AutoModel.from_pretrained(folder).eval(), **inputs), theirs)
