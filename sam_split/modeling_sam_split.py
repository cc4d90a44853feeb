"""SamSplit: Segment Anything (arXiv 2304.02643) with separate `q`, `k` and `v` layers in its image encoder.

    pixel_values ──> vision_encoder ──> image embedding ──┐
                                                          ├──> mask_decoder ──> pred_masks, iou_scores
    points, boxes, masks ──> prompt_encoder ──> embeddings ┘

The parameters carry the names of transformers' `SamModel`, except that `attn.qkv` is cut into `attn.q`, `attn.k` and
`attn.v`, so `LoraConfig(target_modules=["q", "v"])` adapts the image encoder and nothing else. Outputs are those of
`SamModel`; no score matrix over all pairs of image tokens is ever held, forward or backward, unless
`attn_implementation="eager"` asks for it.

Shapes: `B` images, `P` prompts per image, `N` points per prompt, `T` tokens per prompt in the mask decoder, `M` masks
per prompt, `H W` rows and columns of the token grid, `C` channels, `D` channels per head, `S` side of a window in
tokens. Points and boxes are (x, y) in pixels of the resized, padded input; sizes are (height, width).

This file and `configuration_sam_split.py` are copied into each saved model folder. They import torch, transformers
and the standard library, and read no file, network or environment.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_sam_split import SamSplitConfig, SamSplitVisionConfig

# Scores held at once by the banded attention: 4 MB in float32, which a core's caches keep.
BAND_SCORES = 2**20

# Tokens that pass an MLP of the image encoder at once, so that its wide activations stay small and in cache. They end
# up a little smaller than the blocks that others leave, which an allocator can then use again.
TOKENS_AT_ONCE = 500

# The label of pixels that count neither as object nor as background, torch's usual ignore_index. Not 255: a mask read
# from a PNG would pass for void wherever there is an object.
VOID_LABEL = -100

# Prompts decoded at once. One needs about 30 MB in float32: a CPU is fastest on few, an accelerator on many.
PROMPTS_AT_ONCE_CPU = 2
PROMPTS_AT_ONCE_ACCELERATOR = 64


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
        return self.lin2(self.act(self.lin1(hidden_states)))


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
        if tuple(pixel_values.shape[1:]) != self.expected_shape or pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values must be (B, {', '.join(map(str, self.expected_shape))}), got "
                f"{tuple(pixel_values.shape)}; SamProcessor resizes and pads to that, and "
                "`sam-split convert --image-size` makes a model for another size"
            )
        hidden_states = self.projection(pixel_values.to(self.projection.weight.dtype)).permute(
            0, 2, 3, 1
        )  # (B, H, W, C)
        return hidden_states.contiguous()  # every layer after it would inherit the strides


def window_indices(grid: tuple[int, int], size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each token goes when a grid is cut into windows, and where to find it afterwards.

    The last row and column of windows may reach beyond the grid; those places all point to one extra token, number H
    * W.

    Args:
        grid: (H, W) in tokens.
        size: S, the side of a window in tokens.
        device: of the indices.

    Returns:
        `to_windows` (windows, S * S), the numbers of each window's tokens, and `from_windows` (H * W,), its inverse.

    Source: the windowed layers of ViTDet (arXiv 2203.16527); there, padding is at the bottom and the right as well.

    >>> to_windows, from_windows = window_indices((2, 3), 2, torch.device("cpu"))
    >>> to_windows.tolist()  # two windows; 6 is the extra token
    [[0, 1, 3, 4], [2, 6, 5, 6]]
    >>> to_windows.flatten()[from_windows].tolist()
    [0, 1, 2, 3, 4, 5]
    """
    rows, columns = grid
    window_rows, window_columns = -(-rows // size), -(-columns // size)
    row = torch.arange(window_rows * size, device=device)[:, None]
    column = torch.arange(window_columns * size, device=device)[None, :]
    token = torch.where((row < rows) & (column < columns), row * columns + column, rows * columns)
    to_windows = token.view(window_rows, size, window_columns, size).transpose(1, 2).flatten(2).flatten(0, 1)

    window = (row // size) * window_columns + column // size
    place = window * size**2 + (row % size) * size + column % size
    return to_windows, place[:rows, :columns].flatten()


def by_offset(table: torch.Tensor) -> torch.Tensor:
    """Relative positions (2 * L - 1, D) as (L queries, L keys, D): row i is for a query i - (L - 1) after its key."""
    length = (table.shape[0] + 1) // 2
    position = torch.arange(length, device=table.device)
    return table[position[:, None] - position[None, :] + length - 1]


def relative_position_scores(
    query: torch.Tensor, by_row: torch.Tensor, by_column: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much each query likes each row and each column of keys, for how far away they lie.

    The score of a query-key pair is the sum of the two, so H + W numbers per query stand for H * W.

    Args:
        query: (..., H * W, D), before the 1 / sqrt(D) scaling.
        by_row: (H, H, D), the vector of each vertical offset of a query from a key.
        by_column: (W, W, D), the same for horizontal offsets.

    Returns:
        (..., H * W, H) for the rows and (..., H * W, W) for the columns.

    Source: decomposed relative positions of MViTv2 (arXiv 2112.01526).
    """
    query = query.unflatten(-2, (len(by_row), len(by_column)))  # (..., H, W, D)
    rel_h = torch.einsum("...hwd,hkd->...hwk", query, by_row)
    rel_w = torch.einsum("...hwd,wkd->...hwk", query, by_column)
    return rel_h.flatten(-3, -2), rel_w.flatten(-3, -2)


def eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rel_h: torch.Tensor | None,
    rel_w: torch.Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its formula, with all scores in memory.

    Args:
        query, key, value: (B, heads, H * W, D).
        rel_h, rel_w: (B, heads, H * W, H) and (B, heads, H * W, W), or None twice.
        scale: factor of the dot products.
        dropout: share of attention weights set to zero.

    Returns:
        (B, heads, H * W, D) and the weights (B, heads, H * W, H * W).
    """
    scores = (query * scale) @ key.transpose(-2, -1)
    if rel_h is not None:
        scores = scores + (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return F.dropout(weights, dropout) @ value, weights


def folded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rel_h: torch.Tensor,
    rel_w: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The same attention through the fused kernels of `scaled_dot_product_attention`, which take no computed bias.

    The bias becomes part of the dot product: [q * scale | rel_h | rel_w] . [k | one-hot row | one-hot column]. Exact,
    and linear in tokens forward and backward. Arguments and first result as in `eager_attention`.
    """
    rows, columns, head_dim = rel_h.shape[-1], rel_w.shape[-1], value.shape[-1]
    one_hot_row = torch.eye(rows, dtype=key.dtype, device=key.device).repeat_interleave(columns, 0)  # (H * W, H)
    one_hot_column = torch.eye(columns, dtype=key.dtype, device=key.device).repeat(rows, 1)  # (H * W, W)
    one_hot = torch.cat([one_hot_row, one_hot_column], dim=-1).expand(*key.shape[:2], -1, -1)
    query = torch.cat([query * scale, rel_h.to(query.dtype), rel_w.to(query.dtype)], dim=-1)
    key = torch.cat([key, one_hot], dim=-1)
    padding = -query.shape[-1] % 8  # the kernels want aligned rows
    query, key = F.pad(query, (0, padding)), F.pad(key, (0, padding))
    # CUDA's memory-efficient kernel takes narrower values; the CPU's would fall back to a full score matrix.
    width = head_dim + -head_dim % 8 if query.is_cuda else query.shape[-1]
    value = F.pad(value, (0, width - head_dim))
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :head_dim]


class BandedAttention(torch.autograd.Function):
    """The same attention on a CPU: a window or a head at a time, in bands of query rows, all within its caches.

    Neither scores nor windows are ever laid out for the whole image. Backward computes them again from the projected
    tokens, the one thing that is kept.
    """

    @staticmethod
    def blocks(query, windows):
        """Index pairs (tokens of an image, heads) that cover all scores, and the rows of queries to take at once."""
        _, tokens, heads, _ = query.shape
        if windows is not None:
            tokens = windows.shape[1]
        rows = max(1, min(tokens, BAND_SCORES // tokens))
        group = max(1, min(heads, BAND_SCORES // (rows * tokens)))
        bands = [slice(row, row + rows) for row in range(0, tokens, rows)]
        blocks = [
            (window, slice(head, head + group))
            for window in ([slice(None)] if windows is None else windows)
            for head in range(0, heads, group)
        ]
        return blocks, bands, query.new_empty(2, group, rows, tokens)  # asking for memory takes longer than filling it

    @staticmethod
    def weights(query, key, rel_h, rel_w, scale, scores):
        """Attention weights (heads, queries, keys) of one band, in the memory of `scores`."""
        scores = scores[: query.shape[0], : query.shape[1]]
        by_key = scores.unflatten(-1, (rel_h.shape[-1], rel_w.shape[-1]))  # (heads, queries, H, W)
        torch.add(rel_h[..., :, None], rel_w[..., None, :], out=by_key)
        scores.baddbmm_(query, key.transpose(1, 2), alpha=scale)
        return torch.softmax(scores, dim=-1, out=scores)

    @staticmethod
    def forward(ctx, query, key, value, by_row, by_column, windows, scale):
        """(B, tokens, heads, D) to the same.

        Args:
            query, key, value: (B, tokens, heads, D).
            by_row, by_column: see `relative_position_scores`.
            windows: (windows, S * S), the tokens of each window, or None for one window over all of them.
            scale: factor of the dot products.
        """
        ctx.save_for_backward(query, key, value, by_row, by_column)
        ctx.windows, ctx.scale = windows, scale
        blocks, bands, (scores, _) = BandedAttention.blocks(query, windows)
        output = torch.empty_like(query)
        for image in range(len(query)):
            for block in blocks:
                q, k, v = (x[image][block].transpose(0, 1) for x in (query, key, value))  # (heads, tokens, D)
                rel_h, rel_w = relative_position_scores(q, by_row, by_column)
                context = torch.empty_like(q)
                for band in bands:
                    at = slice(None), band
                    weights = BandedAttention.weights(q[at], k, rel_h[at], rel_w[at], scale, scores)
                    torch.bmm(weights, v, out=context[at])
                output[image][block] = context.transpose(0, 1)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        saved = ctx.saved_tensors  # checkpointing hands them out once
        tokens, tables = saved[:3], saved[3:]
        learned = any(ctx.needs_input_grad[3:5])  # the tables, which are frozen beside adapters
        blocks, bands, (scores, grad_scores) = BandedAttention.blocks(tokens[0], ctx.windows)
        # The token that stands for all padding gets a part from several windows, so sums are float32 at least.
        wide = torch.promote_types(grad_output.dtype, torch.float32)
        grad_tokens = [torch.zeros_like(x, dtype=wide) for x in tokens]
        grad_tables = [torch.zeros_like(x, dtype=wide) for x in tables]
        for image in range(len(grad_output)):
            for block in blocks:
                q, k, v, grad_context = (x[image][block].transpose(0, 1) for x in (*tokens, grad_output))
                with torch.enable_grad():
                    leaves = [x.detach().requires_grad_(x is q or learned) for x in (q, *tables)]
                    rel = relative_position_scores(*leaves)
                rel_h, rel_w = (x.detach() for x in rel)
                grad_rel = [torch.empty_like(x) for x in rel]
                grad_q = torch.empty_like(q)
                # (heads, D, tokens), in which the products below are a quarter faster
                grad_k, grad_v = (torch.zeros_like(x.transpose(1, 2), dtype=wide) for x in (k, v))
                for band in bands:
                    at = slice(None), band
                    weights = BandedAttention.weights(q[at], k, rel_h[at], rel_w[at], ctx.scale, scores)
                    _add_product(grad_v, grad_context[at].transpose(1, 2), weights)
                    grad = grad_scores[: weights.shape[0], : weights.shape[1]]
                    torch.bmm(grad_context[at], v.transpose(1, 2), out=grad)
                    grad *= weights
                    grad.addcmul_(weights, grad.sum(-1, keepdim=True), value=-1)
                    grad_q[at] = (grad @ k) * ctx.scale
                    _add_product(grad_k, q[at].transpose(1, 2) * ctx.scale, grad)
                    by_key = grad.unflatten(-1, (rel_h.shape[-1], rel_w.shape[-1]))  # (heads, queries, H, W)
                    grad_rel[0][at], grad_rel[1][at] = by_key.sum(-1), by_key.sum(-2)
                grad_query, *grad_offsets = torch.autograd.grad(rel, leaves if learned else leaves[:1], grad_rel)
                grad_q, grad_k, grad_v = grad_q + grad_query, grad_k.transpose(1, 2), grad_v.transpose(1, 2)
                for total, part in zip(grad_tables if learned else [], grad_offsets, strict=True):
                    total += part
                for total, part in zip(grad_tokens, (grad_q, grad_k, grad_v), strict=True):
                    _add_at(total[image], block, part.transpose(0, 1))
        grads = zip((*grad_tokens, *grad_tables), saved, strict=True)
        return *(grad.to(x.dtype) for grad, x in grads), None, None


def _add_product(total, left, right):
    """`total += left @ right`; the sum may be of a wider dtype."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total += left @ right


def _add_at(total, block, part):
    """`total[block] += part`, where tokens may be named several times."""
    tokens, heads = block
    if isinstance(tokens, slice):
        total[block] += part
    else:
        total[:, heads].index_add_(0, tokens, part.to(total.dtype))


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
        if config.use_rel_pos:
            rows, columns = (window_size, window_size) if window_size else config.grid
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * rows - 1, self.head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * columns - 1, self.head_dim))

    def forward(self, hidden_states, output_attentions=False):
        """(B, H, W, C) to the same, and the weights (B * windows * heads, tokens, tokens) or None."""
        grid = hidden_states.shape[1:3]
        tokens = hidden_states.flatten(1, 2)  # (B, H * W, C)
        if self.window_size:
            # One zero token stands for all padding: its query, key and value are whatever the layers, with the
            # biases and adapters they have, make of zero.
            tokens = F.pad(tokens, (0, 0, 0, 1))  # (B, H * W + 1, C)
        q, k, v = (layer(tokens).unflatten(-1, (-1, self.head_dim)) for layer in (self.q, self.k, self.v))
        context, weights = self._attend(q, k, v, grid, output_attentions)  # (B, H * W, heads, D)
        return self.proj(context.flatten(2)).unflatten(1, grid), weights

    def _attend(self, q, k, v, grid, output_attentions):
        """The attention that `attn_implementation` names, on (B, H * W, heads, D), in windows with a zero token more.

        Tensor parallelism leaves only some of the heads here.
        """
        implementation = self.config._attn_implementation or "sdpa"
        dropout = self.config.attention_dropout if self.training else 0.0
        self._check_implementation(implementation, dropout, output_attentions)
        to_windows = from_windows = by_row = by_column = rel_h = rel_w = weights = None
        if self.window_size:
            to_windows, from_windows = window_indices(grid, self.window_size, q.device)
        if self.config.use_rel_pos:
            by_row, by_column = (by_offset(table).to(q.dtype) for table in (self.rel_pos_h, self.rel_pos_w))
        banded = implementation == "sdpa" and not (q.is_cuda or torch.compiler.is_compiling())
        if banded and self.config.use_rel_pos:
            with torch.autocast("cpu", enabled=False):
                context = BandedAttention.apply(q, k, v, by_row, by_column, to_windows, self.scale)
            return context[:, : grid[0] * grid[1]], None

        if self.window_size:
            shape, to_windows = to_windows.shape, to_windows.flatten()
            q, k, v = (x.index_select(1, to_windows).unflatten(1, shape).flatten(0, 1) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B or B * windows, heads, H * W or S * S, D)
        if self.config.use_rel_pos:
            rel_h, rel_w = relative_position_scores(q, by_row, by_column)
        if implementation == "eager":
            context, weights = eager_attention(q, k, v, rel_h, rel_w, self.scale, dropout)
        elif self.config.use_rel_pos:
            context = folded_attention(q, k, v, rel_h, rel_w, self.scale)
        else:
            context = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        context = context.transpose(1, 2)
        if self.window_size:
            context = context.unflatten(0, (-1, shape[0])).flatten(1, 2).index_select(1, from_windows)
        return context, weights.flatten(0, 1) if output_attentions else None

    def _check_implementation(self, implementation, dropout, output_attentions):
        if implementation not in ("sdpa", "eager"):  # set_attn_implementation lets any name pass
            raise ValueError(
                f"attn_implementation={implementation!r} cannot add relative positions; use 'sdpa' or 'eager'"
            )
        if implementation == "sdpa" and output_attentions:
            raise ValueError(
                "output_attentions=True needs all attention scores, and attn_implementation='sdpa' never holds them; "
                "use attn_implementation='eager'"
            )
        if implementation == "sdpa" and dropout:
            raise ValueError(
                f"attn_implementation='sdpa' has no dropout, and attention_dropout={dropout}; set it to 0 or use "
                "attn_implementation='eager'"
            )


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
        if hidden_states.is_cuda or torch.compiler.is_compiling():
            return hidden_states + self.mlp(self.layer_norm2(hidden_states)), weights
        pieces = [
            tokens + self.mlp(self.layer_norm2(tokens))
            for tokens in hidden_states.flatten(0, -2).split(TOKENS_AT_ONCE)
        ]
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
        all_hidden_states, all_attentions = [], []
        for layer in self.layers:
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
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
        if self.training and torch.is_grad_enabled():
            # What these kinds of prompt do not use: DistributedDataParallel waits for its gradient, be it zero.
            dense = dense + 0 * sum(parameter.sum() for parameter in self.parameters())
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


def _row(embedding, device):
    """The one row (1, C) of an embedding, looked up through the module so that offloaded weights are found."""
    return embedding(torch.zeros(1, dtype=torch.long, device=device))


class SamSplitAttention(nn.Module):
    """Attention of the mask decoder: among a prompt's few tokens, or between them and the image's many.

    Scores always lie with the image along the last axis, whichever side asks: (B, P, heads * T, H * W). To make them
    with one matrix product per prompt, the tokens of each head are laid out as rows in which the other heads' channels
    are zero. The scores take less room than the image, so one path serves every `attn_implementation`.

    The image is not projected to values, nor is what it takes from the tokens projected back: attention weights sum to
    one, so an affine layer may as well see the average of its inputs, or the few tokens that are averaged.
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
        return self.tokens_to_image(query, self.k_proj(key), value)

    def tokens_to_image(self, query, key, image, similarity=None):
        """What each token takes from the image.

        Args:
            query: (B, P, T, C), not yet projected.
            key: (B, P, H * W, inner), projected; P may be 1 for an image that all prompts share.
            image: (B, P, H * W, C), the values, not yet projected; P as in `key`.
            similarity: added to the scores, broadcast to (B, P, heads, T, H * W), or None.

        Returns:
            (B, P, T, C).
        """
        prompts, tokens = query.shape[1:3]
        scores = self._scores(self.q_proj(query), key, prompts)
        if similarity is not None:
            scores = scores + similarity
        weights = self._softmax(scores, -1).flatten(2, 3)  # (B, P, heads * T, H * W)
        averages = _matmul_shared(weights, image)  # (B, P, heads * T, C)
        values = self.v_proj(averages).unflatten(2, (-1, tokens)).unflatten(-1, (self.num_attention_heads, -1))
        own = values.diagonal(dim1=2, dim2=4)  # (B, P, T, D, heads), each head's own channels of its own average
        return self.out_proj(own.transpose(-1, -2).flatten(-2))

    def image_to_tokens(self, query, key, value):
        """What each place of the image takes from the tokens.

        Args:
            query: (B, P, H * W, inner), projected; P may be 1 for an image that all prompts share.
            key, value: (B, P, T, C), not yet projected.

        Returns:
            (B, P, H * W, C).
        """
        weights = self._softmax(self._scores(self.k_proj(key), query, key.shape[1]), -2).flatten(2, 3)
        values = self._rows_by_head(self.v_proj(value))  # (B, P, heads * T, inner)
        # The last row is a zero token's, the layer's bias: each head's weights sum to one, and the bias counts once.
        values, bias = self.out_proj(F.pad(values, (0, 0, 0, 1))).split([values.shape[2], 1], dim=2)
        return weights.transpose(-1, -2) @ (values - bias) + bias

    def _scores(self, tokens, image, prompts):
        """Scores (B, P, heads, T, H * W) of projected tokens (B, P, T, inner) and image (B, P or 1, H * W, inner)."""
        rows = self._rows_by_head(tokens * self.scale)
        return _matmul_shared(rows, image.transpose(-1, -2)).unflatten(2, (self.num_attention_heads, -1))

    def _rows_by_head(self, tokens):
        """(B, P, T, inner) to (B, P, heads * T, inner), zero but for the channels of a row's own head."""
        tokens = tokens.unflatten(-1, (self.num_attention_heads, -1))[:, :, None]  # (B, P, 1, T, heads, D)
        own = torch.eye(self.num_attention_heads, dtype=tokens.dtype, device=tokens.device)[:, None, :, None]
        return (tokens * own).flatten(-2).flatten(2, 3)

    def _softmax(self, scores, dim):
        return F.softmax(scores, dim=dim, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def _matmul_shared(rows, matrix):
    """(B, P, R, K) @ (B, P or 1, K, L) to (B, P, R, L), without a copy per prompt of a matrix that prompts share."""
    if matrix.shape[1] == rows.shape[1]:
        return rows @ matrix
    return (rows.flatten(1, 2) @ matrix[:, 0]).unflatten(1, rows.shape[1:3])


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
        """The image's keys for the tokens and its queries to them: two of (B, P, H * W, inner)."""
        positioned = image + image_positions
        return (
            self.cross_attn_token_to_image.k_proj(positioned),
            self.cross_attn_image_to_token.q_proj(positioned),
        )

    def forward(self, tokens, image, projected_image, token_positions, similarity):
        """One round.

        Args:
            tokens, token_positions: (B, P, T, C).
            image: (B, P, H * W, C); P may be 1 for an image that all prompts share.
            projected_image: what `project_image` made of it.
            similarity: see `SamSplitAttention.tokens_to_image`.

        Returns:
            tokens (B, P, T, C), image (B, P, H * W, C), and what was added to the image before its norm.
        """
        keys, queries = projected_image
        if self.is_first:  # these tokens are their own positions
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            positioned = tokens + token_positions
            tokens = tokens + self.self_attn(positioned, positioned, tokens)
        tokens = self.layer_norm1(tokens)

        taken = self.cross_attn_token_to_image.tokens_to_image(tokens + token_positions, keys, image, similarity)
        tokens = self.layer_norm2(tokens + taken)
        tokens = self.layer_norm3(tokens + self.mlp(tokens))

        added = self.cross_attn_image_to_token.image_to_tokens(queries, tokens + token_positions, tokens)
        return tokens, self.layer_norm4(image + added), added


class SamSplitTwoWayTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(
            SamSplitTwoWayAttentionBlock(config, is_first=index == 0) for index in range(config.num_hidden_layers)
        )
        self.final_attn_token_to_image = SamSplitAttention(config, config.attention_downsample_rate)
        self.layer_norm_final_attn = nn.LayerNorm(config.hidden_size)

    def forward(self, tokens, image, projected_image, image_positions, similarity=None, target=None):
        """Let tokens and image inform each other.

        Args:
            tokens: (B, P, T, C).
            image: (B, P, H * W, C); P may be 1 for an image that all prompts share.
            projected_image: what the first block's `project_image` made of it.
            image_positions: (1, 1, H * W, C).
            similarity: see `SamSplitAttention.tokens_to_image`; not used in the final attention.
            target: broadcast to (B, P, T, C) and added to the tokens before each block, or None.

        Returns:
            tokens (B, P, T, C), image (B, P, H * W, C), and a list with what each block added to the image.
        """
        token_positions = tokens
        added_by_block = []
        for index, block in enumerate(self.layers):
            if target is not None:
                tokens = tokens + target
                if index == 0:  # PerSAM's target is part of the tokens' positions as well
                    token_positions = tokens
            if index > 0:
                projected_image = block.project_image(image, image_positions)
            tokens, image, added = block(tokens, image, projected_image, token_positions, similarity)
            added_by_block.append(added)
        attention = self.final_attn_token_to_image
        key = attention.k_proj(image + image_positions)
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
        return F.linear(hidden_states, weight, self.bias.repeat(4)).unflatten(-1, (4, -1))


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
        projected = self.transformer.layers[0].project_image(image, image_positions)
        if attention_similarity is not None:
            scores_shape = (batch * prompts, self.num_attention_heads, tokens.shape[2], image.shape[2])
            _check_broadcasts("attention_similarity", attention_similarity, "(B * P, heads, T, H * W)", scores_shape)
            attention_similarity = _with_prompt_axis(attention_similarity, batch, prompts)
        if target_embedding is not None:
            _check_broadcasts("target_embedding", target_embedding, "(B, P, T, C)", tuple(tokens.shape))
            target_embedding = target_embedding[(None,) * (4 - target_embedding.ndim)]

        wanted = range(1, self.num_mask_tokens) if multimask_output else range(1)
        masks, ious, added = [], [], []
        for part in _parts(prompts, tokens.device):
            part_tokens, part_image, part_added = self.transformer(
                tokens[:, part],
                _take(image, part),
                [_take(x, part) for x in projected],
                image_positions,
                _take(attention_similarity, part),
                _take(target_embedding, part),
            )
            part_masks = self._masks(part_tokens, part_image, grid, wanted)
            if torch.is_grad_enabled():
                masks.append(part_masks)
            else:  # into their place at once: all parts beside their concatenation would be twice the memory
                masks = masks or [part_masks.new_empty(batch, prompts, *part_masks.shape[2:])]
                masks[0][:, part] = part_masks
            ious.append(self.iou_prediction_head(part_tokens[:, :, 0])[:, :, wanted.start : wanted.stop])
            if output_attentions:
                added.append(part_added)
        if output_attentions:
            added = tuple(torch.cat(block, dim=1).flatten(0, 1)[:, None] for block in zip(*added, strict=True))
        masks = torch.cat(masks, dim=1) if len(masks) > 1 else masks[0]
        return masks, torch.cat(ious, dim=1), added if output_attentions else None

    def _tokens(self, sparse_prompt_embeddings, batch, device):
        """The IoU token, the mask tokens and the prompt's own: (B, P, 1 + masks + prompt tokens, C)."""
        mask_tokens = self.mask_tokens(torch.arange(self.num_mask_tokens, device=device))
        output_tokens = torch.cat([_row(self.iou_token, device), mask_tokens])
        if sparse_prompt_embeddings is None:
            return output_tokens.expand(batch, 1, -1, -1)
        output_tokens = output_tokens.expand(*sparse_prompt_embeddings.shape[:2], -1, -1)
        return torch.cat([output_tokens, sparse_prompt_embeddings.to(output_tokens.dtype)], dim=2)

    def _used(self, wanted):
        """All mask tokens in training: DistributedDataParallel waits for a gradient of every head, be it zero."""
        return range(self.num_mask_tokens) if self.training and torch.is_grad_enabled() else wanted

    def _masks(self, tokens, image, grid, wanted):
        """Logits (B, P, M, 4 * H, 4 * W) of the wanted mask tokens."""
        upscaled = self.activation(self.upscale_layer_norm(self.upscale_conv1(image)))  # (B, P, H * W, 4, C / 4)
        upscaled = self.activation(self.upscale_conv2(upscaled))  # (B, P, H * W, 4, 4, C / 8)
        filters = {
            index: self.output_hypernetworks_mlps[index](tokens[:, :, 1 + index]) for index in self._used(wanted)
        }
        if len(filters) > len(wanted):
            unwanted = sum(output.sum() for index, output in filters.items() if index not in wanted)
            filters[wanted[0]] = filters[wanted[0]] + 0 * unwanted
        masks = torch.stack([filters[index] for index in wanted], dim=2) @ upscaled.flatten(2, 4).transpose(
            -1, -2
        )  # (B, P, M, H * W * 4 * 4)
        masks = masks.unflatten(-1, (*grid, 2, 2, 2, 2))  # rows, columns, then row and column twice over
        return masks.permute(0, 1, 2, 3, 5, 7, 4, 6, 8).flatten(6).flatten(3, 5)  # (B, P, M, 4 * H, 4 * W)


def _parts(prompts, device):
    """Slices of prompts to decode at once; all of them when the number is a symbol that a compiler traces."""
    limit = PROMPTS_AT_ONCE_CPU if device.type == "cpu" else PROMPTS_AT_ONCE_ACCELERATOR
    if torch.compiler.is_compiling():
        return [slice(None)]
    return [slice(start, start + limit) for start in range(0, prompts, limit)]


def _take(per_prompt, part):
    """The part's share of a (B, P, ...) tensor; all of one that the prompts share, (B, 1, ...), or of None."""
    return per_prompt[:, part] if per_prompt is not None and per_prompt.shape[1] > 1 else per_prompt


def _with_prompt_axis(similarity, batch, prompts):
    """A tensor that broadcasts to (B * P, heads, T, H * W) as one that broadcasts to (B, P, heads, T, H * W)."""
    similarity = similarity[(None,) * (4 - similarity.ndim)]
    return similarity[None] if similarity.shape[0] == 1 else similarity.unflatten(0, (batch, prompts))


def _check_broadcasts(name, tensor, letters, shape):
    """Raise ValueError unless a tensor broadcasts to a shape, which `letters` spells."""
    fits = tensor.ndim <= len(shape)
    if not fits or any(given not in (1, side) for given, side in zip(tensor.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"{name} must broadcast to {letters} = {shape}, got {tuple(tensor.shape)}")


def segmentation_loss(masks: torch.Tensor, ious: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """SAM's training loss: 20 * focal + dice of the best mask, and the squared error of all predicted IoUs.

    Labels finer than the masks are averaged over each mask pixel, which leaves shares between 0 and 1 at an object's
    edge; pixels with `VOID_LABEL` take no part. A prompt whose labels are void everywhere is padding and counts
    nothing.

    Args:
        masks: (B, P, M, h, w), logits.
        ious: (B, P, M), predicted.
        labels: (B, P, h, w) or (B, P, n * h, n * w), 0, 1 or `VOID_LABEL`.

    Returns:
        (), in float32 at least: the mean over the prompts that are not padding, 0 if there is none.

    Source: Segment Anything (arXiv 2304.02643), appendix A; focal loss with alpha 0.25 and gamma 2 and dice loss with
    one pixel of smoothing as in DETR (arXiv 2005.12872), which it follows.

    >>> labels = torch.zeros(1, 1, 64, 64)
    >>> labels[..., 20:40, 10:50] = 1
    >>> right, wrong = 20 * (2 * labels[:, :, None] - 1), torch.full((1, 1, 1, 64, 64), -20.0)
    >>> round(segmentation_loss(right, torch.ones(1, 1, 1), labels).item(), 3)
    0.0
    >>> round(segmentation_loss(wrong, torch.zeros(1, 1, 1), labels).item(), 1)  # misses what it said it would miss
    20.5
    """
    masks, ious = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (masks, ious))
    valid = (labels != VOID_LABEL).to(masks.dtype)
    size = masks.shape[-2:]
    weight = F.adaptive_avg_pool2d(valid, size)  # (B, P, h, w), the share of each mask pixel that is not void
    inside = F.adaptive_avg_pool2d(labels.to(masks.dtype) * valid, size)
    target = (inside / weight.clamp(min=torch.finfo(weight.dtype).tiny))[:, :, None]  # (B, P, 1, h, w)
    real = weight.flatten(2).sum(-1) > 0  # (B, P)
    weight = weight[:, :, None]
    pixels = weight.flatten(3).sum(-1).clamp(min=1)  # (B, P, 1)

    probability = masks.sigmoid()
    right = probability * target + (1 - probability) * (1 - target)
    balance = 0.25 * target + 0.75 * (1 - target)
    cross_entropy = F.binary_cross_entropy_with_logits(masks, target.expand_as(masks), reduction="none")
    focal = (weight * balance * (1 - right) ** 2 * cross_entropy).flatten(3).sum(-1) / pixels  # (B, P, M)

    both = (weight * probability * target).flatten(3).sum(-1)
    either = (weight * (probability + target)).flatten(3).sum(-1)
    dice = 1 - (2 * both + 1) / (either + 1)

    with torch.no_grad():
        predicted, wanted = (masks > 0).to(weight.dtype), (target > 0.5).to(weight.dtype)
        union = (weight * torch.maximum(predicted, wanted)).flatten(3).sum(-1)
        true_ious = (weight * predicted * wanted).flatten(3).sum(-1) / union.clamp(min=1)

    per_prompt = (20 * focal + dice).amin(-1) + (ious - true_ious).square().mean(-1)  # (B, P)
    return torch.where(real, per_prompt, 0).sum() / real.sum().clamp(min=1)


class SamSplitPreTrainedModel(PreTrainedModel):
    """What both models share: initialisation, and loading that never leaves a weight random in silence."""

    config_class = SamSplitConfig
    base_model_prefix = "sam_split"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean; Trainer divides by its accumulation steps
    _no_split_modules = ["SamSplitVisionLayer"]  # noqa: RUF012
    _supports_sdpa = True

    # Before transformers 5, checkpointing defaults to the re-entrant kind, which drops adapters' gradients.
    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
            super().gradient_checkpointing_enable({"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})

    def initialize_weights(self):
        """Draw the weights, and note which were drawn: transformers calls this at the end of loading as well.

        It means only what the checkpoint lacks, but 5.0.0 drew what was loaded anew as soon as it did not recognise it
        as such.
        """
        before = _samples(self)
        super().initialize_weights()
        after = _samples(self)
        self._drawn_tensors = [name for name in before if not torch.equal(before[name], after[name])]

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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a model as `PreTrainedModel.from_pretrained` does, and refuse a checkpoint that does not fill it.

        Raises:
            ValueError: if the checkpoint is a fused one, lacks a tensor, has one too many or one of another shape (the
                latter unless `ignore_mismatched_sizes=True`), or cannot be read; the message names tensor and cure.
            RuntimeError: if transformers replaced weights of the checkpoint by random ones.
        """
        with_info = kwargs.pop("output_loading_info", False)
        allow_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise ValueError(
                f"the weights in {str(pretrained_model_name_or_path)!r} cannot be read ({error}); the file is damaged "
                "or cut short: download it again, or make it again with `sam-split convert SOURCE OUT`"
            ) from error
        _check_loading(model, str(pretrained_model_name_or_path), info, allow_mismatch)
        return (model, info) if with_info else model


def _samples(model):
    """Name -> the bits of the first elements of each tensor in memory; they differ once it is drawn anew."""
    samples = {}
    for name, tensor in model.state_dict().items():
        tensor = getattr(tensor, "_local_tensor", tensor)  # a sharded tensor's part on this device
        if type(tensor) is torch.Tensor and tensor.device.type != "meta":  # quantised ones are never drawn
            samples[name] = tensor.flatten()[:8].clone().view(torch.uint8)
    return samples


def _check_loading(model, source, info, allow_mismatch):
    """Raise unless a model holds the tensors of a checkpoint, all of them and no others.

    Args:
        model: what was filled.
        source: what it was filled from, for the message.
        info: transformers' loading info: `missing_keys`, `unexpected_keys` and `mismatched_keys`.
        allow_mismatch: whether tensors of another shape are accepted.
    """
    fused = sorted(key for key in info["unexpected_keys"] if ".attn.qkv." in key)
    if fused:
        raise ValueError(
            f"{source!r} holds the fused {fused[0]!r}, and SamSplit has separate q, k and v; convert it once with "
            f"`sam-split convert {source} OUT` and load OUT"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{source!r} lacks {len(missing)} of the model's tensors, the first is {missing[0]!r}; it is not a "
            "complete SamSplit model: make one with `sam-split convert SOURCE OUT`"
        )
    if info["mismatched_keys"] and not allow_mismatch:
        # transformers 5 lists (key, shape in the file, shape in the model), 4 the key alone.
        first = min(entry if isinstance(entry, tuple) else (entry,) for entry in info["mismatched_keys"])
        given = f" as {tuple(first[1])}" if len(first) > 1 else " in another shape"
        expected = tuple(model.state_dict()[first[0]].shape)
        raise ValueError(
            f"{source!r} holds {first[0]!r}{given}, and its config expects {expected}; make a folder in which the two "
            "agree with `sam-split convert SOURCE OUT`"
        )
    if info["unexpected_keys"]:
        extra = sorted(info["unexpected_keys"])
        raise ValueError(
            f"{source!r} holds {len(extra)} tensors that its config has no place for, the first is {extra[0]!r}; make "
            "a folder in which the two agree with `sam-split convert SOURCE OUT`"
        )
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    if redrawn := sorted(set(model._drawn_tensors) - mismatched):
        raise RuntimeError(
            f"transformers {transformers.__version__} replaced {len(redrawn)} tensors of {source!r} by random ones, "
            f"the first is {redrawn[0]!r}; install another version"
        )


class SamSplitVisionModel(SamSplitPreTrainedModel):
    """The image encoder alone. It loads from a whole model's folder, and leaves the rest of it out."""

    config_class = SamSplitVisionConfig
    _keys_to_ignore_on_load_unexpected = [r"^(prompt_encoder|mask_decoder|shared_image_embedding)\."]  # noqa: RUF012

    def __init__(self, config: SamSplitVisionConfig):
        super().__init__(config)
        self.vision_encoder = SamSplitVisionEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_encoder.patch_embed

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> SamSplitVisionEncoderOutput | tuple:
        """Encode images.

        Args:
            pixel_values: (B, channels, height, width), normalised, resized and padded by `SamProcessor`.
            output_attentions: whether to return attention weights, with `attn_implementation="eager"` only.
            output_hidden_states: whether to return the tokens before and after each layer.
            return_dict: False for a plain tuple.
            kwargs: ignored; processors and trainers pass extras.

        Raises:
            ValueError: if the shape of `pixel_values` is not the model's.
        """
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

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_encoder.patch_embed

    def get_image_wide_positional_embeddings(self) -> torch.Tensor:
        """The positional embedding (1, C, H, W) of every place in the grid."""
        return self._image_positions(self.shared_image_embedding.positional_embedding.device)

    def get_image_embeddings(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        """The image embedding (B, C, H, W), to be computed once and given to `forward` for many prompts.

        Gradients flow when they are enabled; wrap the call in `torch.no_grad()` for inference.

        Args:
            pixel_values: (B, channels, height, width), as for `forward`.
            kwargs: `output_attentions` and `output_hidden_states` are accepted and change nothing.

        Raises:
            ValueError: if the shape of `pixel_values` is not the model's.
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
        given = [prompt for prompt in (input_points, input_boxes, input_masks) if prompt is not None]
        batch = given[0].shape[0] if given else 1
        device = given[0].device if given else self.prompt_encoder.no_mask_embed.weight.device
        return self._embed_prompts(input_points, input_labels, input_boxes, input_masks, batch, device)

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
        **kwargs,
    ) -> SamSplitImageSegmentationOutput | tuple:
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
            output_attentions: whether to return attention weights, with `attn_implementation="eager"` only, and what
                the mask decoder's tokens add to the image.
            output_hidden_states: whether to return the image encoder's tokens before and after each layer.
            return_dict: False for a plain tuple.
            kwargs: ignored; processors, trainers and PEFT pass extras.

        Raises:
            ValueError: if both or neither of `pixel_values` and `image_embeddings` are given, or if shapes do not fit
                each other or the model.
        """
        if (pixel_values is None) == (image_embeddings is None):
            given = "neither" if pixel_values is None else "both"
            raise ValueError(f"give either pixel_values or image_embeddings, got {given}")
        output_attentions = _default(output_attentions, self.config, "output_attentions")
        if pixel_values is not None:
            output_hidden_states = _default(output_hidden_states, self.config, "output_hidden_states")
            vision = self.vision_encoder(pixel_values, output_attentions, output_hidden_states)
        else:
            self._check_image_embeddings(image_embeddings)
            vision = SamSplitVisionEncoderOutput(last_hidden_state=image_embeddings)
        image_embeddings = vision.last_hidden_state

        batch, device = image_embeddings.shape[0], image_embeddings.device
        sparse, dense = self._embed_prompts(input_points, input_labels, input_boxes, input_masks, batch, device)
        if labels is not None:
            self._check_labels(labels, batch, 1 if sparse is None else sparse.shape[1])
        masks, ious, added = self.mask_decoder(
            image_embeddings,
            self._image_positions(device),
            sparse,
            dense,
            multimask_output,
            attention_similarity,
            target_embedding,
            output_attentions,
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

    def _image_positions(self, device):
        rows, columns = self.prompt_encoder.grid
        y = (torch.arange(rows, device=device) + 0.5) / rows
        x = (torch.arange(columns, device=device) + 0.5) / columns
        positions = torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=-1)  # (H, W, 2)
        return self.shared_image_embedding(positions).permute(2, 0, 1)[None]  # (1, C, H, W)

    def _embed_prompts(self, points, labels, boxes, masks, batch, device):
        """The prompt encoder on checked prompts; `batch` is the number of images."""
        if points is None and labels is not None:
            raise ValueError("input_labels were given without input_points; give both or neither")
        prompts = None
        if points is not None:
            if points.ndim != 4 or points.shape[-1] != 2:
                raise ValueError(f"input_points must be (B, P, N, 2), got {tuple(points.shape)}")
            if labels is None:
                labels = torch.ones(points.shape[:-1], dtype=torch.long, device=points.device)
            if labels.shape != points.shape[:-1]:
                raise ValueError(
                    f"input_labels must be (B, P, N) = {tuple(points.shape[:-1])} like input_points, got "
                    f"{tuple(labels.shape)}"
                )
            prompts = points.shape[1]
        if boxes is not None:
            if boxes.ndim != 3 or boxes.shape[-1] != 4:
                hint = "; add the prompt axis with input_boxes[:, None]" if boxes.ndim == 2 else ""
                raise ValueError(f"input_boxes must be (B, P, 4), got {tuple(boxes.shape)}{hint}")
            if prompts not in (None, boxes.shape[1]):
                raise ValueError(
                    f"input_points and input_boxes must have as many prompts, got {prompts} and {boxes.shape[1]}"
                )
            prompts = boxes.shape[1]
        if prompts == 0:
            raise ValueError("input_points and input_boxes hold no prompt (P = 0); leave them out for no prompt")
        if masks is not None:
            masks = self._checked_masks(masks, prompts)
        for name, prompt in (("input_points", points), ("input_boxes", boxes), ("input_masks", masks)):
            if prompt is not None and prompt.shape[0] != batch:
                raise ValueError(f"{name} are for {prompt.shape[0]} images, and there are {batch}")
        return self.prompt_encoder(points, labels, boxes, masks, batch, device, self.shared_image_embedding)

    def _checked_masks(self, masks, prompts):
        if masks.ndim == 3:
            masks = masks[:, None]
        height, width = (4 * side for side in self.prompt_encoder.grid)
        if masks.ndim not in (4, 5) or tuple(masks.shape[-3:]) != (1, height, width):
            raise ValueError(
                f"input_masks must be (B, 1, {height}, {width}) or (B, P, 1, {height}, {width}), got "
                f"{tuple(masks.shape)}"
            )
        if masks.ndim == 5 and prompts not in (None, masks.shape[1]):
            raise ValueError(
                f"input_masks must have as many prompts as points and boxes, got {masks.shape[1]} and {prompts}"
            )
        return masks

    def _check_labels(self, labels, batch, prompts):
        """`labels` against the number of images and prompts, the two sizes they may have and their three values."""
        vision = self.config.vision_config
        rows, columns = self.prompt_encoder.grid
        sizes = [(vision.patch_size * rows, vision.patch_size * columns), (4 * rows, 4 * columns)]
        if labels.ndim != 4 or tuple(labels.shape[:2]) != (batch, prompts) or tuple(labels.shape[2:]) not in sizes:
            allowed = " or ".join(str((batch, prompts, *size)) for size in sizes)
            raise ValueError(f"labels must be (B, P, height, width) = {allowed}, got {tuple(labels.shape)}")
        known = (labels == 0) | (labels == 1) | (labels == VOID_LABEL)
        if not torch.compiler.is_compiling() and not known.all():
            hint = "; divide a mask read from a PNG by 255" if (labels == 255).any() else ""
            raise ValueError(f"labels must be 0, 1 or {VOID_LABEL} (void), got {labels[~known][0].item()}{hint}")

    def _check_image_embeddings(self, image_embeddings):
        expected = (self.config.vision_config.output_channels, *self.prompt_encoder.grid)
        if image_embeddings.ndim != 4 or tuple(image_embeddings.shape[1:]) != expected:
            raise ValueError(
                f"image_embeddings must be (B, {', '.join(map(str, expected))}), got {tuple(image_embeddings.shape)}"
            )


def _default(value, config, name):
    """An argument of `forward`, or what the config says where it was left out."""
    return value if value is not None else getattr(config, name, name == "return_dict")


SamSplitVisionModel.register_for_auto_class("AutoModel")
SamSplitModel.register_for_auto_class("AutoModel")
