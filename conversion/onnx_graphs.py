"""SAM as three graphs of ONNX's own operators, without a score matrix over all image tokens.

    vision_encoder                 images -> their embeddings
    prompt_encoder_mask_decoder    points, labels and the encoder's outputs -> masks and their predicted IoU
    mask_prompt_encoder            an image's embedding and an earlier mask -> the embedding with the mask in it

The first two have the names, inputs and outputs that transformers.js expects. Its inputs have no place for a box or a
mask, so a box is two points, as in Meta's export, and a mask goes into the image's embedding, where the model adds it.

Inputs and outputs are float32, labels int64, whatever the dtype of the weights: clients feed nothing else.

Shapes: `B` images, `P` prompts per image, `N` points per prompt, `H W` rows and columns of the token grid, `C`
channels, `D` channels per head, `S` side of a window in tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sam_split.attention_sam_split import by_offset

# A global layer's scores are made some rows of the grid at a time: at most 32 MB in float32, of the 128 MB that WebGPU
# promises for a buffer. Smaller tiles need less memory and give a larger graph, which takes longer to export.
TILE_SCORES = 2**23

# The labels of points that are a box's corners, beside those of the model.
TOP_LEFT, BOTTOM_RIGHT = 2, 3


@dataclass(frozen=True)
class Graph:
    """A module to export, with what names and sizes its inputs and outputs have; a string is a size that may vary."""

    name: str
    module: nn.Module
    inputs: dict[str, tuple]
    outputs: tuple[str, ...]


def graphs(model, dtype: torch.dtype = torch.float32) -> list[Graph]:
    """All graphs of a SamSplitModel, whose modules they take over: the model is of no use afterwards."""
    vision = model.config.vision_config
    rows, columns = vision.grid
    embedding = "batch_size", vision.output_channels, rows, columns
    prompts = "batch_size", "point_batch_size", "nb_points_per_image"
    pixels = "batch_size", *model.vision_encoder.patch_embed.expected_shape
    modules = VisionEncoder(model), PromptEncoderMaskDecoder(model), MaskPromptEncoder(model)
    matrix = model.shared_image_embedding.positional_embedding.clone()
    for module in modules:
        module.to(dtype).eval()
    model.shared_image_embedding.positional_embedding = matrix  # phases need float32; the decoder casts what comes out
    decoder = {
        "input_points": (*prompts, 2),
        "input_labels": prompts,
        "image_embeddings": embedding,
        "image_positional_embeddings": embedding,
    }
    masked = {"image_embeddings": embedding, "input_masks": ("batch_size", 1, 4 * rows, 4 * columns)}
    return [
        Graph("vision_encoder", modules[0], {"pixel_values": pixels}, tuple(decoder)[2:]),
        Graph("prompt_encoder_mask_decoder", modules[1], decoder, ("iou_scores", "pred_masks")),
        Graph("mask_prompt_encoder", modules[2], masked, ("image_embeddings_with_masks",)),
    ]


class VisionEncoder(nn.Module):
    """Images to their embeddings, and the embedding of every place in the grid."""

    def __init__(self, model):
        super().__init__()
        self.encoder = model.vision_encoder
        for layer in self.encoder.layers:
            layer.attn = Attention(layer.attn, self.encoder.config.grid)
        self.register_buffer("positions", model.get_image_wide_positional_embeddings().detach())  # (1, C, H, W)

    def forward(self, pixel_values):
        """(B, channels, height, width) to (B, C, H, W) twice."""
        embeddings = self.encoder(pixel_values).last_hidden_state.float()
        return embeddings, self.positions.float().expand(embeddings.shape[0], -1, -1, -1)


class PromptEncoderMaskDecoder(nn.Module):
    """Prompts and an image's embedding to the masks of an ambiguous prompt."""

    def __init__(self, model):
        super().__init__()
        self.prompts, self.decoder = model.prompt_encoder, model.mask_decoder
        self.positional_embedding = model.shared_image_embedding

    def forward(self, input_points, input_labels, image_embeddings, image_positional_embeddings):
        """Points (B, P, N, 2), labels (B, P, N), (B, C, H, W) twice to (B, P, M) and (B, P, M, 4 * H, 4 * W)."""
        # Points without a box get a partner that says so, as in the model. Whether they do is known in the call alone.
        without_box = (input_labels < TOP_LEFT).all().to(torch.int64).item()
        torch._check(without_box >= 0)
        torch._check(without_box <= 1)
        points = F.pad(input_points, (0, 0, 0, without_box))
        labels = F.pad(input_labels, (0, without_box), value=-1)
        sparse = self.prompts._embed_points(points, labels, self.positional_embedding)  # (B, P, N or N + 1, C)
        for corner in (TOP_LEFT, BOTTOM_RIGHT):
            sparse = sparse + (labels == corner)[..., None] * self.prompts.point_embed[corner].weight
        dense = self.prompts.no_mask_embed.weight[..., None, None]  # (1, C, 1, 1)
        image, positions = (x.to(dense.dtype) for x in (image_embeddings, image_positional_embeddings[:1]))
        masks, ious, *_ = self.decoder(image, positions, sparse, dense, True)
        return ious.float(), masks.float()


