"""The names of every tensor: Meta's checkpoint, SamSplit, and stock transformers.

    KEY_MAP    Meta -> SamSplit, one literal row per kind of tensor
    STOCK_MAP  stock transformers -> SamSplit: the same right-hand sides, with q, k, v still fused in one qkv

A tuple on the right means "cut into that many equal blocks of rows, in this order". `{field}` is one path element that
varies over the values in FIELDS; a number that is a position in an nn.Sequential is written out. Whole keys match
exactly or not at all, and the inverse of a map is computed, never written twice.
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ConversionError, MissingKeyError, ShapeError, UnknownKeyError

if TYPE_CHECKING:  # `sam-split --help` need not wait for torch
    import torch

COUNTED = None  # 0, 1, ... n - 1, where n is read off the checkpoint

FIELDS: dict[str, tuple[str, ...] | None] = {
    "layer": COUNTED,  # of the vision encoder
    "block": COUNTED,  # of the mask decoder's two-way transformer
    "point": COUNTED,  # background, foreground, top left corner, bottom right corner
    "mask": COUNTED,  # one hypernetwork for each mask token
    "leaf": ("weight", "bias"),
    "attention": ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"),
    "projection": ("q_proj", "k_proj", "v_proj", "out_proj"),
}

KEY_MAP: dict[str, str | tuple[str, ...]] = {
    # image encoder
    "image_encoder.pos_embed": "vision_encoder.pos_embed",
    "image_encoder.patch_embed.proj.{leaf}": "vision_encoder.patch_embed.projection.{leaf}",
    "image_encoder.blocks.{layer}.norm1.{leaf}": "vision_encoder.layers.{layer}.layer_norm1.{leaf}",
    "image_encoder.blocks.{layer}.attn.rel_pos_h": "vision_encoder.layers.{layer}.attn.rel_pos_h",
    "image_encoder.blocks.{layer}.attn.rel_pos_w": "vision_encoder.layers.{layer}.attn.rel_pos_w",
    "image_encoder.blocks.{layer}.attn.qkv.weight": (
        "vision_encoder.layers.{layer}.attn.q.weight",
        "vision_encoder.layers.{layer}.attn.k.weight",
        "vision_encoder.layers.{layer}.attn.v.weight",
    ),
    "image_encoder.blocks.{layer}.attn.qkv.bias": (
        "vision_encoder.layers.{layer}.attn.q.bias",
        "vision_encoder.layers.{layer}.attn.k.bias",
        "vision_encoder.layers.{layer}.attn.v.bias",
    ),
    "image_encoder.blocks.{layer}.attn.proj.{leaf}": "vision_encoder.layers.{layer}.attn.proj.{leaf}",
    "image_encoder.blocks.{layer}.norm2.{leaf}": "vision_encoder.layers.{layer}.layer_norm2.{leaf}",
    "image_encoder.blocks.{layer}.mlp.lin1.{leaf}": "vision_encoder.layers.{layer}.mlp.lin1.{leaf}",
    "image_encoder.blocks.{layer}.mlp.lin2.{leaf}": "vision_encoder.layers.{layer}.mlp.lin2.{leaf}",
    "image_encoder.neck.0.weight": "vision_encoder.neck.conv1.weight",
    "image_encoder.neck.1.{leaf}": "vision_encoder.neck.layer_norm1.{leaf}",
    "image_encoder.neck.2.weight": "vision_encoder.neck.conv2.weight",
    "image_encoder.neck.3.{leaf}": "vision_encoder.neck.layer_norm2.{leaf}",
    # prompt encoder
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": "shared_image_embedding.positional_embedding",
    "prompt_encoder.point_embeddings.{point}.weight": "prompt_encoder.point_embed.{point}.weight",
    "prompt_encoder.not_a_point_embed.weight": "prompt_encoder.not_a_point_embed.weight",
    "prompt_encoder.no_mask_embed.weight": "prompt_encoder.no_mask_embed.weight",
    "prompt_encoder.mask_downscaling.0.{leaf}": "prompt_encoder.mask_embed.conv1.{leaf}",
    "prompt_encoder.mask_downscaling.1.{leaf}": "prompt_encoder.mask_embed.layer_norm1.{leaf}",
    "prompt_encoder.mask_downscaling.3.{leaf}": "prompt_encoder.mask_embed.conv2.{leaf}",
    "prompt_encoder.mask_downscaling.4.{leaf}": "prompt_encoder.mask_embed.layer_norm2.{leaf}",
    "prompt_encoder.mask_downscaling.6.{leaf}": "prompt_encoder.mask_embed.conv3.{leaf}",
    # mask decoder
    "mask_decoder.iou_token.weight": "mask_decoder.iou_token.weight",
    "mask_decoder.mask_tokens.weight": "mask_decoder.mask_tokens.weight",
    "mask_decoder.transformer.layers.{block}.{attention}.{projection}.{leaf}": (
        "mask_decoder.transformer.layers.{block}.{attention}.{projection}.{leaf}"
    ),
    "mask_decoder.transformer.layers.{block}.norm1.{leaf}": (
        "mask_decoder.transformer.layers.{block}.layer_norm1.{leaf}"
    ),
    "mask_decoder.transformer.layers.{block}.norm2.{leaf}": (
        "mask_decoder.transformer.layers.{block}.layer_norm2.{leaf}"
    ),
    "mask_decoder.transformer.layers.{block}.norm3.{leaf}": (
        "mask_decoder.transformer.layers.{block}.layer_norm3.{leaf}"
    ),
    "mask_decoder.transformer.layers.{block}.norm4.{leaf}": (
        "mask_decoder.transformer.layers.{block}.layer_norm4.{leaf}"
    ),
    "mask_decoder.transformer.layers.{block}.mlp.lin1.{leaf}": (
        "mask_decoder.transformer.layers.{block}.mlp.lin1.{leaf}"
    ),
    "mask_decoder.transformer.layers.{block}.mlp.lin2.{leaf}": (
        "mask_decoder.transformer.layers.{block}.mlp.lin2.{leaf}"
    ),
    "mask_decoder.transformer.final_attn_token_to_image.{projection}.{leaf}": (
        "mask_decoder.transformer.final_attn_token_to_image.{projection}.{leaf}"
    ),
    "mask_decoder.transformer.norm_final_attn.{leaf}": "mask_decoder.transformer.layer_norm_final_attn.{leaf}",
    "mask_decoder.output_upscaling.0.{leaf}": "mask_decoder.upscale_conv1.{leaf}",
    "mask_decoder.output_upscaling.1.{leaf}": "mask_decoder.upscale_layer_norm.{leaf}",
    "mask_decoder.output_upscaling.3.{leaf}": "mask_decoder.upscale_conv2.{leaf}",
    "mask_decoder.output_hypernetworks_mlps.{mask}.layers.0.{leaf}": (
        "mask_decoder.output_hypernetworks_mlps.{mask}.proj_in.{leaf}"
    ),
    "mask_decoder.output_hypernetworks_mlps.{mask}.layers.1.{leaf}": (
        "mask_decoder.output_hypernetworks_mlps.{mask}.layers.0.{leaf}"
    ),
    "mask_decoder.output_hypernetworks_mlps.{mask}.layers.2.{leaf}": (
        "mask_decoder.output_hypernetworks_mlps.{mask}.proj_out.{leaf}"
    ),
    "mask_decoder.iou_prediction_head.layers.0.{leaf}": "mask_decoder.iou_prediction_head.proj_in.{leaf}",
    "mask_decoder.iou_prediction_head.layers.1.{leaf}": "mask_decoder.iou_prediction_head.layers.0.{leaf}",
    "mask_decoder.iou_prediction_head.layers.2.{leaf}": "mask_decoder.iou_prediction_head.proj_out.{leaf}",
}

# Rows that a checkpoint has for all of its layers or for none: use_abs_pos, use_rel_pos and qkv_bias.
OPTIONAL = {
    "vision_encoder.pos_embed",
    "vision_encoder.layers.{layer}.attn.rel_pos_h",
    "vision_encoder.layers.{layer}.attn.rel_pos_w",
    "vision_encoder.layers.{layer}.attn.q.bias",
    "vision_encoder.layers.{layer}.attn.k.bias",
    "vision_encoder.layers.{layer}.attn.v.bias",
}

# Keys that are left out because their twin holds the same numbers: stock saves of transformers 4 could contain both.
DROPPED = {"prompt_encoder.shared_embedding.positional_embedding": "shared_image_embedding.positional_embedding"}


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return names if isinstance(names, tuple) else (names,)


STOCK_MAP = {_as_tuple(target)[0].replace(".attn.q.", ".attn.qkv."): target for target in KEY_MAP.values()}


# What other members of the family are recognised by, before they are refused by name.
RELATIVES = {
    r"image_encoder\.trunk\.|memory_attention\.|memory_encoder\.|vision_encoder\.backbone\.": "SAM 2",
    r"image_encoder\.(layers\.|patch_embed\.seq\.)": "MobileSAM",
    r"mask_decoder\.(hf_token|hq_token|hf_mlp|hq_mask_mlp|compress_vit_feat)\b": "HQ-SAM",
    r"(base_model\.model\.)|.*\.lora_[AB]\.": "a PEFT adapter; see `sam-split merge` and `sam-split adapter`",
}


@dataclass(frozen=True)
class Origin:
    """Where one tensor comes from: its sources stacked by rows, then one of equal blocks of the rows."""

    sources: tuple[str, ...]
    block: int = 0
    blocks: int = 1

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The tensor's shape, from those of its sources."""
        parts = [tuple(shapes[source]) for source in self.sources]
        first = parts[0]
        if len(parts) > 1 and any(part != first for part in parts):
            raise ShapeError(f"{', '.join(self.sources)} must have the same shape to be stacked, got {parts}")
        if len(parts) == self.blocks == 1:
            return first
        if not first or first[0] * len(parts) % self.blocks:
            raise ShapeError(f"{self.sources[0]} must have a multiple of {self.blocks} rows, got the shape {first}")
        return (first[0] * len(parts) // self.blocks, *first[1:])

    def read(self, tensors: Mapping) -> "torch.Tensor":
        """The tensor; a block of rows is a view of its source."""
        if len(self.sources) > 1:
            import torch

            return torch.cat([tensors[source] for source in self.sources])
        tensor = tensors[self.sources[0]]
        return tensor if self.blocks == 1 else tensor.chunk(self.blocks)[self.block]


def plan(keys: Iterable[str], key_map: Mapping, *, inverse: bool = False) -> dict[str, Origin]:
    """Target key -> where its tensor comes from, for exactly these source keys.

    Args:
        keys: of the source checkpoint.
        key_map: KEY_MAP or STOCK_MAP.
        inverse: read the map from right to left.

    Raises:
        UnknownKeyError: if a key matches no row.
        MissingKeyError: if a row, or one layer of it, has no key.
    """
    keys = set(keys)
    if key_map is STOCK_MAP and not inverse:
        keys -= DROPPED.keys()
    rows = [(_as_tuple(left), _as_tuple(right)) for left, right in key_map.items()]
    if inverse:
        rows = [(right, left) for left, right in rows]
    counts = _counts([name for sources, _ in rows for name in sources], keys)
    origins, known, missing = {}, set(), []
    for sources, targets in rows:
        optional = OPTIONAL.intersection(sources + targets)
        expanded = [_expand(sources + targets, values) for values in _values(sources[0], counts)]
        needed = [name for names in expanded for name in names[: len(sources)]]
        if optional and not keys.intersection(needed):
            continue
        known.update(needed)
        missing += [name for name in needed if name not in keys]
        for names in expanded:
            for block, target in enumerate(names[len(sources) :]):
                origins[target] = Origin(names[: len(sources)], block, len(targets))
    unknown = sorted(keys - known)
    if unknown:
        also = f", nor are {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UnknownKeyError(
            f"{unknown[0]!r} is not a tensor of a Segment Anything model{also}; take out what was added to the "
            "model, or correct the name"
        )
    if missing:
        also = f", nor do {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MissingKeyError(f"{missing[0]!r} is not in the checkpoint{also}; the file is incomplete or edited")
    return origins


