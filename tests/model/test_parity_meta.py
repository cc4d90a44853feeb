"""Ours is Meta's segment-anything: outputs and gradients, through our converter, for every prompt that Meta has.

Meta has no padding label (-10) and no PerSAM inputs. It is the oracle for what stock lacks: a mask for each prompt,
and inputs that are not square.
"""

import pytest
import torch
from models import (
    BATCH,
    GRID,
    PROMPT_KINDS,
    PROMPTS,
    TINY,
    boxes,
    draw,
    masks,
    meta_model,
    pixels,
    points,
    redraw,
    split_config,
    stock_model,
    tiny_config,
)
from parity import (
    assert_same_gradients,
    assert_same_outputs,
    meta_forward,
    outputs_and_gradients,
    renamed,
    stock_forward,
)
from segment_anything.modeling.image_encoder import Attention
from torch import nn

from conversion import convert, from_meta, fuse_state_dict, to_meta
from sam_split import SamSplitConfig, SamSplitModel

PROMPT_KINDS = {
    **{name: PROMPT_KINDS[name] for name in ("none", "one_prompt", "boxes", "masks", "masks_and_boxes")},
    "points": points(1, 0, -1),
    "points_and_boxes": {**points(1, 0, -1), **boxes()},
    "masks_and_points": {**masks(), **points(1, 0, -1)},
    "mask_for_each_prompt": masks(PROMPTS),
    "mask_and_points_for_each_prompt": {**masks(PROMPTS), **points(1, 0, -1)},
}


@pytest.fixture(scope="module")
def theirs():
    return meta_model()


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def ours(theirs, request):
    # Meta's decoder keeps PyTorch's default epsilon in all its layer norms, where stock's config says 1e-6.
    config = split_config(tiny_config(), layer_norm_eps=1e-5)
    config._attn_implementation = request.param
    model = SamSplitModel(config)
    model.load_state_dict(from_meta(theirs.state_dict()))
    return model.eval()


@pytest.mark.parametrize("multimask_output", [True, False], ids=["multimask", "single_mask"])
@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_outputs_and_gradients(ours, theirs, kind, multimask_output):
    inputs = {**PROMPT_KINDS[kind], "multimask_output": multimask_output}
    our_outputs, our_gradients = outputs_and_gradients(stock_forward, ours, pixels(), **inputs)
    their_outputs, their_gradients = outputs_and_gradients(meta_forward, theirs, pixels(), **inputs)
    assert_same_outputs(our_outputs, their_outputs)
    assert_same_gradients(our_gradients, renamed(their_gradients, theirs, from_meta))


def test_mask_prompts_matter(theirs):
    with torch.no_grad():
        outputs = meta_forward(theirs, pixels(), **masks(PROMPTS))["pred_masks"]
    assert outputs.std(dim=1).mean() > 0.05


def test_meta_checkpoint_through_the_command(theirs, tmp_path):
    """A `.pth` becomes a folder that is Meta's model: sizes, heads, windows and epsilons come from the shapes."""
    torch.save(theirs.state_dict(), tmp_path / "sam.pth")
    convert(str(tmp_path / "sam.pth"), tmp_path / "split", progress=False)
    ours = SamSplitModel.from_pretrained(tmp_path / "split").eval()
    assert ours.config.mask_decoder_config.layer_norm_eps == 1e-5
    with torch.no_grad():
        for kind in ("points", "boxes", "masks"):
            assert_same_outputs(
                stock_forward(ours, pixels(), **PROMPT_KINDS[kind]),
                meta_forward(theirs, pixels(), **PROMPT_KINDS[kind]),
            )


def test_input_that_is_not_square():
    """Grid 6 x 8. Meta's encoder takes one side only, so the tensors that depend on the grid are made here."""
    height, width = 96, 128
    rows, columns = height // 16, width // 16
    theirs = meta_model()
    encoder, prompt = theirs.image_encoder, theirs.prompt_encoder
    channels = encoder.pos_embed.shape[-1]
    encoder.pos_embed = nn.Parameter(torch.zeros(1, rows, columns, channels))
    encoder.blocks[1].attn = Attention(channels, num_heads=2, use_rel_pos=True, input_size=(rows, columns))
    prompt.image_embedding_size, prompt.input_image_size = (rows, columns), (height, width)
    redraw(theirs)

    vision = {**TINY["vision_config"], "image_size": [height, width]}
    prompt_config = {**TINY["prompt_encoder_config"], "image_size": [height, width]}
    decoder = {**TINY["mask_decoder_config"], "layer_norm_eps": 1e-5}
    inputs = {
        **points(1, 0, -1),
        **boxes(),
        "input_masks": draw(BATCH, 1, 4 * rows, 4 * columns, seed=4),
    }
    their_outputs, their_gradients = outputs_and_gradients(
        meta_forward, theirs, draw(BATCH, 3, height, width, seed=1), **inputs
    )
    for attn_implementation in ("eager", "sdpa"):
        config = SamSplitConfig(vision, prompt_config, decoder)
        config._attn_implementation = attn_implementation
        ours = SamSplitModel(config).eval()
        ours.load_state_dict(from_meta(theirs.state_dict()))
        our_outputs, our_gradients = outputs_and_gradients(
            stock_forward, ours, draw(BATCH, 3, height, width, seed=1), **inputs
        )
        assert our_outputs["pred_masks"].shape == (BATCH, PROMPTS, 3, 4 * rows, 4 * columns)
        assert_same_outputs(our_outputs, their_outputs)
        assert_same_gradients(our_gradients, renamed(their_gradients, theirs, from_meta))


def test_all_three_models_agree(theirs):
    """The circle closes: Meta's weights in stock's model, by our inverse, and back in Meta's."""
    split = from_meta(theirs.state_dict())
    config = tiny_config()
    config.mask_decoder_config.layer_norm_eps = 1e-5
    stock = stock_model(config, seed=99)
    fused = fuse_state_dict(split)
    position = "shared_image_embedding.positional_embedding"
    stock.load_state_dict({**fused, "prompt_encoder.shared_embedding.positional_embedding": fused[position]})
    back = meta_model(seed=98)
    back.load_state_dict(to_meta(split))
    with torch.no_grad():
        reference = meta_forward(theirs, pixels(), **points(1, 0))
        assert_same_outputs(stock_forward(stock, pixels(), **points(1, 0)), reference)
        again = meta_forward(back, pixels(), **points(1, 0))
    assert all(torch.equal(again[name], reference[name]) for name in reference)
    assert reference["pred_masks"].shape[-1] == 4 * GRID
