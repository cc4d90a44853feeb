"""What one version of transformers and peft writes, read with another. `nox -s across_versions` runs both ways.

    python tests/across_versions.py write FOLDER
    python tests/across_versions.py read FOLDER

`write` converts a tiny stock model, saves the loaded model again, puts a random adapter on it, and keeps the outputs
of all three. `read`, with the package out of reach, loads them and fails unless the outputs are the same to 1e-5.
"""

import sys
from pathlib import Path

import torch
import transformers

LIMIT = 1e-5  # of the largest output
INPUTS = "inputs.pt"


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

    torch.manual_seed(0)
    adapted = get_peft_model(ours, LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    _keep(folder, "adapter", adapted, inputs)
    gap = _gap(_outputs(adapted, inputs), torch.load(folder / "saved.pt"))
    assert gap > 100 * LIMIT, f"the adapter must change the outputs, which moved by {gap:.1e} only"


def read(folder: Path) -> None:
    from peft import PeftModel

    for package in ("sam_split", "conversion", "hub_card"):
        sys.modules[package] = None  # importing one raises ModuleNotFoundError, installed or not
    inputs = torch.load(folder / INPUTS)
    for name in ("converted", "saved", "adapter"):
        base = folder / ("converted" if name == "adapter" else name)
        model = transformers.AutoModel.from_pretrained(base, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        if name == "adapter":
            model = PeftModel.from_pretrained(model, folder / "adapter")
        gap = _gap(_outputs(model.eval(), inputs), torch.load(folder / f"{name}.pt"))
        assert gap <= LIMIT, f"{name} of {folder.name}: outputs differ by {gap:.1e}, the limit is {LIMIT:g}"
        print(f"transformers {transformers.__version__} reads {name} of {folder.name}: outputs differ by {gap:.1e}")


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
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
