"""Parity is evidence: each deliberate bug below, put into our model, fails it.

A mutation changes weights or replaces one function of the modeling file. Those of FORWARD change outputs; those of
BACKWARD leave outputs alone and must be caught by the gradients.
"""

import pytest
import torch
from models import PROMPT_KINDS, pixels, split_model, stock_model
from parity import (
    assert_same_gradients,
    assert_same_outputs,
    outputs_and_gradients,
    renamed,
    stock_forward,
)
from torch import nn

from conversion import split_state_dict
from sam_split import attention_sam_split as attention
from sam_split import modeling_sam_split as modeling

INPUTS = {**PROMPT_KINDS["points_and_boxes"], **PROMPT_KINDS["masks"]}


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def theirs(request):
    model = stock_model(attn_implementation=request.param)
    model.backend = request.param
    return model


@pytest.fixture
def ours(theirs):
    return split_model(theirs, theirs.backend)


def attentions(ours):
    return [layer.attn for layer in ours.vision_encoder.layers]


def swap(left: torch.Tensor, right: torch.Tensor):
    left.data, right.data = right.data.clone(), left.data.clone()


def q_and_k_swapped(ours, patch):
    for layer in attentions(ours):
        swap(layer.q.weight, layer.k.weight)


def k_and_v_swapped(ours, patch):
    for layer in attentions(ours):
        swap(layer.k.weight, layer.v.weight)


def q_and_v_biases_swapped(ours, patch):
    for layer in attentions(ours):
        swap(layer.q.bias, layer.v.bias)


def rel_pos_ignored(ours, patch):
    for layer in attentions(ours):
        layer.rel_pos_h.data.zero_()
        layer.rel_pos_w.data.zero_()


def rel_pos_ignored_in_windows(ours, patch):
    attentions(ours)[0].rel_pos_h.data.zero_()


def rel_pos_h_and_w_swapped(ours, patch):
    for layer in attentions(ours):
        swap(layer.rel_pos_h, layer.rel_pos_w)


def rel_pos_mirrored(ours, patch):
    for layer in attentions(ours):
        layer.rel_pos_h.data = layer.rel_pos_h.data.flip(0)


def rel_pos_from_the_scaled_query(ours, patch):
    original, scale = attention.relative_position_scores, attentions(ours)[0].scale
    patch.setattr(attention, "relative_position_scores", lambda query, *tables: original(query * scale, *tables))


def scores_not_scaled(ours, patch):
    for layer in attentions(ours):
        layer.scale = 1.0


def padding_at_the_top_and_left(ours, patch):
    def window_indices(grid, size, device):
        tokens = torch.arange(grid[0] * grid[1]).view(*grid)
        above, left = -grid[0] % size, -grid[1] % size
        padded = nn.functional.pad(tokens, (left, 0, above, 0), value=tokens.numel())
        windows = padded.unfold(0, size, size).unfold(1, size, size).flatten(2).flatten(0, 1)
        return windows, torch.stack([(windows.flatten() == token).nonzero()[0, 0] for token in tokens.flatten()])

    patch.setattr(attention, "window_indices", window_indices)


def padding_repeats_the_last_token(ours, patch):
    original = attention.window_indices

    def window_indices(grid, size, device):
        to_windows, from_windows = original(grid, size, device)
        return to_windows.clamp(max=grid[0] * grid[1] - 1), from_windows

    patch.setattr(attention, "window_indices", window_indices)


def padding_without_biases(ours, patch):
    layer = attentions(ours)[0]
    last_is_zero = torch.ones(37, 1)
    last_is_zero[-1] = 0
    for linear in (layer.q, layer.k, layer.v):
        linear.register_forward_hook(lambda module, args, output: output * last_is_zero)


def windows_by_columns(ours, patch):
    original = attention.window_indices

    def window_indices(grid, size, device):
        to_windows, from_windows = original(grid, size, device)
        return to_windows.unflatten(1, (size, size)).transpose(1, 2).flatten(1), from_windows

    patch.setattr(attention, "window_indices", window_indices)


def tanh_gelu_in_the_encoder(ours, patch):
    for layer in ours.vision_encoder.layers:
        layer.mlp.act = nn.GELU(approximate="tanh")


def tanh_gelu_in_the_mask_prompt(ours, patch):
    ours.prompt_encoder.mask_embed.activation = nn.GELU(approximate="tanh")


def tanh_gelu_in_the_upscaling(ours, patch):
    ours.mask_decoder.activation = nn.GELU(approximate="tanh")


