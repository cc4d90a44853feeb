"""The comparison with stock's fused qkv: the same loss from the same prompts, an adapter that is measured as ours."""

import json

import pytest
import torch
from models import BATCH, IMAGE_SIZE, PROMPTS, draw, pixels, split_model, stock_model
from peft import PeftModel
from training_data import image_folder
from transformers import AutoModel

from benchmarks import fused_adapter
from conversion import convert
from conversion.cli.demo import TINY_SAM
from sam_split.training import simulate_prompts


@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize("points_only", [False, True])
def test_stock_has_the_same_loss_and_gradients(rounds, points_only):
    """With earlier masks as well, of which stock takes one for an image."""
    stock = fused_adapter.StockModel(stock_model().config)
    stock.load_state_dict(stock_model().state_dict())
    labels = (draw(BATCH, PROMPTS, IMAGE_SIZE, IMAGE_SIZE, seed=8) > 0).long()
    losses, gradients = [], []
    for model in (split_model(stock_model()), stock.eval()):
        embeddings = model.get_image_embeddings(pixels())
        generator = torch.Generator().manual_seed(3)
        prompts = simulate_prompts(model, embeddings.detach(), labels, rounds, generator, points_only)
        loss = model(image_embeddings=embeddings, **prompts, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.vision_encoder.patch_embed.projection.weight.grad)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert gradients[0].abs().max() > 0


def test_run(tmp_path):
    convert(TINY_SAM, tmp_path / "tiny", progress=False)
    data = image_folder(tmp_path / "data")
    words = [str(tmp_path / "tiny"), str(data), str(tmp_path / "out"), "--steps", "2", "--no-everything", "--quiet"]
    fused_adapter.main(words)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["preset"] == "fused"
    assert results["after"]["means"] != results["before"]["means"]
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "tiny"), tmp_path / "out" / "adapter")
    assert {name.split(".")[-1] for name, part in model.named_modules() if hasattr(part, "lora_A")} == {"q", "k", "v"}