class MaskPromptEncoder(nn.Module):
    """An earlier mask as a part of the image's embedding, in the place of what the decoder adds for no mask."""

    def __init__(self, model):
        super().__init__()
        self.prompts = model.prompt_encoder

    def forward(self, image_embeddings, input_masks):
        """(B, C, H, W) and logits (B, 1, 4 * H, 4 * W) to (B, C, H, W)."""
        embedded = self.prompts.mask_embed(input_masks) - self.prompts.no_mask_embed.weight[..., None, None]
        return image_embeddings + embedded.float()


class Attention(nn.Module):
    """A layer's attention with q, k and v in one product, and scores of a few rows of the grid at a time.

    Windows are padded after that product, which leaves out the bias: to a padding token it is all there is.
    """

    def __init__(self, attention, grid):
        super().__init__()
        layers = attention.q, attention.k, attention.v
        self.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]).detach(), requires_grad=False)
        biases = [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
        self.bias = nn.Parameter(torch.cat(biases).detach(), requires_grad=False)
        self.proj, self.scale, self.head_dim = attention.proj, attention.scale, attention.head_dim
        self.grid, self.window = grid, attention.window_size
        rows, columns = (by_offset(table.detach()) for table in attention._tables(attention.q.weight))
        self.register_buffer("by_row", rows.transpose(1, 2).contiguous())  # (H, D, H)
        self.register_buffer("by_column", columns.transpose(1, 2).contiguous())  # (W, D, W)

    def forward(self, hidden_states, output_attentions=False):
        """(B, H, W, C) to the same, and None for the weights."""
        qkv = F.linear(hidden_states, self.weight)  # (B, H, W, 3 * C)
        return self.proj(self._in_windows(qkv) if self.window else self._global(qkv)), None

    def _in_windows(self, qkv):
        (rows, columns), side, heads = self.grid, self.window, qkv.shape[3] // 3 // self.head_dim
        qkv = F.pad(qkv, (0, 0, 0, -columns % side, 0, -rows % side)) + self.bias
        down, across = qkv.shape[1] // side, qkv.shape[2] // side
        qkv = qkv.reshape(-1, down, side, across, side, 3, heads, self.head_dim)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)  # (3, B, down, across, heads, S, S, D)
        context = self._attend(*qkv.reshape(3, -1, side * side, self.head_dim).unbind(0), side)
        context = context.reshape(-1, down, across, heads, side, side, self.head_dim)
        context = context.permute(0, 1, 4, 2, 5, 3, 6)  # (B, down, S, across, S, heads, D)
        return context.reshape(-1, down * side, across * side, heads * self.head_dim)[:, :rows, :columns]

    def _global(self, qkv):
        (rows, columns), heads = self.grid, qkv.shape[3] // 3 // self.head_dim
        qkv = (qkv + self.bias).reshape(-1, rows * columns, 3, heads, self.head_dim)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, H * W, D)
        limit = max(1, TILE_SCORES // (heads * rows * columns * columns))
        at_once = max(number for number in range(1, rows + 1) if number <= limit and rows % number == 0)
        context = self._attend(*qkv.unbind(0), at_once).transpose(1, 2)  # (B, H * W, heads, D)
        return context.reshape(-1, rows, columns, heads * self.head_dim)

    def _attend(self, query, key, value, rows_at_once):
        """(..., tokens, D) three times to the same, of a window or of the grid."""
        rows, columns = len(self.by_row), len(self.by_column)
        by_place = query.unflatten(-2, (rows, columns))  # (..., H, W, D)
        rel_h = by_place @ self.by_row  # (..., H, W, H)
        rel_w = (by_place.transpose(-3, -2) @ self.by_column).transpose(-3, -2)  # (..., H, W, W)
        rel_h, rel_w = rel_h.flatten(-3, -2)[..., None], rel_w.flatten(-3, -2)[..., None, :]
        key, context = key.transpose(-2, -1), []
        tiles = (
            x.split(rows_at_once * columns, dim=dim) for x, dim in ((query * self.scale, -2), (rel_h, -3), (rel_w, -3))
        )
        for q, h, w in zip(*tiles, strict=True):
            scores = (q @ key).unflatten(-1, (rows, columns)) + h + w  # (..., queries, H, W)
            context.append(scores.flatten(-2).softmax(-1) @ value)
        return torch.cat(context, dim=-2)
