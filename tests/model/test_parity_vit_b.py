"""Parity at the size people use: ViT-B, 1024 x 1024 pixels, outputs and every gradient.

One test, so that one process holds one model at a time; with checkpointed layers stock's backward pass needs 5 GB.
"""

import pytest
import torch
from models import draw, meta_model, split_config, stock_model
from parity import (
    assert_same_gradients,
    assert_same_outputs,
    meta_forward,
    outputs_and_gradients,
    renamed,
    stock_forward,
)
from transformers import SamConfig

from conversion import split_state_dict, to_meta
from sam_split import SamSplitModel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "global_layers"), [(2, [1]), pytest.param(12, [2, 5, 8, 11], marks=pytest.mark.night)]
)
def test_vit_b(layers, global_layers):
    """All twelve layers, or one of each kind."""
    config = SamConfig(vision_config={"num_hidden_layers": layers, "global_attn_indexes": global_layers})
    # Meta's epsilon, so that one set of weights is the same model in all three.
    config.mask_decoder_config.layer_norm_eps = 1e-5
    pixels = draw(1, 3, 1024, 1024, seed=1)
    prompts = {
        "input_points": draw(1, 2, 2, 2, seed=2, low=0.0, high=1024.0),
        "input_labels": torch.tensor([[[1, 0], [1, -1]]]),
    }

    theirs = stock_model(config)
    theirs.train().gradient_checkpointing_enable()  # one layer's score matrices at a time; there is no dropout
    their_outputs, their_gradients = outputs_and_gradients(stock_forward, theirs, pixels, **prompts)
    their_gradients = renamed(their_gradients, theirs, split_state_dict)
    weights = split_state_dict(theirs.state_dict())
    del theirs

    meta = meta_model(config)
    meta.load_state_dict(to_meta(weights))
    with torch.no_grad():
        metas_outputs = meta_forward(meta, pixels, **prompts)
    del meta

    ours = SamSplitModel(split_config(config))
    ours.load_state_dict(weights)
    our_outputs, our_gradients = outputs_and_gradients(stock_forward, ours.eval(), pixels, **prompts)
    assert our_outputs["pred_masks"].shape == (1, 2, 3, 256, 256)
    assert 0.1 < our_outputs["pred_masks"].std() < 10
    assert_same_outputs(our_outputs, their_outputs)
    assert_same_outputs(our_outputs, metas_outputs)
    assert_same_gradients(our_gradients, their_gradients)
