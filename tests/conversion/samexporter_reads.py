"""samexporter reads what `merge --format meta` writes, for tools with Meta's signature: `nox -s samexporter`."""

import os
import subprocess

import numpy as np
import onnxruntime
import pytest
import torch
from trained_adapters import trained

from conversion.cli import main
from conversion.onnx_check import fixed_image
from sam_split import SamSplitConfig, SamSplitModel


@pytest.fixture(scope="module")
def model_and_folder(tmp_path_factory):
    """ViT-B, the smallest that samexporter reads, with random weights and an adapter; and its graphs."""
    folder = tmp_path_factory.mktemp("samexporter")
    model = SamSplitModel(SamSplitConfig(mask_decoder_config={"layer_norm_eps": 1e-5})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    model.save_pretrained(folder / "split")
    model = trained(model, folder / "adapter", r=2, lora_alpha=0.5, target_modules=["q", "v"])
    pth = folder / "sam.pth"
    assert main(["merge", *(str(folder / name) for name in ("split", "adapter", "sam.pth")), "--format", "meta"]) == 0
    for part in ("encoder", "decoder"):
        command = [os.environ["SAMEXPORTER"], "-m", f"samexporter.export_{part}", "--model-type", "vit_b"]
        subprocess.run([*command, "--checkpoint", pth, "--output", folder / f"{part}.onnx"], check=True)
    return model, folder


@torch.no_grad()
def test_its_graphs_compute_what_the_adapted_model_does(model_and_folder):
    model, folder = model_and_folder
    encoder, decoder = (onnxruntime.InferenceSession(folder / f"{part}.onnx") for part in ("encoder", "decoder"))
    pixels = fixed_image(model.config)
    (embedding,) = encoder.run(None, {encoder.get_inputs()[0].name: pixels.numpy()})
    expected = model.get_image_embeddings(pixels)
    torch.testing.assert_close(torch.from_numpy(embedding), expected, atol=1e-4, rtol=1e-4)
    feed = {
        "image_embeddings": embedding,
        "point_coords": np.array([[[500, 400], [0, 0]]], dtype=np.float32),
        "point_labels": np.array([[1, -1]], dtype=np.float32),
        "mask_input": np.zeros((1, 1, 256, 256), dtype=np.float32),
        "has_mask_input": np.zeros(1, dtype=np.float32),
        "orig_im_size": np.array([1024, 1024], dtype=np.float32),
    }
    scores, masks = decoder.run(["iou_predictions", "low_res_masks"], feed)
    output = model(image_embeddings=expected, input_points=torch.tensor([[[[500.0, 400.0]]]]))
    scale = output.pred_masks.abs().max().item()
    np.testing.assert_allclose(scores[:, 1:], output.iou_scores[0].numpy(), atol=1e-4)
    np.testing.assert_allclose(masks[:, 1:], output.pred_masks[0].numpy(), atol=1e-4 * scale)
