"""What transformers.js makes of an exported SAM is what Python makes of the model. `nox -s node` runs it."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from trained_adapters import trained
from transformers import AutoProcessor

from conversion import convert
from conversion.cli.demo import TINY_SAM
from conversion.cli.demo_figure import COINS
from conversion.onnx_export import export
from sam_split import SamSplitModel

HERE = Path(__file__).parents[1] / "node"
POINT, OTHER = [60.0, 60.0], [20.0, 30.0]
BOX = [[30.0, 30.0], [90.0, 95.0]]
CALLS = {
    "a point": {"input_points": [[POINT]], "input_labels": [[1]]},
    "a point without a label": {"input_points": [[POINT]]},
    "a point and a point of the background": {"input_points": [[POINT, OTHER]], "input_labels": [[1, 0]]},
    "a box": {"input_points": [BOX], "input_labels": [[2, 3]]},
    "a point with a box": {"input_points": [[POINT, *BOX]], "input_labels": [[1, 2, 3]]},
    "several prompts": {"input_points": [[POINT], [OTHER], [[100.0, 90.0]]], "input_labels": [[1], [1], [1]]},
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """The adapted tiny SAM in Python, an image of its size, and what transformers.js makes of both."""
    folder = tmp_path_factory.mktemp("node")
    convert(TINY_SAM, folder / "split", progress=False)
    model = SamSplitModel.from_pretrained(folder / "split").eval()
    height, width = model.vision_encoder.patch_embed.expected_shape[1:]
    image = COINS.image()[:height, :width]
    assert image.shape == (height, width, 3), "resized by nobody: two libraries do not resize alike"
    model = trained(model, folder / "adapter", r=2, target_modules=["q", "v"])
    export(folder / "split", folder / "onnx-folder", adapter=folder / "adapter", progress=False)
    requests = {"image": {"width": width, "height": height, "data": image.flatten().tolist()}, "calls": CALLS}
    (folder / "requests.json").write_text(json.dumps(requests))
    (folder / "run_sam.mjs").write_bytes((HERE / "run_sam.mjs").read_bytes())
    (folder / "node_modules").symlink_to(os.environ["NODE_MODULES"])
    command = ["node", folder / "run_sam.mjs", folder / "onnx-folder", folder / "requests.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "WARN" not in done.stderr.upper(), done.stderr
    return model, AutoProcessor.from_pretrained(folder / "split"), image, json.loads(done.stdout)


def in_python(setting, prompts):
    model, processor, image, _ = setting
    inputs = processor(image, return_tensors="pt")
    points = torch.tensor(prompts["input_points"])[None]  # (1, P, N, 2)
    labels = torch.tensor(prompts.get("input_labels", [[1] * points.shape[2]] * points.shape[1]))[None]
    given, is_corner = {}, labels[0, 0] >= 2
    if is_corner.any():
        given["input_boxes"] = points[:, :, is_corner].flatten(2)
    if not is_corner.all():
        given |= {"input_points": points[:, :, ~is_corner], "input_labels": labels[:, :, ~is_corner]}
    with torch.no_grad():
        output = model(pixel_values=inputs["pixel_values"], **given)
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    return inputs["pixel_values"], output, processor.post_process_masks(output.pred_masks, *sizes)[0]


@pytest.mark.parametrize("name", CALLS)
def test_transformers_js_gives_the_same(name, setting):
    pixels, expected, inside = in_python(setting, CALLS[name])
    found = setting[3][name]
    np.testing.assert_allclose(found["pixel_values"], pixels.flatten().numpy(), atol=1e-5)
    np.testing.assert_allclose(found["scores"], expected.iou_scores.flatten().numpy(), atol=1e-4)
    assert found["shape"] == list(expected.pred_masks.shape)
    logits = expected.pred_masks.flatten().numpy()
    clear = np.abs(logits) > 1e-3
    assert clear.mean() > 0.99
    assert 0.01 < (logits > 0).mean() < 0.99, "a mask of nothing or of everything would show nothing"
    assert ((np.asarray(found["logits"]) > 0) == (logits > 0))[clear].all()
    masks = np.asarray(found["masks"]["inside"], dtype=bool).reshape(found["masks"]["shape"])
    assert masks.shape == tuple(inside.shape)
    assert (masks != inside.numpy()).mean() < 1e-4