def _counts(patterns: list[str], keys: set[str]) -> dict[str, int]:
    """How many values each counted field takes, read off the keys; at least one, so that a missing row is noticed."""
    counts = {}
    for pattern in patterns:
        for field in re.findall(r"{(\w+)}", pattern):
            if FIELDS[field] is COUNTED and field not in counts:
                prefix = re.compile(re.escape(pattern[: pattern.index("{")]) + r"(0|[1-9]\d{0,2})\.")
                found = [int(match[1]) for key in keys if (match := prefix.match(key))]
                counts[field] = max(found, default=0) + 1
    return counts


def _values(pattern: str, counts: dict[str, int]) -> list[dict[str, object]]:
    """Every assignment of the pattern's fields."""
    fields = re.findall(r"{(\w+)}", pattern)
    choices = [FIELDS[field] or range(counts[field]) for field in fields]
    return [dict(zip(fields, chosen, strict=True)) for chosen in itertools.product(*choices)]


def _expand(patterns: tuple[str, ...], values: dict[str, object]) -> tuple[str, ...]:
    return tuple(pattern.format(**values) for pattern in patterns)


def format_of(names: Iterable[str], source: str) -> str:
    """Whose names these are: "meta", "transformers" or "split".

    Raises:
        ConversionError: if they are another model's; `source` is what the message calls it.
    """
    names = sorted(names)
    for pattern, relative in RELATIVES.items():
        if any(re.match(pattern, name) for name in names):
            raise ConversionError(f"{source} is {relative}, expected a Segment Anything model (the first SAM)")
    if any(re.match(r"vision_encoder\.layers\.\d+\.attn\.[qkv]\.", name) for name in names):
        return "split"
    if any(name.startswith("vision_encoder.layers.") for name in names):
        return "transformers"
    if any(name.startswith("image_encoder.blocks.") for name in names):
        return "meta"
    examples = ", ".join(repr(name) for name in names[:3])
    raise ConversionError(
        f"{source} is not a Segment Anything checkpoint: its {len(names)} tensors are named {examples}, …; expected "
        "the names of transformers' SamModel, of Meta's code or of SamSplit"
    )


