"""LoRA and DoRA adapters between SamSplit's q, k, v and stock's fused qkv, and out of SAMed's and Sam_LoRA's files.

For one layer, with B and A the low-rank factors and s the scaling,

    q + s B_q A_q x        [ B_q  0   0  ]   [ A_q ]
    k + s B_k A_k x  =  s  [  0  B_k  0  ] . [ A_k ] x   added to qkv
    v + s B_v A_v x        [  0   0  B_v ]   [ A_v ]

so A is stacked, B is block-diagonal, and the rank is the sum. DoRA's magnitudes belong to rows and are stacked too.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key

from ..atomic import check_out, new_folder
from ..checkpoints import describe
from ..errors import ConversionError
from ..folder import write_json
from ..key_map import KEY_MAP, plan
from ..pickles import read_weights
from ..sources import fetch, open_checkpoint, read_json
from ..tensors import InMemory, Renamed, SafetensorsFiles, Tensors, check_finite
from ..writing import check_written, write_safetensors

PREFIX = "base_model.model."
SPLIT_NAME = re.compile(r"(vision_encoder\.layers\.\d+\.attn)\.([qkv])")
FUSED_NAME = re.compile(r"(vision_encoder\.layers\.\d+\.attn)\.qkv")
POSITIONAL, POSITIONAL_TWIN = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)

# What changes the meaning of A and B, or the base's own weights, and why it cannot be carried over.
REFUSED = {
    "alora_invocation_tokens": "it acts on some tokens only",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it changes the base's weights",
    "layer_replication": "it repeats layers of the base",
    "megatron_config": "it is for Megatron's layers",
    "target_parameters": "it adapts parameters, not layers",
    "trainable_token_indices": "there are no tokens",
    "use_bdlora": "its factors are block-diagonal already",
    "use_qalora": "it pools the inputs",
    "velora_config": "it compresses the inputs",
}
# Other ways to start (PiSSA, OLoRA, LoftQ, CorDA) replace the base's weights by a remainder.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)


@dataclass
class Lora:
    """What is added to one linear layer: scaling * (B A x + bias), then DoRA's magnitude for each row."""

    a: torch.Tensor  # (rank, inputs)
    b: torch.Tensor  # (outputs, rank)
    scaling: float
    bias: torch.Tensor | None = None  # (outputs,)
    magnitude: torch.Tensor | None = None  # (outputs,)

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass
class Adapter:
    """A PEFT adapter.

    Attributes:
        config: the content of adapter_config.json.
        loras: name of a linear layer -> what is added to it.
        saved: name of a tensor that replaces the base's (modules_to_save) -> the tensor.
    """

    config: dict
    loras: dict[str, Lora] = field(default_factory=dict)
    saved: dict[str, torch.Tensor] = field(default_factory=dict)


def fuse_adapter(adapter, out, *, base=None) -> None:
    """Write an adapter of SamSplit's q, k and v as one of stock SamModel's qkv.

    Args:
        adapter: a PEFT folder or Hub id.
        out: the folder to make.
        base: the model it will be used on, in any format; its name is recorded. DoRA on some of q, k and v needs it
            (the other rows get the magnitude that they have), and an adapter that replaces the prompt encoder.

    Raises:
        ConversionError: if the result would not compute the same.
    """
    _rewrite(adapter, out, base, _fused)


def split_adapter(adapter, out, *, base=None) -> None:
    """Write an adapter of stock SamModel's qkv as one of SamSplit's q, k and v: the inverse of fuse_adapter.

    Args:
        adapter: a PEFT folder or Hub id.
        out: the folder to make.
        base: the model it will be used on, in any format; its name is recorded. An adapter that saves the whole prompt
            encoder needs it.

    Raises:
        ConversionError: if the result would not compute the same.
    """
    _rewrite(adapter, out, base, _split)


