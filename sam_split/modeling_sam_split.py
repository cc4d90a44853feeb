"""SamSplit: Segment Anything (arXiv 2304.02643) with separate `q`, `k` and `v` layers in its image encoder.

    pixel_values ──> vision_encoder ──> image embedding ──┐
                                                          ├──> mask_decoder ──> pred_masks, iou_scores
    points, boxes, masks ──> prompt_encoder ──> embeddings ┘

The parameters carry the names of transformers' `SamModel`, except that `attn.qkv` is cut into `attn.q`, `attn.k` and
`attn.v`, so `LoraConfig(target_modules=["q", "v"])` adapts the image encoder and nothing else. Outputs are those of
`SamModel`; no score matrix over all pairs of image tokens is ever held, forward or backward, unless
`attn_implementation="eager"` or a call with `output_attentions=True` asks for it.

Shapes: `B` images, `P` prompts per image, `N` points per prompt, `T` tokens per prompt in the mask decoder, `M` masks
per prompt, `H W` rows and columns of the token grid, `C` channels, `D` channels per head, `S` side of a window in
tokens. Points and boxes are (x, y) in pixels of the resized, padded input; sizes are (height, width).

This file and the seven that it imports are copied into each saved model folder. They import torch, transformers and
the standard library, and read no network, no environment and no file but the images that `generate_masks` is given.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .attention_sam_split import in_pieces, on_cpu, rows_by_head, softmax, vision_attention
from .checks_sam_split import CompleteLoading, InputCheck, check_device, check_keywords, check_values
from .configuration_sam_split import SamSplitConfig, SamSplitVisionConfig
from .products_sam_split import affine, can_fold, linear, product, product_shared

# Tokens in an MLP of the image encoder at once on a CPU, so that its wide activations stay in cache. Less than 512: a
# freed block of the next power of two can then hold them.
TOKENS_AT_ONCE = 500

# Neither object nor background: torch's usual ignore_index, not 255, or the objects of a mask in a PNG would be void.
VOID_LABEL = -100

POINT_LABELS = {1: "foreground", 0: "background", -1: "not a point", -10: "padding"}

# Prompts are decoded a few at a time: the bytes that their images may take, of which ViT's 64 x 64 x 256 floats are 4
# MB a prompt. All that is held at once is about seven times that. A CPU is fastest on few, an accelerator on many.
PROMPTS_BYTES_CPU = 2**23
PROMPTS_BYTES_ACCELERATOR = 2**28


@dataclass
class SamSplitVisionEncoderOutput(ModelOutput):
    """What the image encoder returns.

    Args:
        last_hidden_state: (B, C, H, W), the image embedding.
        hidden_states: one (B, H, W, C) before the first layer and one after each.
        attentions: one (B * windows * heads, tokens, tokens) per layer, with padding where windows are padded.
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class SamSplitImageSegmentationOutput(ModelOutput):
    """What the model returns.

    Args:
        loss: (), with `labels` only; see `segmentation_loss`.
        iou_scores: (B, P, M), the predicted IoU of each mask with the object.
        pred_masks: (B, P, M, 4 * H, 4 * W), logits: above 0 is inside. `SamProcessor.post_process_masks` scales them
            up.
        vision_hidden_states: one (B, H, W, C) before the first layer and one after each.
        vision_attentions: one (B * windows * heads, tokens, tokens) per layer of the image encoder.
        mask_decoder_attentions: one (B * P, 1, H * W, C) per block: what the tokens add to the image embedding. These
            are not attention weights; name and content are those of transformers' `SamModel`.
    """

    loss: torch.FloatTensor | None = None
    iou_scores: torch.FloatTensor | None = None
    pred_masks: torch.FloatTensor | None = None
    vision_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    vision_attentions: tuple[torch.FloatTensor, ...] | None = None
    mask_decoder_attentions: tuple[torch.FloatTensor, ...] | None = None


class SamSplitChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a (B, C, H, W) map."""

    def forward(self, hidden_states):
        return super().forward(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, C, H, W)


class SamSplitMLPBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.lin1 = nn.Linear(config.hidden_size, config.mlp_dim)
        self.lin2 = nn.Linear(config.mlp_dim, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        return linear(self.lin2, self.act(linear(self.lin1, hidden_states)))


class SamSplitPatchEmbeddings(nn.Module):
    """Pixels to tokens: one convolution whose stride is its size."""

    def __init__(self, config):
        super().__init__()
        rows, columns = config.grid
        self.expected_shape = (config.num_channels, rows * config.patch_size, columns * config.patch_size)
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values):
        """(B, channels, height, width) in any floating dtype to (B, H, W, C)."""
        hint = "SamProcessor makes them; `sam-split convert --image-size` makes a model for another size"
        InputCheck()("pixel_values", pixel_values, ("B", *self.expected_shape), floating=True, hint=hint)
        check_device("pixel_values", pixel_values, self.projection.weight)
        hidden_states = self.projection(pixel_values.to(self.projection.weight.dtype))  # (B, C, H, W)
        return hidden_states.permute(0, 2, 3, 1).contiguous()  # or every layer after it would inherit the strides


class SamSplitVisionAttention(nn.Module):
    """Multi-head attention inside windows, or over the whole grid when `window_size` is 0."""

    def __init__(self, config, window_size):
        super().__init__()
        self.config = config
        self.window_size = window_size
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scale = self.head_dim**-0.5

        self.q = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        rows, columns = (window_size, window_size) if window_size else config.grid
        if config.use_rel_pos:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * rows - 1, self.head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * columns - 1, self.head_dim))
        else:
            self.rel_pos_h = self.rel_pos_w = None
        self.sides = rows, columns

    def forward(self, hidden_states, output_attentions=False):
        """(B, H, W, C) to the same, and the weights (B * windows * heads, tokens, tokens) or None."""
        grid = hidden_states.shape[1:3]
        tokens = hidden_states.flatten(1, 2)  # (B, H * W, C)
        if self.window_size:  # one zero token stands for all padding, and passes through q, k, v and their adapters
            tokens = F.pad(tokens, (0, 0, 0, 1))  # (B, H * W + 1, C)
        # Tensor parallelism leaves only some of the heads here.
        q, k, v = (linear(layer, tokens).unflatten(-1, (-1, self.head_dim)) for layer in (self.q, self.k, self.v))
        implementation = self.config._attn_implementation or "sdpa"
        dropout = self.config.attention_dropout if self.training else 0.0
        context, weights = vision_attention(
            q, k, v, self._tables(q), grid, self.window_size, self.scale, implementation, dropout, output_attentions
        )  # (B, H * W, heads, D)
        return linear(self.proj, context.flatten(2)).unflatten(1, grid), weights

    def _tables(self, like):
        """The relative positions of rows and columns; zeros add nothing."""
        if self.rel_pos_h is not None:
            return self.rel_pos_h, self.rel_pos_w
        return tuple(like.new_zeros(2 * side - 1, self.head_dim) for side in self.sides)


class SamSplitVisionLayer(GradientCheckpointingLayer):
    def __init__(self, config, window_size):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = SamSplitVisionAttention(config, window_size)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SamSplitMLPBlock(config)

    def forward(self, hidden_states, output_attentions=False):
        attended, weights = self.attn(self.layer_norm1(hidden_states), output_attentions)
        hidden_states = hidden_states + attended
        if not on_cpu(hidden_states):
            return hidden_states + self.mlp(self.layer_norm2(hidden_states)), weights
        pieces = hidden_states.flatten(0, -2).split(TOKENS_AT_ONCE)
        pieces = [tokens + self.mlp(self.layer_norm2(tokens)) for tokens in pieces]
        return torch.cat(pieces).view_as(hidden_states), weights


class SamSplitVisionNeck(nn.Module):
    """Tokens to the image embedding's channels."""

    def __init__(self, config):
        super().__init__()
        self.conv1 = nn.Conv2d(config.hidden_size, config.output_channels, kernel_size=1, bias=False)
        self.layer_norm1 = SamSplitChannelNorm(config.output_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(config.output_channels, config.output_channels, kernel_size=3, padding=1, bias=False)
        self.layer_norm2 = SamSplitChannelNorm(config.output_channels, eps=1e-6)

    def forward(self, hidden_states):
        hidden_states = self.layer_norm1(self.conv1(hidden_states.permute(0, 3, 1, 2)))  # (B, C, H, W)
        return self.layer_norm2(self.conv2(hidden_states))


class SamSplitVisionEncoder(nn.Module):
    """The image encoder: a ViT, windowed but for a few global layers, and a neck."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = SamSplitPatchEmbeddings(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, *config.grid, config.hidden_size)) if config.use_abs_pos else None
        self.layers = nn.ModuleList(
            SamSplitVisionLayer(config, 0 if index in config.global_attn_indexes else config.window_size)
            for index in range(config.num_hidden_layers)
        )
        self.neck = SamSplitVisionNeck(config)

    def forward(self, pixel_values, output_attentions=False, output_hidden_states=False):
        """(B, channels, height, width) to a `SamSplitVisionEncoderOutput`."""
        hidden_states = self.patch_embed(pixel_values)
        if self.pos_embed is not None:
            hidden_states = hidden_states + self.pos_embed
        all_hidden_states, all_attentions = [hidden_states] if output_hidden_states else [], []
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, output_attentions)
            all_attentions.append(weights)
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
        return SamSplitVisionEncoderOutput(
            last_hidden_state=self.neck(hidden_states),
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )


class SamSplitPositionalEmbedding(nn.Module):
    """Random Fourier features of positions, one matrix for the image's tokens and for the prompts.

    Source: Fourier features (arXiv 2006.10739).
    """

    def __init__(self, num_pos_feats):
        super().__init__()
        self.register_buffer("positional_embedding", torch.empty(2, num_pos_feats))

    def forward(self, positions):
        """(..., 2), (x, y) in [0, 1] across the input, to (..., 2 * num_pos_feats) in the dtype of the matrix."""
        matrix = self.positional_embedding
        # Phases reach tens of radians, which 8 bits of mantissa cannot tell apart. Products by hand instead of a
        # matmul keep autocast from rounding them.
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        x, y = (2 * positions - 1).to(dtype).unbind(-1)
        phase = 2 * math.pi * (x[..., None] * matrix[0].to(dtype) + y[..., None] * matrix[1].to(dtype))
        return torch.cat([phase.sin(), phase.cos()], dim=-1).to(matrix.dtype)


class SamSplitMaskEmbedding(nn.Module):
    """A mask prompt to a dense embedding on the token grid."""

    def __init__(self, config):
        super().__init__()
        channels = config.mask_input_channels
        self.conv1 = nn.Conv2d(1, channels // 4, kernel_size=2, stride=2)
        self.layer_norm1 = SamSplitChannelNorm(channels // 4, eps=config.layer_norm_eps)
        self.conv2 = nn.Conv2d(channels // 4, channels, kernel_size=2, stride=2)
        self.layer_norm2 = SamSplitChannelNorm(channels, eps=config.layer_norm_eps)
        self.conv3 = nn.Conv2d(channels, config.hidden_size, kernel_size=1)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, masks):
        """(B, 1, 4 * H, 4 * W) to (B, C, H, W)."""
        hidden_states = self.activation(self.layer_norm1(self.conv1(masks.to(self.conv1.weight.dtype))))
        hidden_states = self.activation(self.layer_norm2(self.conv2(hidden_states)))
        return self.conv3(hidden_states)


class SamSplitPromptEncoder(nn.Module):
    """Points and boxes to sparse embeddings, masks to dense ones."""

    def __init__(self, config):
        super().__init__()
        embedding_size, image_size = config.image_embedding_size, config.image_size
        self.grid = (embedding_size, embedding_size) if isinstance(embedding_size, int) else tuple(embedding_size)
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.mask_embed = SamSplitMaskEmbedding(config)
        self.no_mask_embed = nn.Embedding(1, config.hidden_size)
        self.point_embed = nn.ModuleList(
            nn.Embedding(1, config.hidden_size) for _ in range(config.num_point_embeddings)
        )  # background, foreground, top left corner, bottom right corner
        self.not_a_point_embed = nn.Embedding(1, config.hidden_size)

    def forward(self, input_points, input_labels, input_boxes, input_masks, batch, device, positional_embedding):
        """Embed prompts, which `SamSplitModel` has checked.

        Args:
            input_points: (B, P, N, 2) in pixels, or None.
            input_labels: (B, P, N), 1 foreground, 0 background, -1 not a point, -10 padding; None without points.
            input_boxes: (B, P, 4), (x0, y0, x1, y1) in pixels, or None.
            input_masks: (B, 1, 4 * H, 4 * W) or (B, P, 1, 4 * H, 4 * W), logits, or None.
            batch: B.
            device: where embeddings are looked up.
            positional_embedding: the model's `SamSplitPositionalEmbedding`.

        Returns:
            The sparse embeddings (B, P, T, C), or None if there are neither points nor boxes, and the dense embeddings
            (B, C, H, W), or (B, P, C, H, W) for masks that differ from prompt to prompt.
        """
        sparse = []
        if input_points is not None:
            if input_boxes is None:  # a lone point gets a partner that says there is no box
                input_points = F.pad(input_points, (0, 0, 0, 1))
                input_labels = F.pad(input_labels, (0, 1), value=-1)
            sparse.append(self._embed_points(input_points, input_labels, positional_embedding))
        if input_boxes is not None:
            corners = self._positions(input_boxes.unflatten(-1, (2, 2)), positional_embedding)  # (B, P, 2, C)
            sparse.append(corners + torch.cat([_row(embed, device) for embed in self.point_embed[2:]]))
        if input_masks is None:
            dense = _row(self.no_mask_embed, device)[..., None, None].expand(batch, -1, *self.grid)
        elif input_masks.ndim == 4:
            dense = self.mask_embed(input_masks)
        else:
            dense = self.mask_embed(input_masks.flatten(0, 1)).unflatten(0, input_masks.shape[:2])
        if self.training and torch.is_grad_enabled():  # some kinds of prompt leave some parameters out
            dense = _ZeroGradients.apply(dense, *self.parameters())
        return torch.cat(sparse, dim=2) if sparse else None, dense

    def _embed_points(self, points, labels, positional_embedding):
        position = self._positions(points, positional_embedding)  # (B, P, N, C)
        label = labels[..., None]
        background, foreground = (_row(embed, points.device) for embed in self.point_embed[:2])
        none = torch.zeros_like(background)
        embedding = torch.where((label == -1) | (label == -10), none, position)
        embedding = embedding + torch.where(label == 0, background, none) + torch.where(label == 1, foreground, none)
        return embedding + torch.where(label == -1, _row(self.not_a_point_embed, points.device), none)

    def _positions(self, coordinates, positional_embedding):
        height, width = self.image_size
        x, y = (coordinates + 0.5).unbind(-1)  # a click addresses the centre of its pixel
        return positional_embedding(torch.stack([x / width, y / height], dim=-1))


class _ZeroGradients(torch.autograd.Function):
    """A tensor as it is, and a gradient of zero for parameters: DistributedDataParallel waits for one of each."""

    @staticmethod
    def forward(ctx, tensor, *parameters):
        ctx.save_for_backward(*parameters)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad_output):
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return grad_output, *(torch.zeros_like(parameter) if needed else None for parameter, needed in wanted)


def _row(embedding, device):
    """The one row (1, C) of an embedding, looked up through the module so that offloaded weights are found."""
    return embedding(torch.zeros(1, dtype=torch.long, device=device))


class SamSplitAttention(nn.Module):
    """Attention of the mask decoder: among a prompt's few tokens, or between them and the image's many.

    Scores always lie with the image along the last axis, whichever side asks: (B, P, heads * T, H * W). To make them
    with one matrix product per prompt, the tokens of each head are laid out as rows in which the other heads' channels
    are zero. The scores take less room than the image, so one path serves every `attn_implementation`.

    The image is not projected to values, nor is what it takes from the tokens projected back: attention weights sum to
    one, so an affine layer may as well see the average of its inputs, or the few tokens that are averaged. So dropout
    that an adapter puts before `v_proj` (to the image) or `out_proj` (from it) acts once per token and head, that of
    stock once per place of the image: the mean is equal, the noise is larger.
    """

    def __init__(self, config, downsample_rate):
        super().__init__()
        inner = config.hidden_size // downsample_rate
        self.num_attention_heads = config.num_attention_heads
        self.scale = (inner // config.num_attention_heads) ** -0.5
        self.q_proj = nn.Linear(config.hidden_size, inner)
        self.k_proj = nn.Linear(config.hidden_size, inner)
        self.v_proj = nn.Linear(config.hidden_size, inner)
        self.out_proj = nn.Linear(inner, config.hidden_size)

    def forward(self, query, key, value):
        """Attention among tokens: (B, P, T, C), all three and the result."""
        return self.tokens_to_image(query, (self.k_proj(key), nn.Identity()), value)

    def tokens_to_image(self, query, key, image, similarity=None):
        """What each token takes from the image.

        Args:
            query: (B, P, T, C), not yet projected.
            key: (B, P, H * W, C) and the layer that projects it; P may be 1 for an image that all prompts share.
            image: (B, P, H * W, C), the values, not yet projected; P as in `key`.
            similarity: added to the scores, broadcast to (B, P, heads, T, H * W), or None.

        Returns:
            (B, P, T, C).
        """
        scores = self._scores(key[0], *self._rows(self.q_proj(query), key[1]))
        if similarity is not None:
            scores = scores + similarity
        weights = softmax(scores, -1).flatten(2, 3)  # (B, P, heads * T, H * W)
        averages = product_shared(weights, image)  # (B, P, heads * T, C)
        values = self.v_proj(averages).unflatten(2, (-1, query.shape[2])).unflatten(-1, (self.num_attention_heads, -1))
        own = values.diagonal(dim1=2, dim2=4)  # (B, P, T, D, heads), each head's own channels of its own average
        return self.out_proj(own.transpose(-1, -2).flatten(-2))

    def image_to_tokens(self, layer, key, value):
        """A function of places (B, P or 1, places, C), whose queries `layer` makes, to what they take from the tokens.

        `key` and `value` are (B, P, T, C), not yet projected.
        """
        rows = self._rows(self.k_proj(key), layer)
        values = rows_by_head(self.v_proj(value), self.num_attention_heads)  # (B, P, heads * T, inner)
        # The last row is a zero token's, the layer's bias. Each head's weights sum to one, so each adds a share of it.
        values, bias = self.out_proj(F.pad(values, (0, 0, 0, 1))).split([values.shape[2], 1], dim=2)
        values = values - bias * (1 - 1 / self.num_attention_heads)
        return lambda query: product(softmax(self._scores(query, *rows), -2).flatten(2, 3).transpose(-1, -2), values)

    def _rows(self, tokens, layer):
        """Projected tokens (B, P, T, inner) as rows, what to add to their scores, and the layer left for the image.

        The rows are few, the image is large, so it is the rows that pass `layer`, transposed, where it is a plain
        linear: q (x W^T + b)^T = (q W) x^T + q b.
        """
        rows = rows_by_head(tokens * self.scale, self.num_attention_heads)  # (B, P, heads * T, inner)
        if can_fold(layer, rows.shape[2]):
            return rows @ layer.weight, (rows @ layer.bias)[..., None], nn.Identity()
        return rows, 0, layer

    def _scores(self, image, rows, bias, layer):
        """Scores (B, P, heads, T, H * W) of the image (B, P or 1, H * W, C) and what `_rows` returns."""
        scores = product_shared(rows, layer(image).transpose(-1, -2)) + bias
        return scores.unflatten(2, (self.num_attention_heads, -1))


class SamSplitTwoWayAttentionBlock(nn.Module):
    """Tokens attend to each other, to the image, pass an MLP, and the image attends to the tokens."""

    def __init__(self, config, is_first):
        super().__init__()
        self.is_first = is_first
        self.self_attn = SamSplitAttention(config, downsample_rate=1)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn_token_to_image = SamSplitAttention(config, config.attention_downsample_rate)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SamSplitMLPBlock(config)
        self.layer_norm3 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layer_norm4 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn_image_to_token = SamSplitAttention(config, config.attention_downsample_rate)

    def project_image(self, image, image_positions):
        """The image for keys and for queries, (B, P, H * W, C) each, with the layer that will project it."""
        positioned = image + image_positions
        return (positioned, self.cross_attn_token_to_image.k_proj), (positioned, self.cross_attn_image_to_token.q_proj)

    def forward(self, tokens, image, token_positions, image_positions, projected_image, similarity, output_attentions):
        """One round.

        Args:
            tokens, token_positions: (B, P, T, C).
            image, image_positions: (B, P, H * W, C); P may be 1 for an image that all prompts share.
            projected_image: two of (B, P, H * W, inner) if keys and queries are projected before, or None.
            similarity: see `SamSplitAttention.tokens_to_image`.
            output_attentions: whether to return what was added to the image.

        Returns:
            tokens (B, P, T, C), image (B, P, H * W, C), and what was added to the image before its norm, or None.
        """
        if projected_image is None:
            keys, (queries, layer) = self.project_image(image, image_positions)
        else:
            keys, (queries, layer) = ((projected, nn.Identity()) for projected in projected_image)
        if self.is_first:  # these tokens are their own positions
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            positioned = tokens + token_positions
            tokens = tokens + self.self_attn(positioned, positioned, tokens)
        tokens = self.layer_norm1(tokens)

        taken = self.cross_attn_token_to_image.tokens_to_image(tokens + token_positions, keys, image, similarity)
        tokens = self.layer_norm2(tokens + taken)
        tokens = self.layer_norm3(tokens + self.mlp(tokens))

        take = self.cross_attn_image_to_token.image_to_tokens(layer, tokens + token_positions, tokens)
        updated, added = [], []
        for piece, query in zip(*(in_pieces(x, TOKENS_AT_ONCE) for x in (image, queries)), strict=True):
            taken = take(query)
            updated.append(self.layer_norm4(piece + taken))
            added.extend([taken] * output_attentions)
        return tokens, torch.cat(updated, dim=2), torch.cat(added, dim=2) if added else None


class SamSplitTwoWayTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(
            SamSplitTwoWayAttentionBlock(config, is_first=index == 0) for index in range(config.num_hidden_layers)
        )
        self.final_attn_token_to_image = SamSplitAttention(config, config.attention_downsample_rate)
        self.layer_norm_final_attn = nn.LayerNorm(config.hidden_size)

    def forward(self, tokens, image, keys, queries, similarity, target, image_positions, kept, output_attentions):
        """Let tokens and image inform each other.

        Args:
            tokens: (B, P, T, C).
            image: (B, P, H * W, C); P may be 1 for an image that all prompts share.
            keys, queries: the image projected for the first block, (B, P, H * W, inner); P as in `image`.
            similarity: see `SamSplitAttention.tokens_to_image`; not used in the final attention.
            target: broadcast to (B, P, T, C) and added to the tokens before each block, or None.
            image_positions: (1, 1, H * W, C).
            kept: the number of tokens, the first ones, that are asked for.
            output_attentions: whether to return what each block added to the image.

        Returns:
            tokens (B, P, kept, C), image (B, P, H * W, C), and a list with what each block added to the image.
        """
        token_positions = tokens
        projected_image, added_by_block = (keys, queries), []
        for index, block in enumerate(self.layers):
            if target is not None:
                tokens = tokens + target
                if index == 0:  # PerSAM's target is part of the tokens' positions as well
                    token_positions = tokens
            tokens, image, added = block(
                tokens, image, token_positions, image_positions, projected_image, similarity, output_attentions
            )
            projected_image = None
            added_by_block.append(added)
        attention = self.final_attn_token_to_image
        tokens, token_positions = tokens[:, :, :kept], token_positions[:, :, :kept]
        key = image + image_positions, attention.k_proj
        taken = attention.tokens_to_image(tokens + token_positions, key, image)
        return self.layer_norm_final_attn(tokens + taken), image, added_by_block


class SamSplitFeedForward(nn.Module):
    """A ReLU MLP of `num_layers` linears."""

    def __init__(self, input_dim, hidden_dim, output_dim, num_layers):
        super().__init__()
        self.proj_in = nn.Linear(input_dim, hidden_dim)
        self.layers = nn.ModuleList(nn.Linear(hidden_dim, hidden_dim) for _ in range(num_layers - 2))
        self.proj_out = nn.Linear(hidden_dim, output_dim)

    def forward(self, hidden_states):
        hidden_states = F.relu(self.proj_in(hidden_states))
        for layer in self.layers:
            hidden_states = F.relu(layer(hidden_states))
        return self.proj_out(hidden_states)


class SamSplitUpscaling(nn.ConvTranspose2d):
    """Twice the resolution: each place has four children that share nothing, so this is a linear layer per place."""

    def __init__(self, input_dim, output_dim):
        super().__init__(input_dim, output_dim, kernel_size=2, stride=2)

    def forward(self, hidden_states):
        """(..., C) to (..., 2 * 2, C / k), the children in reading order."""
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (2 * 2 * C / k, C)
        return affine(hidden_states, weight, self.bias.repeat(4)).unflatten(-1, (4, -1))


class SamSplitMaskDecoder(nn.Module):
    """Image embedding and prompt embeddings to masks and their predicted IoU."""

    def __init__(self, config):
        super().__init__()
        hidden_size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.num_mask_tokens = config.num_multimask_outputs + 1
        self.iou_token = nn.Embedding(1, hidden_size)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, hidden_size)
        self.transformer = SamSplitTwoWayTransformer(config)
        self.upscale_conv1 = SamSplitUpscaling(hidden_size, hidden_size // 4)
        self.upscale_layer_norm = nn.LayerNorm(hidden_size // 4, eps=1e-6)
        self.upscale_conv2 = SamSplitUpscaling(hidden_size // 4, hidden_size // 8)
        self.activation = nn.GELU()
        self.output_hypernetworks_mlps = nn.ModuleList(
            SamSplitFeedForward(hidden_size, hidden_size, hidden_size // 8, 3) for _ in range(self.num_mask_tokens)
        )
        self.iou_prediction_head = SamSplitFeedForward(
            hidden_size, config.iou_head_hidden_dim, self.num_mask_tokens, config.iou_head_depth
        )

    def forward(
        self,
        image_embeddings,
        image_positional_embeddings,
        sparse_prompt_embeddings,
        dense_prompt_embeddings,
        multimask_output,
        attention_similarity=None,
        target_embedding=None,
        output_attentions=False,
        least_iou=None,
    ):
        """Decode all prompts, a bounded number at a time.

        Args:
            image_embeddings: (B, C, H, W).
            image_positional_embeddings: (1, C, H, W).
            sparse_prompt_embeddings: (B, P, T, C), or None for no prompt.
            dense_prompt_embeddings: (B, C, H, W) or (B, P, C, H, W).
            multimask_output: True for the masks of an ambiguous prompt, False for the one of an unambiguous prompt.
            attention_similarity: broadcast to (B * P, heads, T, H * W), or None.
            target_embedding: broadcast to (B, P, T, C), or None.
            output_attentions: whether to return what the tokens add to the image.
            least_iou: without gradients, prompts with no predicted IoU above it get masks of zeros, at no cost.

        Returns:
            masks (B, P, M, 4 * H, 4 * W), their predicted IoU (B, P, M), and a tuple of (B * P, 1, H * W, C) or None.
        """
        batch, _, *grid = image_embeddings.shape
        tokens = self._tokens(sparse_prompt_embeddings, batch, image_embeddings.device)
        if dense_prompt_embeddings.ndim == 4:
            dense_prompt_embeddings = dense_prompt_embeddings[:, None]
        prompts = max(tokens.shape[1], dense_prompt_embeddings.shape[1])
        tokens = tokens.expand(-1, prompts, -1, -1)
        image = (image_embeddings[:, None] + dense_prompt_embeddings).to(tokens.dtype)  # (B, P or 1, C, H, W)
        image = image.flatten(3).transpose(2, 3).contiguous()  # (B, P or 1, H * W, C)
        image_positions = image_positional_embeddings.flatten(2).transpose(1, 2)[None].contiguous()  # (1, 1, H * W, C)
        projected = [layer(x) for x, layer in self.transformer.layers[0].project_image(image, image_positions)]
        check = InputCheck(image_embeddings, "image_embeddings")
        if attention_similarity is not None:
            scores_shape = (batch * prompts, self.num_attention_heads, tokens.shape[2], image.shape[2])
            check("attention_similarity", attention_similarity, scores_shape, broadcast=True)
            attention_similarity = _with_prompt_axis(attention_similarity, batch, prompts)
        if target_embedding is not None:
            check("target_embedding", target_embedding, tuple(tokens.shape), broadcast=True)
            target_embedding = target_embedding[(None,) * (4 - target_embedding.ndim)]

        wanted = range(1, self.num_mask_tokens) if multimask_output else range(1)
        inputs = image, *projected, attention_similarity, target_embedding
        masks, ious, added = [], [], []
        for part in _parts(prompts, image):
            part_tokens, part_image, part_added = self.transformer(
                tokens[:, part], *(_take(x, part) for x in inputs), image_positions, 1 + wanted.stop, output_attentions
            )
            ious.append(self.iou_prediction_head(part_tokens[:, :, 0])[:, :, wanted.start : wanted.stop])
            kept = slice(None) if least_iou is None else (ious[-1] > least_iou).any(-1).any(0).nonzero()[:, 0]
            part_masks = self._masks(part_tokens[:, kept], part_image[:, kept], grid, wanted)
            if torch.is_grad_enabled():
                masks.append(part_masks)
            else:  # into their place at once: all parts beside their concatenation would be twice the memory
                masks = masks or [part_masks.new_zeros(batch, prompts, *part_masks.shape[2:])]
                masks[0][:, part][:, kept] = part_masks
            added.extend([part_added] * output_attentions)
        if output_attentions:
            added = tuple(torch.cat(block, dim=1).flatten(0, 1)[:, None] for block in zip(*added, strict=True))
        return torch.cat(masks, dim=1) if len(masks) > 1 else masks[0], torch.cat(ious, dim=1), added or None

    def _tokens(self, sparse_prompt_embeddings, batch, device):
        """The IoU token, the mask tokens and the prompt's own: (B, P, 1 + masks + prompt tokens, C)."""
        mask_tokens = self.mask_tokens(torch.arange(self.num_mask_tokens, device=device))
        output_tokens = torch.cat([_row(self.iou_token, device), mask_tokens])
        if sparse_prompt_embeddings is None:
            return output_tokens.expand(batch, 1, -1, -1)
        output_tokens = output_tokens.expand(*sparse_prompt_embeddings.shape[:2], -1, -1)
        return torch.cat([output_tokens, sparse_prompt_embeddings.to(output_tokens.dtype)], dim=2)

    def _masks(self, tokens, image, grid, wanted):
        """Logits (B, P, M, 4 * H, 4 * W) of the wanted mask tokens."""
        heads = self.output_hypernetworks_mlps
        filters = torch.stack([heads[index](tokens[:, :, 1 + index]) for index in wanted], dim=2)  # (B, P, M, C / 8)
        if self.training and torch.is_grad_enabled():  # the heads of masks that are not wanted
            filters = _ZeroGradients.apply(filters, *heads.parameters())
        masks = []
        for piece in in_pieces(image, TOKENS_AT_ONCE):
            upscaled = self.activation(self.upscale_layer_norm(self.upscale_conv1(piece)))  # (B, P, places, 4, C / 4)
            upscaled = self.activation(self.upscale_conv2(upscaled))  # (B, P, places, 4, 4, C / 8)
            masks.append(filters @ upscaled.flatten(2, 4).transpose(-1, -2))
        masks = torch.cat(masks, dim=-1)  # (B, P, M, H * W * 4 * 4)
        masks = masks.unflatten(-1, (*grid, 2, 2, 2, 2))  # rows, columns, then row and column twice over
        return masks.permute(0, 1, 2, 3, 5, 7, 4, 6, 8).flatten(6).flatten(3, 5)  # (B, P, M, 4 * H, 4 * W)


def _parts(prompts, image):
    """Slices of prompts to decode at once; all of them when the number is a symbol that a compiler traces."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    limit = max(1, (PROMPTS_BYTES_CPU if on_cpu(image) else PROMPTS_BYTES_ACCELERATOR) // image[:, 0].nbytes)
    return [slice(start, start + limit) for start in range(0, prompts, limit)]


def _take(per_prompt, part):
    """The part's share of a (B, P, ...) tensor; all of one that the prompts share, (B, 1, ...), or of None."""
    return per_prompt[:, part] if per_prompt is not None and per_prompt.shape[1] > 1 else per_prompt


def _with_prompt_axis(similarity, batch, prompts):
    """A tensor that broadcasts to (B * P, heads, T, H * W) as one that broadcasts to (B, P, heads, T, H * W)."""
    similarity = similarity[(None,) * (4 - similarity.ndim)]
    return similarity[None] if similarity.shape[0] == 1 else similarity.unflatten(0, (batch, prompts))


def segmentation_loss(
    masks: torch.Tensor, ious: torch.Tensor, labels: torch.Tensor, focal: float = 20, iou_power: float = 2
) -> torch.Tensor:
    """SAM's training loss: focal * focal loss + dice of the best mask, and the squared error of all predicted IoUs.

    Labels finer than the masks are averaged over each mask pixel, which leaves shares between 0 and 1 at an object's
    edge; pixels with `VOID_LABEL` take no part, and a prompt whose labels are void everywhere counts nothing.

    Args:
        masks, ious: (B, P, M, h, w), logits, and (B, P, M), predicted.
        labels: (B, P, h, w) or (B, P, n * h, n * w), 0, 1 or `VOID_LABEL`.
        focal: weight of the focal loss. At 0 edges stay steep, so masks stay stable; calibrated ones are soft.
        iou_power: of the error of predicted IoUs: 2 teaches their mean, and 1, as in SAM 2, their median.

    Returns:
        (), in float32 at least: the mean over the prompts that are not padding, 0 if there is none.

    Source: Segment Anything (arXiv 2304.02643), appendix A; focal loss with alpha 0.25 and gamma 2 and dice loss with
    one pixel of smoothing as in DETR (arXiv 2005.12872), which it follows.

    >>> labels = torch.zeros(1, 1, 64, 64)
    >>> labels[..., 20:40, 10:50] = 1
    >>> exact, empty = 20 * (2 * labels[:, :, None] - 1), torch.full((1, 1, 1, 64, 64), -20.0)
    >>> round(segmentation_loss(exact, torch.ones(1, 1, 1), labels).item(), 3)
    0.0
    >>> round(segmentation_loss(empty, torch.zeros(1, 1, 1), labels).item(), 1)  # an empty mask, predicted IoU 0
    20.5
    """
    masks, ious = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (masks, ious))
    valid, size = (labels != VOID_LABEL).to(masks.dtype), masks.shape[-2:]
    weight = F.adaptive_avg_pool2d(valid, size)  # (B, P, h, w), the share of each mask pixel that is not void
    inside = F.adaptive_avg_pool2d(labels.to(masks.dtype) * valid, size)
    target = (inside / weight.clamp(min=torch.finfo(weight.dtype).tiny))[:, :, None]  # (B, P, 1, h, w)
    real, weight = weight.flatten(2).sum(-1) > 0, weight[:, :, None]  # (B, P) and (B, P, 1, h, w)
    pixels = weight.flatten(3).sum(-1).clamp(min=1)  # (B, P, 1)

    p = masks.sigmoid()  # (B, P, M, h, w)
    p_t = p * target + (1 - p) * (1 - target)
    alpha_t = 0.25 * target + 0.75 * (1 - target)
    cross_entropy = F.binary_cross_entropy_with_logits(masks, target.expand_as(masks), reduction="none")
    focal_loss = (weight * alpha_t * (1 - p_t) ** 2 * cross_entropy).flatten(3).sum(-1) / pixels  # (B, P, M)

    intersection = (weight * p * target).flatten(3).sum(-1)
    dice = 1 - (2 * intersection + 1) / ((weight * (p + target)).flatten(3).sum(-1) + 1)

    with torch.no_grad():
        predicted, wanted = (masks > 0).to(weight.dtype), (target > 0.5).to(weight.dtype)
        union = (weight * torch.maximum(predicted, wanted)).flatten(3).sum(-1)
        true_ious = (weight * predicted * wanted).flatten(3).sum(-1) / union.clamp(min=1)

    per_prompt = (focal * focal_loss + dice).amin(-1) + ((ious - true_ious).abs() ** iou_power).mean(-1)  # (B, P)
    return torch.where(real, per_prompt, 0).sum() / real.sum().clamp(min=1)


