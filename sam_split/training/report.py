"""What a run leaves behind: the adapter with its card, results, overlays, and what it takes to run it again."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError

from .evaluation import evaluation_table
from .pictures import overlay_page

PACKAGES = ("transformers", "peft", "accelerate", "sam-split")
# What a table of several runs shows -> where it stands: in the means of an evaluation, or in the results.
MEASURED = {
    "IoU box": "iou_box",
    "1 click": "iou_1_click",
    "3 clicks": "iou_3_clicks",
    "AR@100": "average_recall",
    "recall@0.5": "recall_50",
}
COSTS = {"trainable": "trainable", "peak GiB": "peak_gib", "s/step": "seconds_per_step"}


def about(base, data, out, settings, examples):
    """What it takes to run again: command, seed, versions, and digests of the images to train and to test on."""
    sources = data, settings.val or data
    return {
        "command": settings.command_line(base, data, out),
        "preset": settings.preset,
        "seed": settings.seed,
        "versions": versions(),
        "data": {
            kind: {"source": str(source), "images": len(part), "digest": part.digest()}
            for kind, source, part in zip(("train", "test"), sources, examples, strict=True)
        },
    }


def versions():
    """Name -> version of what results depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,  # with the build, such as +cu126
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "a checkout, not installed"


def write_results(out, results, examples, evaluations):
    """Complete the results with name -> evaluation of `examples`, and write card, overlays and `results.json`.

    The latter comes last: a folder with it holds a finished run.
    """
    from huggingface_hub import ModelCard

    weights = hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    results = {**results, "weights": weights, **{name: found.as_dict() for name, found in evaluations.items()}}
    table = evaluation_table(evaluations)
    card = ModelCard.load(out / "adapter" / "README.md")
    card.text = CARD.format(table=table, **results, **_flat(results))
    card.save(out / "adapter" / "README.md")
    with replacing_folder(out / "overlays") as folder:
        overlay_page(folder, examples, evaluations, title=f"{results['preset']}: before and after")
    partial = out / "results.json.partial"
    partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, out / "results.json")
    print(table)
    return results


CARD = """
# SamSplit adapter

Made by

```bash
{command}
```

and measured on {test_images} images that it was not trained on. The figures are true of the weights with one SHA-256
alone, {weights}:

{table}

{steps} steps on {train_images} images, {trainable:,} trainable parameters, seed {seed}. Versions: {named_versions}.
SHA-256 of the images with their names and masks: {train_digest} (training), {test_digest} (test).
"""


def _flat(results):
    data = {f"{kind}_{name}": part[name] for kind, part in results["data"].items() for name in ("images", "digest")}
    return data | {"named_versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items())}


def presets_table(runs):
    """The results of several runs on the same data as a table in Markdown; the first line is their base."""
    measured = {label: name for label, name in MEASURED.items() if name in runs[0]["before"]["means"]}

    def line(name, means, costs):
        return [
            name,
            *(f"{means[key]:.3f}" for key in measured.values()),
            *(f"{costs.get(key, '')}" for key in COSTS.values()),
        ]

    lines = [["preset", *measured, *COSTS], ["---"] * (1 + len(measured) + len(COSTS))]
    lines.append(line("(none)", runs[0]["before"]["means"], {}))
    lines += [line(run["preset"], run["after"]["means"], run) for run in runs]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@contextlib.contextmanager
def replacing_folder(folder):
    """A folder to fill, which takes the place of `folder` when all is well."""
    partial = Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    except SafetensorError as error:
        raise OSError(f"{folder} could not be written: {error}") from error
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
