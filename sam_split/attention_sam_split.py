"""Attention of the image encoder: windows, relative positions, and three ways to compute one formula.

    softmax(q k^T / sqrt(D) + rel_h + rel_w) v

`vision_attention` is the entry; `attention_path` chooses the way, by implementation and device:

    eager     all scores in memory     `attn_implementation="eager"`, or a call that asks for the attention weights
    folded    the fused kernels        CUDA but for float64; everywhere under torch.compile and torch.export
    tiled     one tile of scores       a CPU, and every other accelerator, whose fused kernels may hold all scores

The first computes softmax in float32 at least, the others in the dtype of the scores with sums in float32.

The mask decoder's attention takes its algebra on rows of tokens from here: `in_pieces` to `softmax`.

Shapes: `B` images, `P` prompts, `T` tokens per prompt, `H W` rows and columns of the token grid, `C` channels, `D`
channels per head, `S` side of a window in tokens.

This file is copied into each saved model folder. It imports torch and `products_sam_split.py`, and reads no file,
network or environment.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .products_sam_split import add_product, product

# Scores of one tile: 4 MB in float32, which stay in a core's caches. An accelerator is faster on a few large tiles.
TILE_SCORES_CPU = 2**20
TILE_SCORES_ACCELERATOR = 2**24


def vision_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    grid: tuple[int, int],
    window_size: int,
    scale: float,
    implementation: str = "sdpa",
    dropout: float = 0.0,
    output_attentions: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention inside windows, or over the whole grid, with decomposed relative positions.

    Args:
        query, key, value: (B, H * W, heads, D); with windows (B, H * W + 1, heads, D), where the last token stands
            for all padding.
        tables: relative positions of rows (2 * H - 1, D) and columns (2 * W - 1, D), S in place of H and W in windows.
        grid: (H, W) in tokens.
        window_size: S, or 0 for no windows.
        scale: factor of the dot products.
        implementation: "sdpa" or "eager".
        dropout: share of attention weights set to zero, with "eager" only.
        output_attentions: whether to return the weights; the call then computes them by the eager formula.

    Returns:
        (B, H * W, heads, D), and the weights (B * windows * heads, tokens, tokens) or None.

    Raises:
        ValueError: if the implementation is another one, or has no dropout and is asked for it.
    """
    _check_implementation(implementation, dropout)
    path = attention_path("eager" if output_attentions else implementation, query.device.type, query.dtype)
    by_row, by_column = (by_offset(table).to(query.dtype) for table in tables)
    to_windows = from_windows = None
    if window_size:
        to_windows, from_windows = window_indices(grid, window_size, query.device)
    if path == "tiled":
        device_type = query.device.type if torch.amp.is_autocast_available(query.device.type) else "cpu"
        with torch.autocast(device_type, enabled=False):
            context = TiledAttention.apply(query, key, value, by_row, by_column, to_windows, scale)
        return context[:, : grid[0] * grid[1]], None

    if window_size:
        tokens = to_windows.flatten()
        query, key, value = (
            x.index_select(1, tokens).unflatten(1, to_windows.shape).flatten(0, 1) for x in (query, key, value)
        )  # (B * windows, S * S, heads, D)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B or B * windows, heads, tokens, D)
    rel_h, rel_w = relative_position_scores(query, by_row, by_column)
    if path == "eager":
        context, weights = eager_attention(query, key, value, rel_h, rel_w, scale, dropout)
    else:
        context, weights = folded_attention(query, key, value, rel_h, rel_w, scale), None
    context = context.transpose(1, 2)  # (B or B * windows, tokens, heads, D)
    if window_size:
        context = context.unflatten(0, (-1, to_windows.shape[0])).flatten(1, 2).index_select(1, from_windows)
    return context, weights if output_attentions else None


def _check_implementation(implementation, dropout):
    if implementation not in ("sdpa", "eager"):  # set_attn_implementation lets any name pass
        raise ValueError(
            f"attn_implementation={implementation!r} cannot add relative positions; use 'sdpa' or 'eager'"
        )
    if implementation == "sdpa" and dropout:
        raise ValueError(
            f"attn_implementation='sdpa' has no dropout, and attention_dropout={dropout}; set it to 0 or use "
            "attn_implementation='eager'"
        )


