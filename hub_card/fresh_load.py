"""Load a folder without the package: a script for a fresh interpreter, in which sam_split cannot be imported.

    python fresh_load.py FOLDER [BASE REVISION]

Loads FOLDER through the Auto classes, compares every tensor with its weight files bit for bit, and segments one random
image. The last line of the output is JSON; a failed check prints one line on standard error and exits with 1.
"""

import json
import sys
from pathlib import Path


def load_model(folder):
    """The model in `folder`, loaded by its own code."""
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    if not type(model).__module__.startswith("transformers_modules."):
        raise SystemExit(f"AutoModel gave {type(model).__module__}.{type(model).__name__}, not the folder's own class")
    AutoProcessor.from_pretrained(folder)
    return model, model.state_dict()


def load_adapter(folder, base, revision):
    """The adapter in `folder`, on its base from the Hub."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModel

    model = AutoModel.from_pretrained(base, revision=revision, code_revision=revision, trust_remote_code=True)
    model = PeftModel.from_pretrained(model, folder)
    return model, get_peft_model_state_dict(model)


def check(loaded, files):
    """Compare the tensors that were loaded with those in the weight files, and count them."""
    from safetensors import safe_open

    seen = set()
    for path in files:
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():
                seen.add(name)
                compare(name, loaded.get(name), weights.get_tensor(name))
    if set(loaded) - seen:
        raise SystemExit(f"{sorted(set(loaded) - seen)[0]} was loaded but is in none of the weight files")
    return len(seen)


def compare(name, ours, theirs):
    import torch

    if ours is None:
        raise SystemExit(f"{name} is in the weight file but the model has no such tensor")
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        was, now = (f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (theirs, ours))
        raise SystemExit(f"{name} is {was} in the weight file and {now} once loaded")
    if not torch.isfinite(theirs).all():
        raise SystemExit(f"{name} holds values that are not finite")
    if not torch.equal(ours, theirs):
        raise SystemExit(f"{name} changes on loading")


def segment(model):
    """One click on a random image: the code must run and its outputs must be finite."""
    import torch

    size = model.config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    click = torch.tensor([[[[width / 2, height / 2]]]])
    with torch.no_grad():
        outputs = model.eval()(pixel_values=pixels, input_points=click)
    for name in ("pred_masks", "iou_scores"):
        if not torch.isfinite(outputs[name]).all():
            raise SystemExit(f"{name} of a random image is not finite")


def main(folder, base=None, revision=None):
    model, loaded = load_adapter(folder, base, revision) if base else load_model(folder)
    tensors = check(loaded, sorted(Path(folder).glob("adapter_model.safetensors" if base else "model*.safetensors")))
    segment(model)
    import torch
    import transformers

    print(json.dumps({"tensors": tensors, "torch": torch.__version__, "transformers": transformers.__version__}))


if __name__ == "__main__":
    sys.path.pop(0)  # this file's own folder: its module names could hide others
    for package in ("sam_split", "conversion", "hub_card"):
        sys.modules[package] = None  # importing one raises ModuleNotFoundError, installed or not
    main(*sys.argv[1:])
