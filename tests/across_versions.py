"""What one version of transformers and peft writes, read with another. `nox -s across_versions` runs all ways.

    python tests/across_versions.py write FOLDER
    python tests/across_versions.py read FOLDER...

`write` converts a tiny stock model, saves the loaded model again, puts a random LoRA and DoRA on it, and keeps the
outputs of all. `read`, with the package out of reach, loads them and fails unless the outputs are the same to 1e-5
and the weights, whoever wrote them, the same files byte for byte.
"""

import sys
from pathlib import Path

import torch
import transformers

LIMIT = 1e-5  # of the largest output
INPUTS = "inputs.pt"
ADAPTERS = {"lora": False, "dora": True}


def write(folder: Path) -> None:
    from models import boxes, pixels, points, stock_model
    from peft import LoraConfig, get_peft_model

    from conversion import convert

    folder.mkdir(parents=True)
    inputs = {"pixel_values": pixels(), **points(1, 0, -1, -10), **boxes()}
    torch.save(inputs, folder / INPUTS)

    theirs = stock_model()
    theirs.save_pretrained(folder / "stock")
    _keep(folder, "converted", theirs, inputs)  # stock's numbers, not ours
    convert(folder / "stock", folder / "converted", progress=False)

    ours = transformers.AutoModel.from_pretrained(folder / "converted", trust_remote_code=True).eval()
    ours.save_pretrained(folder / "saved")
    _keep(folder, "saved", ours, inputs)

    for adapter, use_dora in ADAPTERS.items():
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=False, use_dora=use_dora)
        adapted = get_peft_model(ours, config)
        adapted.save_pretrained(folder / adapter)
        _keep(folder, adapter, adapted, inputs)
        gap = _gap(_outputs(adapted, inputs), torch.load(folder / "saved.pt"))
        assert gap > 100 * LIMIT, f"{adapter} must change the outputs, which moved by {gap:.1e} only"
        ours = adapted.unload()


def read(*folders: Path) -> None:
    for package in ("sam_split", "conversion", "hub_card"):
        sys.modules[package] = None  # importing one raises ModuleNotFoundError, installed or not
    for name in ("converted", "saved"):
        written = {(folder / name / "model.safetensors").read_bytes() for folder in folders}
        assert len(written) == 1, f"{name}: the versions wrote {len(written)} different files of weights"
    for folder in folders:
        gaps = [_read(folder, name) for name in ("converted", "saved", *ADAPTERS)]
        print(f"transformers {transformers.__version__} reads what {folder.name} wrote: {max(gaps):.1e}")


def _read(folder: Path, name: str) -> float:
    from peft import PeftModel

    base = folder / ("converted" if name in ADAPTERS else name)
    model = transformers.AutoModel.from_pretrained(base, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    if name in ADAPTERS:
        model = PeftModel.from_pretrained(model, folder / name)
    gap = _gap(_outputs(model.eval(), torch.load(folder / INPUTS)), torch.load(folder / f"{name}.pt"))
    assert gap <= LIMIT, f"{name} of {folder.name}: outputs differ by {gap:.1e}, the limit is {LIMIT:g}"
    return gap


@torch.no_grad()
def _outputs(model, inputs) -> dict[str, torch.Tensor]:
    outputs = model(**inputs)
    return {"pred_masks": outputs.pred_masks, "iou_scores": outputs.iou_scores}


def _keep(folder: Path, name: str, model, inputs) -> None:
    torch.save(_outputs(model, inputs), folder / f"{name}.pt")


def _gap(ours, theirs) -> float:
    """The largest difference, relative to the largest value of its output."""
    return max(((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in theirs)


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](*map(Path, sys.argv[2:]))