def gelu_in_the_two_way_blocks(ours, patch):
    for block in ours.mask_decoder.transformer.layers:
        block.mlp.act = nn.GELU()


def absolute_positions_transposed(ours, patch):
    ours.vision_encoder.pos_embed.data = ours.vision_encoder.pos_embed.data.transpose(1, 2).contiguous()


def image_positions_transposed(ours, patch):
    original = ours._image_positions
    ours._image_positions = lambda device: original(device).transpose(2, 3)


def neck_norms_swapped(ours, patch):
    neck = ours.vision_encoder.neck
    neck.layer_norm1, neck.layer_norm2 = neck.layer_norm2, neck.layer_norm1


def clicks_on_pixel_corners(ours, patch):
    encoder = modeling.SamSplitPromptEncoder
    original = encoder._positions
    patch.setattr(encoder, "_positions", lambda self, at, embedding: original(self, at - 0.5, embedding))


def x_and_y_swapped(ours, patch):
    encoder = modeling.SamSplitPromptEncoder
    original = encoder._positions
    patch.setattr(encoder, "_positions", lambda self, at, embedding: original(self, at.flip(-1), embedding))


def sines_and_cosines_swapped(ours, patch):
    ours.shared_image_embedding.register_forward_hook(lambda module, args, out: out.roll(out.shape[-1] // 2, -1))


def foreground_and_background_swapped(ours, patch):
    embeddings = ours.prompt_encoder.point_embed
    swap(embeddings[0].weight, embeddings[1].weight)


def corners_swapped(ours, patch):
    embeddings = ours.prompt_encoder.point_embed
    swap(embeddings[2].weight, embeddings[3].weight)


def relabel(patch, wrong: int, right: int):
    encoder = modeling.SamSplitPromptEncoder
    original = encoder._embed_points
    patch.setattr(
        encoder,
        "_embed_points",
        lambda self, points, labels, embedding: original(
            self, points, torch.where(labels == right, wrong, labels), embedding
        ),
    )


def padding_point_as_no_point(ours, patch):
    relabel(patch, wrong=-1, right=-10)


def no_point_as_background(ours, patch):
    relabel(patch, wrong=0, right=-1)


def no_point_keeps_its_position(ours, patch):
    encoder = modeling.SamSplitPromptEncoder
    original = encoder._embed_points

    def embed_points(self, points, labels, embedding):
        position = self._positions(points, embedding)
        return original(self, points, labels, embedding) + (labels == -1)[..., None] * position

    patch.setattr(encoder, "_embed_points", embed_points)


def first_block_with_positions(ours, patch):
    ours.mask_decoder.transformer.layers[0].is_first = False


def second_block_without_positions(ours, patch):
    ours.mask_decoder.transformer.layers[1].is_first = True


def mask_tokens_rolled(ours, patch):
    tokens = ours.mask_decoder.mask_tokens.weight
    tokens.data = tokens.data.roll(1, 0)


def hypernetworks_reversed(ours, patch):
    mlps = ours.mask_decoder.output_hypernetworks_mlps
    ours.mask_decoder.output_hypernetworks_mlps = nn.ModuleList(reversed(mlps))


def half_precision_somewhere(ours, patch):
    ours.vision_encoder.layers[0].register_forward_hook(lambda module, args, out: (out[0].bfloat16().float(), out[1]))


FORWARD = [
    q_and_k_swapped,
    k_and_v_swapped,
    q_and_v_biases_swapped,
    rel_pos_ignored,
    rel_pos_ignored_in_windows,
    rel_pos_h_and_w_swapped,
    rel_pos_mirrored,
    rel_pos_from_the_scaled_query,
    scores_not_scaled,
    padding_at_the_top_and_left,
    padding_repeats_the_last_token,
    padding_without_biases,
    windows_by_columns,
    tanh_gelu_in_the_encoder,
    tanh_gelu_in_the_mask_prompt,
    tanh_gelu_in_the_upscaling,
    gelu_in_the_two_way_blocks,
    absolute_positions_transposed,
    image_positions_transposed,
    neck_norms_swapped,
    clicks_on_pixel_corners,
    x_and_y_swapped,
    sines_and_cosines_swapped,
    foreground_and_background_swapped,
    corners_swapped,
    padding_point_as_no_point,
    no_point_as_background,
    no_point_keeps_its_position,
    first_block_with_positions,
    second_block_without_positions,
    mask_tokens_rolled,
    hypernetworks_reversed,
    half_precision_somewhere,
]


def partner_of_a_lone_point_left_out(ours, patch):
    encoder = modeling.SamSplitPromptEncoder
    original = encoder._embed_points
    patch.setattr(
        encoder,
        "_embed_points",
        lambda self, points, labels, embedding: original(self, points[:, :, :-1], labels[:, :, :-1], embedding),
    )


def no_mask_embedding_left_out(ours, patch):
    ours.prompt_encoder.no_mask_embed.weight.data.zero_()


def similarity_left_out(ours, patch):
    patch.setattr(
        modeling, "_with_prompt_axis", lambda similarity, batch, prompts: torch.zeros(()).expand(1, 1, 1, 1, 1)
    )


def similarity_of_another_prompt(ours, patch):
    original = modeling._with_prompt_axis
    patch.setattr(modeling, "_with_prompt_axis", lambda *args: original(*args).roll(1, 1))


def target_reaches_no_positions(ours, patch):
    """The target is added where the queries are formed, and not to the positions that are added again later."""
    block = ours.mask_decoder.transformer.layers[0]
    target = PROMPT_KINDS["target_embedding"]["target_embedding"]
    original = block.forward
    block.forward = lambda tokens, image, positions, *rest: original(tokens, image, positions - target, *rest)


# Bugs that only some prompts can show.
FORWARD_OF_KIND = [
    (partner_of_a_lone_point_left_out, "foreground"),
    (no_mask_embedding_left_out, "none"),
    (similarity_left_out, "attention_similarity"),
    (similarity_of_another_prompt, "attention_similarity"),
    (target_reaches_no_positions, "target_embedding"),
]


def detached(tensor):
    """Without a gradient, but in the graph, so that asking for its gradient is no error."""
    return tensor.detach() + 0 * tensor


def rel_pos_query_detached(ours, patch):
    original = attention.relative_position_scores
    patch.setattr(attention, "relative_position_scores", lambda query, *tables: original(detached(query), *tables))


def rel_pos_w_detached(ours, patch):
    original = attention.relative_position_scores
    patch.setattr(
        attention,
        "relative_position_scores",
        lambda query, by_row, by_column: original(query, by_row, detached(by_column)),
    )


def keys_detached(ours, patch):
    for layer in attentions(ours):
        layer.k.register_forward_hook(lambda module, args, output: output.detach())


def image_positions_without_image_gradient(ours, patch):
    original = modeling.SamSplitTwoWayAttentionBlock.project_image
    patch.setattr(
        modeling.SamSplitTwoWayAttentionBlock,
        "project_image",
        lambda self, image, positions: original(self, image.detach(), positions),
    )


def iou_head_detached(ours, patch):
    ours.mask_decoder.iou_prediction_head.register_forward_pre_hook(lambda module, args: (args[0].detach(),))


BACKWARD = [
    rel_pos_query_detached,
    rel_pos_w_detached,
    keys_detached,
    image_positions_without_image_gradient,
    iou_head_detached,
]


def name_of(value):
    return getattr(value, "__name__", None)


@torch.no_grad()
def check_outputs(ours, theirs, inputs):
    assert_same_outputs(stock_forward(ours, pixels(), **inputs), stock_forward(theirs, pixels(), **inputs))


def check_gradients(ours, theirs):
    _, our_gradients = outputs_and_gradients(stock_forward, ours, pixels(), **INPUTS)
    _, their_gradients = outputs_and_gradients(stock_forward, theirs, pixels(), **INPUTS)
    assert_same_gradients(our_gradients, renamed(their_gradients, theirs, split_state_dict))


@pytest.mark.parametrize("mutate", FORWARD, ids=name_of)
def test_outputs_notice(ours, theirs, monkeypatch, mutate):
    check_outputs(ours, theirs, INPUTS)
    mutate(ours, monkeypatch)
    with pytest.raises(AssertionError, match="relative error"):
        check_outputs(ours, theirs, INPUTS)


@pytest.mark.parametrize(("mutate", "kind"), FORWARD_OF_KIND, ids=name_of)
def test_outputs_of_one_kind_notice(ours, theirs, monkeypatch, mutate, kind):
    check_outputs(ours, theirs, PROMPT_KINDS[kind])
    mutate(ours, monkeypatch)
    with pytest.raises(AssertionError, match="relative error"):
        check_outputs(ours, theirs, PROMPT_KINDS[kind])


@pytest.mark.parametrize("mutate", BACKWARD, ids=name_of)
def test_gradients_notice(ours, theirs, monkeypatch, mutate):
    check_gradients(ours, theirs)
    mutate(ours, monkeypatch)
    check_outputs(ours, theirs, INPUTS)
    with pytest.raises(AssertionError, match="relative errors"):
        check_gradients(ours, theirs)
