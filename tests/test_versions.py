"""A converted folder gives the same numbers whichever transformers converts it and whichever loads it.

One process has one transformers, so the numbers are written down here: stock SamModel's in float64, on weights that
numpy draws alike everywhere. Running this file under each supported version compares all of them.
"""

import json

import pytest
import torch
from models import pixels, points, stock_model
from parity import stock_forward
from transformers import AutoModel

from conversion import convert

IOU_SCORES = [  # of the first image: a row for each prompt
    [-0.4793616, -0.8222024, -0.3718356],
    [-0.3110987, -0.9755580, -0.1885766],
    [-0.3507565, -0.6833150, -0.2061548],
]
PRED_MASKS = [  # of the second image, row 10, column 13
    [-0.0227006, -0.2026605, -0.2421995],
    [-0.0501059, -0.2672006, -0.2204978],
    [-0.0524331, -0.2283259, -0.2035328],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    work = tmp_path_factory.mktemp("versions")
    stock_model().save_pretrained(work / "stock")
    convert(str(work / "stock"), work / "split", progress=False)
    return work / "split"


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_numbers(folder, attn_implementation):
    model = AutoModel.from_pretrained(folder, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        outputs = stock_forward(model, pixels(), **points(1, 0, -1, -10))
    torch.testing.assert_close(outputs["iou_scores"][0], torch.tensor(IOU_SCORES), rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs["pred_masks"][1, :, :, 10, 13], torch.tensor(PRED_MASKS), rtol=0, atol=1e-5)


def test_config_says_nothing_of_its_version(folder):
    """A config that one version writes must not carry defaults which another would take for settings."""
    config = json.loads((folder / "config.json").read_text())
    assert set(config) == {
        "architectures",
        "auto_map",
        "dtype",
        "mask_decoder_config",
        "model_type",
        "prompt_encoder_config",
        "transformers_version",
        "vision_config",
    }