def split_plan(keys: Iterable[str], format: str) -> dict[str, Origin]:
    """The plan from a format's keys to SamSplit's; for "split" it only checks them."""
    if format == "split":
        plan(keys, STOCK_MAP, inverse=True)
        return {key: Origin((key,)) for key in keys}
    return plan(keys, KEY_MAP if format == "meta" else STOCK_MAP)


def check_dropped(tensors: Mapping) -> None:
    """Raise unless every dropped key that is present holds the same bits as its twin."""
    for key, twin in DROPPED.items():
        if key in tensors and twin in tensors:
            ours, theirs = tensors[twin], tensors[key]
            if ours.dtype != theirs.dtype or ours.shape != theirs.shape or not bool((ours == theirs).all()):
                raise ConversionError(f"{key!r} must equal {twin!r}, which is kept in its place, and does not")


def _convert(state_dict: Mapping, key_map: Mapping, inverse: bool = False) -> dict:
    origins = plan(state_dict, key_map, inverse=inverse)
    if key_map is STOCK_MAP and not inverse:
        check_dropped(state_dict)
    shapes = {key: tensor.shape for key, tensor in state_dict.items()}
    converted = {}
    for key, origin in origins.items():
        origin.shape(shapes)
        tensor = origin.read(state_dict)
        converted[key] = tensor.clone() if origin.blocks > 1 else tensor  # blocks of one tensor share its storage
    return converted


def split_state_dict(stock: Mapping) -> dict:
    """Stock transformers' state dict with each vision `attn.qkv` cut into `attn.q`, `attn.k` and `attn.v`."""
    return _convert(stock, STOCK_MAP)


def fuse_state_dict(split: Mapping) -> dict:
    """The inverse of split_state_dict: what stock `SamModel` loads."""
    return _convert(split, STOCK_MAP, inverse=True)


def from_meta(meta: Mapping) -> dict:
    """The state dict of Meta's segment_anything, as SamSplit's."""
    return _convert(meta, KEY_MAP)


def to_meta(split: Mapping) -> dict:
    """The inverse of from_meta: what `segment_anything.sam_model_registry` loads."""
    return _convert(split, KEY_MAP, inverse=True)
