"""LoRA and DoRA adapters converted between SamSplit's q, k, v and stock's fused qkv.

For one layer, with B and A the low-rank factors and s the scaling,

    q + s B_q A_q x        [ B_q  0   0  ]   [ A_q ]
    k + s B_k A_k x  =  s  [  0  B_k  0  ] . [ A_k ] x   added to qkv
    v + s B_v A_v x        [  0   0  B_v ]   [ A_v ]

so A is stacked, B is block-diagonal, and the ranks add up. DoRA has one magnitude for each row; they are stacked too.
"""

import re

import torch

from ..atomic import check_out, new_folder
from ..checkpoints import describe
from ..errors import ConversionError
from ..sources import open_checkpoint
from ..tensors import Tensors
from .peft_files import Adapter, Lora, read_adapter, write_adapter

SPLIT_NAME = re.compile(r"(vision_encoder\.layers\.\d+\.attn)\.([qkv])")
FUSED_NAME = re.compile(r"(vision_encoder\.layers\.\d+\.attn)\.qkv")
POSITIONAL, POSITIONAL_TWIN = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)


def fuse_adapter(adapter, out, *, base=None) -> None:
    """Write an adapter of SamSplit's q, k and v as one of stock SamModel's qkv.

    Args:
        adapter: a PEFT folder or Hub id.
        out: the folder to make.
        base: the model it will be used on, in any format; its name is recorded. Required for DoRA on only some of q,
            k and v, because the other rows need their magnitudes, and for an adapter that replaces the prompt encoder.

    Raises:
        ConversionError: if the result would not compute the same.
    """
    _rewrite(adapter, out, base, _fused)


def split_adapter(adapter, out, *, base=None) -> None:
    """Write an adapter of stock SamModel's qkv as one of SamSplit's q, k and v: the inverse of fuse_adapter.

    Args:
        adapter: a PEFT folder or Hub id.
        out: the folder to make.
        base: the model it will be used on, in any format; its name is recorded. Required for an adapter that saves the
            whole prompt encoder.

    Raises:
        ConversionError: if the result would not compute the same.
    """
    _rewrite(adapter, out, base, _split)


def _rewrite(adapter, out, base, change) -> None:
    out = check_out(out, adapter, base)
    with new_folder(out) as folder:
        weights = None if base is None else describe(open_checkpoint(base))[1]
        adapter = read_adapter(adapter)
        if weights is not None:
            _check_fits(adapter, weights.shapes, base)
        write_adapter(folder, change(adapter, weights), base)


def _check_fits(adapter: Adapter, shapes: dict[str, tuple[int, ...]], base) -> None:
    """Raise unless the base has every adapted layer, fused or split, with the same inputs and outputs."""
    for name, lora in adapter.loras.items():
        blocks = 3 if name.endswith(".attn.qkv") else 1
        found = shapes.get(f"{name.removesuffix('qkv')}q.weight" if blocks == 3 else f"{name}.weight")
        expected = found and (blocks * found[0], *found[1:])
        given = (lora.b.shape[0], lora.a.shape[1])
        if given != expected:
            raise ConversionError(
                f"the adapter's {name} is for a layer of shape {given}, and in {base} it is {expected}; name the base "
                "that it was trained on"
            )


def _fused(adapter: Adapter, weights: Tensors | None) -> Adapter:
    for name in adapter.saved:
        if SPLIT_NAME.match(name) or name.startswith("shared_image_embedding."):
            raise ConversionError(
                f"the adapter replaces {name!r} (modules_to_save), which stock SamModel has under another name; "
                "merge it instead: `sam-split merge`"
            )
    fused = Adapter(adapter.config, {}, dict(adapter.saved))
    layers: dict[str, dict[str, Lora]] = {}
    if any(name.startswith("prompt_encoder.") for name in adapter.saved):
        if weights is None:
            raise ConversionError(
                "the adapter replaces the prompt encoder, and stock's holds a copy of the positional matrix, "
                "which is in the base; name it with --base"
            )
        fused.saved[POSITIONAL_TWIN] = weights[POSITIONAL].clone()
    for name, lora in adapter.loras.items():
        match = SPLIT_NAME.fullmatch(name)
        if match:
            layers.setdefault(match[1], {})[match[2]] = lora
        else:
            fused.loras[name] = lora
    if not layers:
        raise ConversionError("the adapter has no q, k or v of the vision encoder to fuse; is it SamSplit's?")
    for layer, blocks in layers.items():
        fused.loras[f"{layer}.qkv"] = _stack(layer, blocks, weights)
    return fused


