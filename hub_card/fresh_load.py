"""Load a folder without the package: a script for a fresh interpreter, in which sam_split cannot be imported.

    python fresh_load.py FOLDER [BASE REVISION]

Loads FOLDER through the Auto classes, compares every tensor with its weight files bit for bit, and segments one random
image. The last line of the output says so; a failed check prints one line on standard error and exits with 1.
"""

import sys
from pathlib import Path


def load(folder, base, revision):
    """The model in `folder` by its own code, or the adapter there on its base from the Hub; and what was loaded."""
    from transformers import AutoModel, AutoProcessor

    if base:
        from peft import PeftModel, get_peft_model_state_dict

        model = AutoModel.from_pretrained(base, revision=revision, code_revision=revision, trust_remote_code=True)
        model = PeftModel.from_pretrained(model, folder)
        return model, get_peft_model_state_dict(model)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    if not type(model).__module__.startswith("transformers_modules."):
        raise SystemExit(f"AutoModel gave {type(model).__module__}.{type(model).__name__}, not the folder's own class")
    AutoProcessor.from_pretrained(folder)
    return model, model.state_dict()


def check(loaded, files):
    """Compare the tensors that were loaded with those in the weight files, and count them."""
    import torch
    from safetensors.torch import load_file

    stored = {}
    for path in files:
        stored |= load_file(path)
    for name in sorted(loaded.keys() ^ stored.keys()):
        raise SystemExit(f"{name} is not both in the weight files and in the model once loaded")
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            raise SystemExit(f"{name} holds values that are not finite")
        try:
            torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)  # shapes and dtypes as well
        except AssertionError as error:
            raise SystemExit(f"{name} changes on loading: {' '.join(str(error).split())}") from None
    return len(stored)


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
    model, loaded = load(folder, base, revision)
    tensors = check(loaded, sorted(Path(folder).glob("adapter_model.safetensors" if base else "model*.safetensors")))
    segment(model)
    import torch
    import transformers

    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"It loads: {tensors} tensors, each equal to the one in the weight files ({versions}).")


if __name__ == "__main__":
    sys.path.pop(0)  # this file's own folder: its module names could hide others
    for package in ("sam_split", "conversion", "hub_card"):
        sys.modules[package] = None  # importing one raises ModuleNotFoundError, installed or not
    main(*sys.argv[1:])
