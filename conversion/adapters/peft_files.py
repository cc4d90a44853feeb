"""LoRA and DoRA adapters in PEFT's files."""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key

from ..errors import ConversionError
from ..folder import write_json
from ..pickles import read_weights
from ..sources import fetch, read_json
from ..tensors import InMemory, SafetensorsFiles, Tensors
from ..writing import check_written, write_safetensors

PREFIX = "base_model.model."

# Settings that change what A and B mean, or the base's weights, and why they cannot be converted.
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
# Other initialisations (PiSSA, OLoRA, LoftQ, CorDA) also change the base's weights.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)


@dataclass
class Lora:
    """The update of one linear layer: scaling * (B A x + bias), and DoRA's magnitude for each row."""

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
        loras: name of a linear layer -> its update.
        saved: name of a tensor that replaces the base's (modules_to_save) -> the tensor.
    """

    config: dict
    loras: dict[str, Lora] = field(default_factory=dict)
    saved: dict[str, torch.Tensor] = field(default_factory=dict)


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
        raise ConversionError(f"{adapter} holds no adapter_model.safetensors")
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
        "use_rslora": False,  # lora_alpha and alpha_pattern hold the scalings
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


def _check_config(config: dict) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConversionError(
            f"the adapter is {kind}, expected LORA (LoRA or DoRA); merge it instead: `sam-split merge`"
        )
    for name, reason in REFUSED.items():
        if config.get(name):
            raise ConversionError(
                f"the adapter uses {name}, which cannot be expressed there: {reason}; only LoRA and DoRA can"
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
    for name, found in parts.items():
        adapter.loras[name] = checked_lora(config, name, found)
    if not adapter.loras:
        raise ConversionError("the adapter holds no LoRA weights")
    return adapter


def checked_lora(config: dict, name: str, parts: dict[str, torch.Tensor]) -> Lora:
    """The LoRA of one layer.

    Args:
        config: of the adapter; its alphas and use_rslora give the scaling.
        name: of the layer.
        parts: PEFT's name of a tensor, such as "lora_A.weight" -> the tensor.

    Raises:
        ConversionError: if the shapes or the alpha are wrong.
    """
    a, b = parts.get("lora_A.weight"), parts.get("lora_B.weight")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        shapes = [None if part is None else tuple(part.shape) for part in (a, b)]
        raise ConversionError(f"{name}: lora_A and lora_B must be (rank, inputs) and (outputs, rank), got {shapes}")
    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas.keys(), name), config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)):
        raise ConversionError(f"{name}: lora_alpha must be a number, got {alpha!r}")
    scaling = alpha / math.sqrt(a.shape[0]) if config.get("use_rslora") else alpha / a.shape[0]
    return Lora(a, b, scaling, parts.get("lora_B.bias"), parts.get("lora_magnitude_vector"))


def _whole(number: float) -> int | float:
    """As an int if it is one, as lora_alpha is usually written."""
    return int(number) if number == int(number) else number