def _stack(layer: str, blocks: dict[str, Lora], weights: Tensors | None) -> Lora:
    """The LoRA of qkv from those of q, k and v, some of which may be missing."""
    present = [blocks[name] for name in "qkv" if name in blocks]
    first = present[0]
    outputs, scalings = first.b.shape[0], {lora.scaling for lora in present}
    # A common scaling stays outside B, so that B keeps its bits. Different scalings are multiplied into B.
    scaling = scalings.pop() if len(scalings) == 1 else 1.0

    def folded(lora, tensor):
        return tensor if lora.scaling == scaling else (tensor.double() * lora.scaling).to(tensor.dtype)

    b = first.b.new_zeros(3 * outputs, sum(lora.rank for lora in present))
    bias = None if first.bias is None else first.bias.new_zeros(3 * outputs)
    magnitudes, column = [], 0
    for block, name in enumerate("qkv"):
        rows = slice(block * outputs, (block + 1) * outputs)
        if name in blocks:
            lora = blocks[name]
            if lora.b.shape[0] != outputs or lora.a.shape[1] != first.a.shape[1]:
                raise ConversionError(f"{layer}: the adapters of q, k and v are made for layers of different sizes")
            b[rows, column : column + lora.rank] = folded(lora, lora.b)
            column += lora.rank
            if bias is not None:
                bias[rows] = folded(lora, lora.bias)
            magnitudes.append(lora.magnitude)
        elif first.magnitude is not None:
            magnitudes.append(_norms(layer, name, weights).to(first.magnitude.dtype))
    magnitude = None if first.magnitude is None else torch.cat(magnitudes)
    return Lora(torch.cat([lora.a for lora in present]), b, scaling, bias, magnitude)


def _norms(layer: str, name: str, weights: Tensors | None) -> torch.Tensor:
    """The norm of each row of a weight: the DoRA magnitude that leaves the weight unchanged."""
    if weights is None:
        raise ConversionError(
            f"DoRA adapts only some of q, k and v; the rows of {name} in qkv then take their magnitude from the base: "
            "name it with --base"
        )
    return torch.linalg.norm(weights[f"{layer}.{name}.weight"].float(), dim=1)


def _split(adapter: Adapter, weights: Tensors | None) -> Adapter:
    split = Adapter(adapter.config, {}, dict(adapter.saved))
    if POSITIONAL_TWIN in split.saved:
        # SamSplit has the positional matrix once, outside the prompt encoder.
        if weights is None:
            raise ConversionError(
                f"the adapter saves {POSITIONAL_TWIN!r}, which must equal the base's to be left out; give --base"
            )
        if not torch.equal(split.saved.pop(POSITIONAL_TWIN).float(), weights[POSITIONAL].float()):
            raise ConversionError(
                "the adapter changes the prompt encoder's copy of the positional matrix, but not the image's; "
                "SamSplit has one matrix for both, so it cannot hold this adapter"
            )
    for name in split.saved:
        if FUSED_NAME.match(name) or name.startswith("shared_image_embedding."):
            raise ConversionError(
                f"the adapter replaces {name!r} (modules_to_save), which SamSplit has under another name"
            )
    found = False
    for name, lora in adapter.loras.items():
        match = FUSED_NAME.fullmatch(name)
        if match:
            found = True
            split.loras |= {f"{match[1]}.{block}": part for block, part in _cut(name, lora).items()}
        else:
            split.loras[name] = lora
    if not found:
        raise ConversionError("the adapter has no qkv of the vision encoder to split; is it stock SamModel's?")
    if not split.loras:
        raise ConversionError("every B of the adapter is zero, so it changes nothing; train it first")
    return split


def _cut(name: str, lora: Lora) -> dict[str, Lora]:
    """The LoRAs of q, k and v, each with the ranks that change its rows only; a block without any is left out."""
    if lora.b.shape[0] % 3:
        raise ConversionError(f"{name}: lora_B must have a multiple of 3 rows, got {tuple(lora.b.shape)}")
    parts = {}
    for block, key in enumerate("qkv"):
        b, bias, magnitude = (
            None if whole is None else whole.chunk(3)[block].clone() for whole in (lora.b, lora.bias, lora.magnitude)
        )
        reaching = (b != 0).any(dim=0)  # (rank,); true for NaN
        if not reaching.any():
            if magnitude is None and (bias is None or not bias.any()):
                continue
            reaching[0] = True  # one rank, with B zero: PEFT stores magnitude and bias only with a LoRA
        parts[key] = Lora(lora.a[reaching].clone(), b[:, reaching].contiguous(), lora.scaling, bias, magnitude)
    return parts