def import_adapter(source, out, *, base) -> None:
    """Write LoRA factors of SAMed or Sam_LoRA (w_a_000, w_b_000, …) as a PEFT adapter of SamSplit's q and v.

    Args:
        source: their .pth or .safetensors file.
        out: the folder to make.
        base: the model that they were trained on, in any format.

    Raises:
        ConversionError: if the file is another one, or does not fit the base.
    """
    out, source = check_out(out, base), Path(source)
    with new_folder(out) as folder:
        write_adapter(folder, _imported(source, base), base)


def read_adapter(adapter) -> Adapter:
    """A LoRA or DoRA adapter that PEFT saved.

    Raises:
        ConversionError: if it is of another kind, or damaged.
    """
    folder = fetch(str(adapter), None, ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
    if not (folder / "adapter_config.json").is_file():
        raise ConversionError(f"{adapter} holds no adapter_config.json; expected the folder of a PEFT adapter")
    config = read_json(folder / "adapter_config.json")
    _check_config(config)
    if (folder / "adapter_model.safetensors").is_file():
        tensors = SafetensorsFiles([folder / "adapter_model.safetensors"])
    elif (folder / "adapter_model.bin").is_file():
        tensors = read_weights(folder / "adapter_model.bin")
    else:
        raise ConversionError(
            f"{adapter} holds no adapter_model.safetensors; name a folder that PEFT's save_pretrained wrote"
        )
    return _parse(config, tensors)


def write_adapter(folder: Path, adapter: Adapter, base) -> None:
    """Write adapter_config.json and adapter_model.safetensors for PEFT, and check every bit."""
    ranks = {name: lora.rank for name, lora in adapter.loras.items()}
    alphas = {name: _whole(lora.scaling * lora.rank) for name, lora in adapter.loras.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        **adapter.config,
        "r": rank,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(adapter.loras),
        "use_rslora": False,  # the scalings are spelt out by the alphas
        "auto_mapping": None,
        "base_model_name_or_path": None if base is None else str(base),
        "revision": None,
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
    }
    state = {PREFIX + name: tensor for name, tensor in adapter.saved.items()}
    for name, lora in adapter.loras.items():
        parts = {
            "lora_A.weight": lora.a,
            "lora_B.weight": lora.b,
            "lora_B.bias": lora.bias,
            "lora_magnitude_vector": lora.magnitude,
        }
        state |= {f"{PREFIX}{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    tensors = InMemory(state)
    write_safetensors(folder / "adapter_model.safetensors", tensors, list(state))
    check_written(SafetensorsFiles([folder / "adapter_model.safetensors"]), tensors)
    write_json(folder / "adapter_config.json", config)


def _rewrite(adapter, out, base, change) -> None:
    out = check_out(out, adapter, base)
    with new_folder(out) as folder:
        weights = None if base is None else describe(open_checkpoint(base))[1]
        adapter = read_adapter(adapter)
        if weights is not None:
            _check_fits(adapter, weights.shapes, base)
        write_adapter(folder, change(adapter, weights), base)


def _check_fits(adapter: Adapter, shapes: dict[str, tuple[int, ...]], base) -> None:
    """Raise unless every adapted layer, fused or not, is in the base and has the adapter's inputs and outputs."""
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


def _check_config(config: dict) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConversionError(
            f"the adapter is {kind}, expected LORA (LoRA or DoRA); merge it instead: `sam-split merge`"
        )
    for name, reason in REFUSED.items():
        if config.get(name):
            raise ConversionError(
                f"the adapter uses {name}, which cannot be expressed there: {reason}; train plain LoRA or DoRA"
            )
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        start = config["init_lora_weights"]
        raise ConversionError(
            f"the adapter was started with init_lora_weights={start!r}, which also changes the base's weights; "
            "convert it to plain LoRA with PEFT first (path_initial_model_for_weight_conversion)"
        )
    if config.get("bias", "none") != "none":
        raise ConversionError(
            f"the adapter was trained with bias={config['bias']!r}, which replaces biases of the base; merge it "
            "instead: `sam-split merge`"
        )


def _parse(config: dict, tensors: Tensors) -> Adapter:
    adapter = Adapter(config)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key in tensors:
        name = key.removeprefix(PREFIX)
        match = re.fullmatch(
            r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)(\.weight)?", name
        )
        if match:
            parts.setdefault(match[1], {})[match[2]] = tensors[key]
        elif ".lora_" in name:
            raise ConversionError(
                f"{key!r} is not a LoRA or DoRA tensor of a linear layer; only those can be converted"
            )
        else:
            adapter.saved[name] = tensors[key]
            check_finite(name, [tensors[key]])
    for name, found in parts.items():
        adapter.loras[name] = _lora(config, name, found)
    if not adapter.loras:
        raise ConversionError("the adapter holds no LoRA weights; name one that was trained as LoRA or DoRA")
    return adapter


def _lora(config: dict, name: str, parts: dict[str, torch.Tensor]) -> Lora:
    a, b = parts.get("lora_A.weight"), parts.get("lora_B.weight")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        shapes = [None if part is None else tuple(part.shape) for part in (a, b)]
        raise ConversionError(f"{name}: lora_A and lora_B must be (rank, inputs) and (outputs, rank), got {shapes}")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks.keys(), name), config.get("r"))
    if rank not in (None, a.shape[0]):
        raise ConversionError(
            f"{name}: adapter_config.json says rank {rank}, and lora_A has {a.shape[0]}; they are of two adapters, "
            "save it again"
        )
    check_finite(name, parts.values())
    alpha = alphas.get(get_pattern_key(alphas.keys(), name), config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)):
        raise ConversionError(f"{name}: lora_alpha must be a number, got {alpha!r}")
    scaling = alpha / math.sqrt(a.shape[0]) if config.get("use_rslora") else alpha / a.shape[0]
    return Lora(a, b, scaling, parts.get("lora_B.bias"), parts.get("lora_magnitude_vector"))


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
    """One LoRA of qkv from those of q, k and v, of which some may be missing."""
    present = [blocks[name] for name in "qkv" if name in blocks]
    first = present[0]
    outputs, scalings = first.b.shape[0], {lora.scaling for lora in present}
    # One scaling stays outside B, so that B keeps its bits; different ones can only go into it.
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
                raise ConversionError(
                    f"{layer}: the adapters of q, k and v are made for layers of different sizes; "
                    "name an adapter of one model"
                )
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
    """The length of each row of a weight that DoRA does not touch: the magnitude that leaves it as it is."""
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
                "the adapter has trained the prompt encoder's copy of the positional matrix, apart from the image's; "
                "SamSplit has one matrix for both, so it cannot hold this adapter"
            )
    for name in split.saved:
        if FUSED_NAME.match(name) or name.startswith("shared_image_embedding."):
            raise ConversionError(
                f"the adapter replaces {name!r} (modules_to_save), which SamSplit has under another name; "
                "train it without"
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
        raise ConversionError(
            "every B of the adapter is zero: it was never trained, and nothing would be left of it; train it first"
        )
    return split


def _cut(name: str, lora: Lora) -> dict[str, Lora]:
    """The LoRAs of q, k and v; of each only the ranks that reach its rows, and none where nothing does."""
    if lora.b.shape[0] % 3:
        raise ConversionError(f"{name}: lora_B must have a multiple of 3 rows, got {tuple(lora.b.shape)}")
    parts = {}
    for block, key in enumerate("qkv"):
        b, bias, magnitude = (
            None if whole is None else whole.chunk(3)[block].clone() for whole in (lora.b, lora.bias, lora.magnitude)
        )
        reaching = (b != 0).any(dim=0)  # (rank,); NaN reaches as well
        if not reaching.any():
            if magnitude is None and (bias is None or not bias.any()):
                continue
            reaching[0] = True  # a rank of zeros, for the magnitude or the bias to hang on
        parts[key] = Lora(lora.a[reaching].clone(), b[:, reaching].contiguous(), lora.scaling, bias, magnitude)
    return parts


def _imported(source: Path, base) -> Adapter:
    if not source.is_file():
        given = "is a folder" if source.is_dir() else "does not exist"
        raise ConversionError(f"{source} {given}; expected a .pth or .safetensors file of SAMed or Sam_LoRA")
    tensors = SafetensorsFiles([source]) if source.suffix == ".safetensors" else read_weights(source)
    factors = {side: sorted(name for name in tensors if re.fullmatch(rf"w_{side}_\d{{3}}", name)) for side in "ab"}
    others = [name for name in tensors if name not in {*factors["a"], *factors["b"]}]
    weights = describe(open_checkpoint(base))[1]
    layers = len({name for name in weights if name.endswith("attn.q.weight")})
    expected = [[f"w_{side}_{number:03d}" for number in range(2 * layers)] for side in "ab"]
    if list(factors.values()) != expected:
        raise ConversionError(
            f"{source} holds {len(factors['a'])} w_a_* and {len(factors['b'])} w_b_*, expected {2 * layers} of each, "
            f"for q and v of the {layers} layers of {base}; which layers fewer ones belong to, the file does not say"
        )
    adapter = Adapter(
        {"peft_type": "LORA", "task_type": None, "inference_mode": True, "bias": "none", "lora_dropout": 0.0}
    )
    for number, (a, b) in enumerate(zip(*factors.values(), strict=True)):
        name = f"vision_encoder.layers.{number // 2}.attn.{'qv'[number % 2]}"
        lora = _lora({"lora_alpha": 1}, name, {"lora_A.weight": tensors[a], "lora_B.weight": tensors[b]})
        lora.scaling = 1.0
        if (lora.b.shape[0], lora.a.shape[1]) != weights.specs[f"{name}.weight"].shape:
            raise ConversionError(f"{source}: {a} and {b} do not fit {name} of {base}; is it of another size?")
        adapter.loras[name] = lora
    if others:
        adapter.saved = _imported_modules(source, tensors, others, weights, base)
        adapter.config["modules_to_save"] = sorted({name.split(".")[0] for name in adapter.saved})
    return adapter


def _imported_modules(source, tensors: Tensors, names: list[str], weights: Tensors, base) -> dict[str, torch.Tensor]:
    """Meta's names to ours, for the prompt encoder and the mask decoder that SAMed saves along."""
    parts = {name.split(".")[0] for name in names}
    if not parts <= {"prompt_encoder", "mask_decoder"}:
        raise ConversionError(
            f"{source}: {names[0]!r} is no LoRA factor and no part of a prompt encoder or mask decoder; expected "
            "a file that SAMed or Sam_LoRA saved"
        )
    rows = {row: target for row, target in KEY_MAP.items() if row.split(".")[0] in parts}
    renamed = Renamed(InMemory({name: tensors[name] for name in names}), plan(names, rows))
    for name, spec in renamed.specs.items():
        if spec.shape != weights.specs[name].shape:
            raise ConversionError(
                f"{source}: {name!r} has the shape {spec.shape}, and {weights.specs[name].shape} in {base}; an "
                "adapter cannot change the base's sizes (SAMed's mask decoder has one mask for each class)"
            )
    saved = dict(renamed)
    positional = saved.pop(POSITIONAL, None)
    if positional is not None and not torch.equal(positional.float(), weights[POSITIONAL].float()):
        raise ConversionError(
            f"{source} was trained with another positional matrix than that of {base}; name its own base"
        )
    return saved


def _whole(number: float) -> int | float:
    """An int where that is exact: what people write into lora_alpha."""
    return int(number) if number == int(number) else number