def attention_path(implementation: str, device_type: str, dtype: torch.dtype) -> str:
    """ "eager", "folded" or "tiled": how an implementation is computed on a device.

    A fused kernel that refuses the width or the dtype falls back to all scores in silence: CUDA's does in float64, and
    other accelerators' may. torch.compile and torch.export cannot trace tiles, and take the folded way everywhere.
    """
    if implementation == "eager":
        return "eager"
    fused = device_type == "cuda" and dtype != torch.float64
    return "folded" if fused or torch.compiler.is_compiling() else "tiled"


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether to work in pieces that a CPU's caches keep. Meta tensors, on which operations are counted, count too."""
    return tensor.device.type in ("cpu", "meta") and not torch.compiler.is_compiling()


def in_pieces(tokens: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """(B, P, tokens, C), on a CPU that many tokens at a time, so that what is made of a piece stays in its caches."""
    return tokens.split(size, dim=2) if on_cpu(tokens) else (tokens,)


def rows_by_head(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, P, T, inner) to (B, P, heads * T, inner), zero but for the channels of a row's own head."""
    tokens = tokens.unflatten(-1, (heads, -1))[:, :, None]  # (B, P, 1, T, heads, D)
    own = torch.eye(heads, dtype=tokens.dtype, device=tokens.device)[:, None, :, None]
    return (tokens * own).flatten(-2).flatten(2, 3)


def softmax(scores: torch.Tensor, dim: int) -> torch.Tensor:
    """In float32 at least, whatever the dtype of the scores."""
    return F.softmax(scores, dim=dim, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


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
    """Relative-position scores of each query with each row and each column of keys.

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
    rel_h: torch.Tensor,
    rel_w: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its formula, with all scores in memory.

    Args:
        query, key, value: (B, heads, H * W, D).
        rel_h, rel_w: (B, heads, H * W, H) and (B, heads, H * W, W).
        scale: factor of the dot products.
        dropout: share of attention weights set to zero.

    Returns:
        (B, heads, H * W, D) and the weights (B * heads, H * W, H * W).
    """
    scores = (query * scale) @ key.transpose(-2, -1) + (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    weights = weights.flatten(0, 1)  # in the graph in the shape that is returned, so that they can retain a gradient
    return F.dropout(weights, dropout).unflatten(0, value.shape[:2]) @ value, weights


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

    Source: folding a bias of low rank into queries and keys is FlashBias (NeurIPS 2025, thuml/FlashBias); here the
    rank is H + W.
    """
    rows, columns, head_dim = rel_h.shape[-1], rel_w.shape[-1], value.shape[-1]
    one_hot_row = torch.eye(rows, dtype=key.dtype, device=key.device).repeat_interleave(columns, 0)  # (H * W, H)
    one_hot_column = torch.eye(columns, dtype=key.dtype, device=key.device).repeat(rows, 1)  # (H * W, W)
    one_hot = torch.cat([one_hot_row, one_hot_column], dim=-1).expand(*key.shape[:2], -1, -1)
    query = torch.cat([query * scale, rel_h.to(query.dtype), rel_w.to(query.dtype)], dim=-1)
    key = torch.cat([key, one_hot], dim=-1)
    wide, narrow = kernel_widths(query.shape[-1], head_dim, query.dtype, *_cuda_capability(query.device))
    query, key = (F.pad(x, (0, wide - x.shape[-1])) for x in (query, key))
    value = F.pad(value, (0, narrow - head_dim))
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :head_dim]


def kernel_widths(
    width: int, head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None, cudnn: bool
) -> tuple[int, int]:
    """Channels to which queries and keys, and values, are padded, so that the best fused kernel takes them.

    In half precision, cuDNN takes keys of 192 with values of 128, forward and backward; Flash takes equal widths up to
    256, and the memory-efficient kernel any multiple of 8. In float32 there is the last alone, with multiples of 4.

    Args:
        width: channels of queries and keys.
        head_dim: channels of values.
        dtype: of all three.
        capability: compute capability of a CUDA device, None elsewhere.
        cudnn: whether torch prefers cuDNN's kernel on that device.

    Source: the conditions in PyTorch's aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.

    >>> kernel_widths(64 + 64 + 64, 64, torch.bfloat16, (9, 0), cudnn=True)  # a global layer of ViT-B on an H100
    (192, 128)
    """
    if dtype not in (torch.float16, torch.bfloat16) and capability is not None:
        return width + -width % 4, head_dim + -head_dim % 4
    width, head_dim = width + -width % 8, head_dim + -head_dim % 8
    if capability is None:
        return width, width  # a CPU's Flash kernel falls back to all scores where the widths differ
    if cudnn and 128 < width <= 192 and head_dim <= 128:
        return 192, 128
    no_backward = 192 < width <= 224 and capability in ((8, 6), (8, 9), (12, 0))  # too little shared memory
    flash = capability >= (8, 0) and width <= 256 and not no_backward
    return (width, width) if flash else (width, head_dim)


@torch.compiler.assume_constant_result
def _cuda_capability(device):
    """Compute capability of a CUDA device, and whether torch prefers cuDNN's attention there; (None, False) else."""
    if device.type != "cuda":
        return None, False
    capability = torch.cuda.get_device_capability(device)
    cudnn = capability[0] in (9, 10) and not torch.version.hip and (torch.backends.cudnn.version() or 0) >= 91500
    return capability, cudnn


class TiledAttention(torch.autograd.Function):
    """The same attention with one tile of scores at a time: windows of all heads, or some queries of a head.

    Neither scores nor windows are ever laid out for the whole image. Backward computes them again from the projected
    tokens, which are kept with the small tables of positions and windows.

    Source: memory-efficient attention by tiles of queries (arXiv 2112.05682).
    """

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
        blocks, tiles, (scores, _) = _tiling(query, windows)
        output = query.new_empty(query.shape)
        for block in blocks:
            q, k, v = (_take(x, block) for x in (query, key, value))  # (sequences * heads, tokens, D)
            rel_h, rel_w = relative_position_scores(q, by_row, by_column)
            context = torch.empty_like(q)
            for tile in tiles:
                weights = _tile_weights(q[tile], k, rel_h[tile], rel_w[tile], scale, scores)
                product(weights, v, out=context[tile])
            _put(output, block, context)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        saved = ctx.saved_tensors  # checkpointing hands them out once
        tokens, tables = saved[:3], saved[3:]
        learned = any(ctx.needs_input_grad[3:5])  # the tables, which are frozen beside adapters
        blocks, tiles, (scores, grad_scores) = _tiling(tokens[0], ctx.windows)
        # The token that stands for all padding gets a part from several windows, so sums are float32 at least.
        wide = torch.promote_types(grad_output.dtype, torch.float32)
        grad_tokens = [x.new_zeros(x.shape, dtype=wide) for x in tokens]
        grad_tables = [torch.zeros_like(x, dtype=wide) for x in tables]
        for block in blocks:
            q, k, v, grad_context = (_take(x, block) for x in (*tokens, grad_output))
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_(x is q or learned) for x in (q, *tables)]
                rel = relative_position_scores(*leaves)
            rel_h, rel_w = (x.detach() for x in rel)
            grad_rel = [torch.empty_like(x) for x in rel]
            grad_q = torch.empty_like(q)
            # (sequences * heads, D, tokens), in which the products below are a quarter faster
            grad_k, grad_v = (x.new_zeros(x.transpose(1, 2).shape, dtype=wide) for x in (k, v))
            for tile in tiles:
                weights = _tile_weights(q[tile], k, rel_h[tile], rel_w[tile], ctx.scale, scores)
                add_product(grad_v, grad_context[tile].transpose(1, 2), weights)
                grad = grad_scores[: weights.shape[0], : weights.shape[1]]
                product(grad_context[tile], v.transpose(1, 2), out=grad)
                grad *= weights
                grad.addcmul_(weights, grad.sum(-1, keepdim=True), value=-1)
                grad_q[tile] = product(grad, k) * ctx.scale
                add_product(grad_k, q[tile].transpose(1, 2), grad, ctx.scale)
                by_key = grad.unflatten(-1, (rel_h.shape[-1], rel_w.shape[-1]))  # (.., queries, H, W)
                grad_rel[0][tile], grad_rel[1][tile] = by_key.sum(-1), by_key.sum(-2)
            grad_query, *grad_offsets = torch.autograd.grad(rel, leaves if learned else leaves[:1], grad_rel)
            parts = grad_q + grad_query, grad_k.transpose(1, 2), grad_v.transpose(1, 2)
            for total, part in zip(grad_tables if learned else [], grad_offsets, strict=True):
                total += part
            for total, part in zip(grad_tokens, parts, strict=True):
                _add(total, block, part)
        grads = zip((*grad_tokens, *grad_tables), saved, strict=True)
        return *(grad.to(x.dtype) for grad, x in grads), None, None


def _tiling(query, windows):
    """How all scores are covered.

    Args:
        query: (B, tokens, heads, D).
        windows: (windows, S * S), or None.

    Returns:
        The blocks, pairs of sequences and a slice of heads, where a sequence is an image or an image's window; the
        tiles of a block's (sequences * heads, queries, ...); and two buffers for a tile of scores, because asking for
        memory takes longer than filling it.
    """
    batch, tokens, heads, _ = query.shape
    sequences = range(batch)
    if windows is not None:
        image = tokens * torch.arange(batch, device=windows.device)[:, None, None]
        sequences = (image + windows).flatten(0, 1)  # (B * windows, S * S), tokens of the flattened batch
        tokens = windows.shape[1]
    limit = TILE_SCORES_CPU if on_cpu(query) else TILE_SCORES_ACCELERATOR
    rows = max(1, min(tokens, limit // tokens))
    heads_at_once = max(1, min(heads, limit // (rows * tokens)))
    at_once = max(1, min(len(sequences), limit // (heads_at_once * rows * tokens)))
    blocks = [
        (sequences[start : start + at_once], slice(head, head + heads_at_once))
        for start in range(0, len(sequences), at_once)
        for head in range(0, heads, heads_at_once)
    ]
    tiles = [(slice(None), slice(row, row + rows)) for row in range(0, tokens, rows)]
    return blocks, tiles, query.new_empty(2, at_once * heads_at_once, rows, tokens)


def _tile_weights(query, key, rel_h, rel_w, scale, scores):
    """Attention weights (sequences * heads, queries, keys) of one tile, in the memory of `scores`."""
    scores = scores[: query.shape[0], : query.shape[1]]
    by_key = scores.unflatten(-1, (rel_h.shape[-1], rel_w.shape[-1]))  # (.., queries, H, W)
    torch.add(rel_h[..., :, None], rel_w[..., None, :], out=by_key)
    add_product(scores, query, key.transpose(1, 2), scale)
    return torch.softmax(scores, dim=-1, out=scores)


def _place(x, block):
    """(B, tokens, heads, D) as what a block indexes, and the index: it gives (sequences, tokens, heads, D)."""
    sequences, heads = block
    if isinstance(sequences, range):
        return x, (slice(sequences.start, sequences.stop), slice(None), heads)
    return x.flatten(0, 1), (sequences, heads)


def _take(x, block):
    """The block's (sequences * heads, tokens, D) of (B, tokens, heads, D), contiguous."""
    x, place = _place(x, block)
    return x[place].transpose(1, 2).flatten(0, 1).contiguous()


def _put(x, block, part):
    """The inverse of `_take`, in place."""
    x, place = _place(x, block)
    x[place] = part.unflatten(0, (len(block[0]), -1)).transpose(1, 2)


def _add(total, block, part):
    """Add a block's part in place, where windows may name a token several times."""
    sequences, heads = block
    part = part.unflatten(0, (len(sequences), -1)).transpose(1, 2)  # (sequences, tokens, heads, D)
    if isinstance(sequences, range):
        total[sequences.start : sequences.stop, :, heads] += part
    else:
        total.flatten(0, 1)[:, heads].index_add_(0, sequences.flatten(), part.flatten(0, 1).to(total.dtype))