class SamSplitPreTrainedModel(CompleteLoading, PreTrainedModel):
    """What both models share: initialisation, and loading that never leaves a weight random in silence."""

    config_class = SamSplitConfig
    base_model_prefix = "sam_split"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean; Trainer divides by its accumulation steps
    _no_split_modules = ["SamSplitVisionLayer"]  # noqa: RUF012
    _supports_sdpa = True

    # Before transformers 5, checkpointing is re-entrant by default, which drops the gradients of adapters.
    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
            super().gradient_checkpointing_enable({"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_encoder.patch_embed

    @classmethod
    def _can_set_attn_implementation(cls):
        return True  # each attention asks its config; transformers would look for calls that its own files make

    @torch.no_grad()
    def _init_weights(self, module):
        # Only torch.nn.init: transformers 5 guards it, so that it leaves loaded weights alone.
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, SamSplitVisionAttention) and module.config.use_rel_pos:
            nn.init.zeros_(module.rel_pos_h)
            nn.init.zeros_(module.rel_pos_w)
        elif isinstance(module, SamSplitVisionEncoder) and module.pos_embed is not None:
            nn.init.zeros_(module.pos_embed)
        elif isinstance(module, SamSplitPositionalEmbedding):
            nn.init.normal_(module.positional_embedding)


class SamSplitVisionModel(SamSplitPreTrainedModel):
    """The image encoder alone. It loads from a whole model's folder, and leaves the rest of it out."""

    config_class = SamSplitVisionConfig
    _keys_to_ignore_on_load_unexpected = [r"^(prompt_encoder|mask_decoder|shared_image_embedding)\."]  # noqa: RUF012

    def __init__(self, config: SamSplitVisionConfig):
        super().__init__(config)
        self.vision_encoder = SamSplitVisionEncoder(config)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> SamSplitVisionEncoderOutput | tuple[torch.Tensor, ...]:
        """Encode images.

        Args:
            pixel_values: (B, channels, height, width), normalised, resized and padded by `SamProcessor`.
            output_attentions: whether to return attention weights, for which all scores are held.
            output_hidden_states: whether to return the tokens before and after each layer.
            return_dict: False for a plain tuple.
            kwargs: `original_sizes` and `reshaped_input_sizes`, which `SamProcessor` returns, change nothing.

        Raises:
            TypeError: if `pixel_values` is no tensor, or a keyword is unknown.
            ValueError: if the shape of `pixel_values` is not the model's, or its values are integers.
        """
        check_keywords(SamSplitVisionModel.forward, kwargs)
        output = self.vision_encoder(
            pixel_values,
            _default(output_attentions, self.config, "output_attentions"),
            _default(output_hidden_states, self.config, "output_hidden_states"),
        )
        return output if _default(return_dict, self.config, "return_dict") else output.to_tuple()


class SamSplitModel(SamSplitPreTrainedModel):
    """Segment Anything: an image and prompts in, masks and their predicted IoU out.

    Args:
        config: of a model with new weights; `from_pretrained` loads one with trained weights.

    >>> config = SamSplitConfig(vision_config={"image_size": 256, "hidden_size": 48, "num_hidden_layers": 2})
    >>> model = SamSplitModel(config).eval()
    >>> box = torch.tensor([[[20.0, 30.0, 120.0, 140.0]]])
    >>> with torch.no_grad():
    ...     output = model(pixel_values=torch.zeros(1, 3, 256, 256), input_boxes=box)
    >>> output.pred_masks.shape, output.iou_scores.shape
    (torch.Size([1, 1, 3, 64, 64]), torch.Size([1, 1, 3]))
    """

    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^prompt_encoder\.shared_embedding\.positional_embedding$"  # stock's second copy of the positional matrix
    ]

    def __init__(self, config: SamSplitConfig):
        super().__init__(config)
        # The matrix is owned once and handed to the prompt encoder, so no two parameters are tied.
        self.shared_image_embedding = SamSplitPositionalEmbedding(config.vision_config.num_pos_feats)
        self.vision_encoder = SamSplitVisionEncoder(config.vision_config)
        self.prompt_encoder = SamSplitPromptEncoder(config.prompt_encoder_config)
        self.mask_decoder = SamSplitMaskDecoder(config.mask_decoder_config)
        self.post_init()

    def get_image_wide_positional_embeddings(self) -> torch.Tensor:
        """The positional embedding (1, C, H, W) of every place in the grid."""
        return self._image_positions(self.shared_image_embedding.positional_embedding.device)

    def get_image_embeddings(
        self,
        pixel_values: torch.Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> torch.Tensor:
        """The image embedding (B, C, H, W), to be computed once and given to `forward` for many prompts.

        Gradients flow when they are enabled; wrap the call in `torch.no_grad()` for inference.

        Args:
            pixel_values: (B, channels, height, width), as for `forward`.
            output_attentions, output_hidden_states: change nothing; transformers' `SamModel` takes them.

        Raises:
            TypeError: if `pixel_values` is no tensor.
            ValueError: if the shape of `pixel_values` is not the model's, or its values are integers.
        """
        return self.vision_encoder(pixel_values).last_hidden_state

    def get_prompt_embeddings(
        self,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The embeddings of prompts, given as for `forward`.

        Returns:
            The sparse embeddings (B, P, T, C), or None if there are neither points nor boxes, and the dense embeddings
            (B, C, H, W), or (B, P, C, H, W) for masks that differ from prompt to prompt.

        Raises:
            ValueError: if the prompts' shapes do not fit each other or the model.
        """
        return self._embed_prompts(input_points, input_labels, input_boxes, input_masks, InputCheck())

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
        multimask_output: bool = True,
        attention_similarity: torch.Tensor | None = None,
        target_embedding: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> SamSplitImageSegmentationOutput | tuple[torch.Tensor, ...]:
        """Segment what the prompts point at.

        Args:
            pixel_values: (B, channels, height, width), normalised, resized and padded by `SamProcessor`; any floating
                dtype. Give these or `image_embeddings`.
            input_points: (B, P, N, 2), (x, y) in pixels of the resized input.
            input_labels: (B, P, N), 1 foreground, 0 background, -1 not a point, -10 padding; all 1 if left out.
            input_boxes: (B, P, 4), (x0, y0, x1, y1) in pixels of the resized input.
            input_masks: (B, 1, 4 * H, 4 * W), one mask per image, or (B, P, 1, 4 * H, 4 * W), one per prompt, as
                logits such as an earlier `pred_masks`.
            image_embeddings: (B, C, H, W) from `get_image_embeddings`.
            multimask_output: True for `num_multimask_outputs` masks per prompt, False for one.
            attention_similarity: broadcast to (B * P, heads, T, H * W), added to the tokens' attention to the image
                (PerSAM, arXiv 2305.03048).
            target_embedding: broadcast to (B, P, T, C), added to the tokens (PerSAM).
            labels: (B, P, height, width) like `pixel_values`, or (B, P, 4 * H, 4 * W) like the masks: 1 inside the
                object, 0 outside, -100 where neither counts. The output then has a `loss`, see `segmentation_loss`; a
                prompt whose labels are -100 everywhere is padding.
            output_attentions: whether to return attention weights, for which all scores are held, and what the mask
                decoder's tokens add to the image.
            output_hidden_states: whether to return the image encoder's tokens before and after each layer.
            return_dict: False for a plain tuple.
            kwargs: `original_sizes` and `reshaped_input_sizes`, which `SamProcessor` returns, change nothing.

        Raises:
            TypeError: if an argument is no tensor, or a keyword is unknown.
            ValueError: if both or neither of `pixel_values` and `image_embeddings` are given, or if shapes, devices or
                values do not fit each other or the model.
        """
        check_keywords(SamSplitModel.forward, kwargs)
        if multimask_output not in (True, False):
            raise TypeError(f"multimask_output must be True or False, got {multimask_output!r}")
        if (pixel_values is None) == (image_embeddings is None):
            given = "neither" if pixel_values is None else "both"
            raise ValueError(f"give either pixel_values or image_embeddings, got {given}")
        output_attentions = _default(output_attentions, self.config, "output_attentions")
        if pixel_values is not None:
            output_hidden_states = _default(output_hidden_states, self.config, "output_hidden_states")
            vision = self.vision_encoder(pixel_values, output_attentions, output_hidden_states)
        else:
            channels, grid = self.config.vision_config.output_channels, self.prompt_encoder.grid
            InputCheck()("image_embeddings", image_embeddings, ("B", channels, *grid), floating=True)
            check_device("image_embeddings", image_embeddings, self.mask_decoder.mask_tokens.weight)
            vision = SamSplitVisionEncoderOutput(last_hidden_state=image_embeddings)
        check = InputCheck(vision.last_hidden_state, "image_embeddings" if pixel_values is None else "pixel_values")
        image_embeddings = vision.last_hidden_state
        sparse, dense = self._embed_prompts(input_points, input_labels, input_boxes, input_masks, check)
        if labels is not None:
            self._check_labels(labels, check)
        positions, personal = self._image_positions(image_embeddings.device), (attention_similarity, target_embedding)
        masks, ious, added = self.mask_decoder(
            image_embeddings, positions, sparse, dense, multimask_output, *personal, output_attentions
        )
        output = SamSplitImageSegmentationOutput(
            loss=None if labels is None else segmentation_loss(masks, ious, labels),
            iou_scores=ious,
            pred_masks=masks,
            vision_hidden_states=vision.hidden_states,
            vision_attentions=vision.attentions,
            mask_decoder_attentions=added,
        )
        return output if _default(return_dict, self.config, "return_dict") else output.to_tuple()

    def generate_masks(self, images: object, **options: object) -> Any:
        """Segment everything: points all over each image, and every good mask once.

        Arguments, results and errors are those of `mask_generation_sam_split.generate_masks`.
        """
        # Not at the top, for its imports; all, because transformers before 5.11 copies only what this file imports.
        from .images_sam_split import pixels_of  # noqa: F401
        from .mask_generation_sam_split import generate_masks
        from .run_lengths_sam_split import run_edges  # noqa: F401

        return generate_masks(self, images, **options)

    def _image_positions(self, device):
        rows, columns = self.prompt_encoder.grid
        y = (torch.arange(rows, device=device) + 0.5) / rows
        x = (torch.arange(columns, device=device) + 0.5) / columns
        positions = torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=-1)  # (H, W, 2)
        return self.shared_image_embedding(positions).permute(2, 0, 1)[None]  # (1, C, H, W)

    def _embed_prompts(self, points, labels, boxes, masks, check):
        """The prompt encoder on checked prompts; `check` knows the images, if there are any."""
        if points is None and labels is not None:
            raise ValueError("input_labels were given without input_points; give both or neither")
        if points is not None:
            check("input_points", points, ("B", "P", "N", 2), real=True)
            if labels is None:
                labels = torch.ones(points.shape[:-1], dtype=torch.long, device=points.device)
            check("input_labels", labels, ("B", "P", "N"))
            labels = labels.long() if labels.dtype == torch.bool else labels  # which could not hold the -1 of padding
            check_values("input_labels", labels, POINT_LABELS)
        if boxes is not None:
            hint = "add the prompt axis with input_boxes[:, None]" if getattr(boxes, "ndim", 0) == 2 else ""
            check("input_boxes", boxes, ("B", "P", 4), real=True, hint=hint)
        if masks is not None:
            size = 1, *(4 * side for side in self.prompt_encoder.grid)
            shape = check("input_masks", masks, ("B", *size), ("B", "P", *size), ("B", *size[1:]), floating=True)
            masks = masks[:, None] if len(shape) == 3 else masks
        if 0 in check.sizes.get("P", ()):
            raise ValueError(f"{check.sizes['P'][1]} holds no prompt (P = 0); leave it out for no prompt")
        batch, _ = check.sizes.get("B", (1, None))
        device, _ = check.device or (self.prompt_encoder.no_mask_embed.weight.device, None)
        return self.prompt_encoder(points, labels, boxes, masks, batch, device, self.shared_image_embedding)

    def _check_labels(self, labels, check):
        """`labels` against the number of images and prompts, the two sizes they may have and their three values."""
        patch, (rows, columns) = self.config.vision_config.patch_size, self.prompt_encoder.grid
        check.sizes.setdefault("P", (1, "a call without prompts"))
        check("labels", labels, ("B", "P", patch * rows, patch * columns), ("B", "P", 4 * rows, 4 * columns))
        check_values("labels", labels, {1: "inside", 0: "outside", VOID_LABEL: "void"})


def _default(value, config, name):
    """An argument of `forward`, or what the config says where it was left out."""
    return value if value is not None else getattr(config, name, name == "return_dict")


SamSplitVisionModel.register_for_auto_class("AutoModel")
SamSplitModel.register_for_auto_class("AutoModel")
