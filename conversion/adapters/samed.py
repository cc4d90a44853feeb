"""LoRA factors of SAMed and Sam_LoRA (w_a_000, w_b_000, …) as a PEFT adapter of SamSplit."""

import re
from pathlib import Path

import torch

from ..atomic import check_out, new_folder
from ..checkpoints import describe
from ..errors import ConversionError
from ..key_map import KEY_MAP, plan
from ..pickles import read_weights
from ..sources import open_checkpoint
from ..tensors import InMemory, Renamed, SafetensorsFiles, Tensors
from .peft_files import Adapter, checked_lora, write_adapter

POSITIONAL = "shared_image_embedding.positional_embedding"


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
            f"for q and v of the {layers} layers of {base}; a file with fewer does not say which layers have them"
        )
    adapter = Adapter(
        {"peft_type": "LORA", "task_type": None, "inference_mode": True, "bias": "none", "lora_dropout": 0.0}
    )
    for number, (a, b) in enumerate(zip(*factors.values(), strict=True)):
        name = f"vision_encoder.layers.{number // 2}.attn.{'qv'[number % 2]}"
        lora = checked_lora({"lora_alpha": 1}, name, {"lora_A.weight": tensors[a], "lora_B.weight": tensors[b]})
        lora.scaling = 1.0
        if (lora.b.shape[0], lora.a.shape[1]) != weights.specs[f"{name}.weight"].shape:
            raise ConversionError(f"{source}: {a} and {b} do not fit {name} of {base}; is it of another size?")
        adapter.loras[name] = lora
    if others:
        adapter.saved = _imported_modules(source, tensors, others, weights, base)
        adapter.config["modules_to_save"] = sorted({name.split(".")[0] for name in adapter.saved})
    return adapter


def _imported_modules(source, tensors: Tensors, names: list[str], weights: Tensors, base) -> dict[str, torch.Tensor]:
    """The prompt encoder and mask decoder that SAMed saves with the factors, under SamSplit's names."""
    parts = {name.split(".")[0] for name in names}
    if not parts <= {"prompt_encoder", "mask_decoder"}:
        raise ConversionError(
            f"{source}: {names[0]!r} is no LoRA factor and not part of a prompt encoder or mask decoder; expected "
            "a file of SAMed or Sam_LoRA"
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
            f"{source} was trained with another positional matrix than {base} has; name the base it was trained on"
        )
    return saved
