"""The figures of one run as a plot: time and memory of each peer, memory over tokens and over prompts."""

import re
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .cases import REFERENCE
from .results import Results

OURS, THEIRS = "#0b6e4f", "#9aa5b1"
BARS = [
    ("encoder-b1", "Image encoder, forward"),
    ("lora-b1", "LoRA training step"),
    ("decoder-64", "Mask decoder, 64 prompts"),
]
NAMES = {
    "ours": "SamSplit",
    "ours_checkpointed": "SamSplit, checkpointed",
    "ours_compiled": "SamSplit, compiled",
    "ours_narrow": "SamSplit, values not widened",
    "ours_equal": "SamSplit, values as keys",
    "ours_cudnn": "SamSplit, for cuDNN",
    "stock_sdpa": "transformers sdpa",
    "stock_sdpa_checkpointed": "sdpa, checkpointed",
    "stock_sdpa_compiled": "sdpa, compiled",
    "stock_eager": "transformers eager",
    "meta": "segment-anything",
    "timm": "timm",
}


def draw(results: Results, path: Path) -> bool:
    """Draw the last run that has all parts, its first model and dtype; False if no run has."""
    for run, name in [(each, name) for each in reversed(results.runs) for name in each.cases]:
        label = name.split(maxsplit=1)[1]
        found = {case.split()[0]: run.cases[case] for case in run.cases if case.endswith(label)}
        found = {name: case for name, case in found.items() if case["done"]}
        tokens = sorted(
            (case["size"], case) for name, case in found.items() if re.fullmatch(r"encoder-(b1|\d+)", name)
        )
        prompts = sorted((case["prompts"], case) for name, case in found.items() if name.startswith("decoder-"))
        if all(name in found for name, _ in BARS) and len(tokens) > 1 and len(prompts) > 1:
            break
    else:
        return False
    figure, axes = plt.subplots(2, 4, figsize=(16, 7.2), layout="constrained", width_ratios=[1, 1, 1, 1.05])
    unit = "CPU s" if run.about["threads"] == 1 else "s"
    for column, (name, title) in enumerate(BARS):
        figures = {peer: f for peer, f in found[name]["figures"].items() if "failure" not in f}
        seconds = {peer: statistics.median(f["seconds"]) for peer, f in figures.items()}
        _bars(axes[0, column], seconds, f"{title}\ntime, {unit}", {peer: f["seconds"] for peer, f in figures.items()})
        added = {peer: statistics.median(f["added"]) / 1024 for peer, f in figures.items() if "added" in f}
        _bars(axes[1, column], added, "added memory, GB")
    _lines(
        axes[0, 3], [((size // 16) ** 2, case) for size, case in tokens], "tokens", "Image encoder\nadded memory, GB"
    )
    _lines(axes[1, 3], prompts, "prompts", "Mask decoder\nadded memory, GB")
    model, dtype = label.split()
    figure.suptitle(
        f"ViT-{model[-1].upper()}, {dtype}, batch 1 on {run.about['device']}, {run.about['date']}. "
        "In brackets: as part of transformers sdpa. Lines: minimum to maximum."
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _bars(axis, values: dict[str, float], title: str, rounds: dict[str, list[float]] | None = None):
    names = list(values)[::-1]
    labels = [NAMES[name] for name in names]
    axis.barh(labels, [values[name] for name in names], color=[OURS if "ours" in name else THEIRS for name in names])
    largest = max(values.values(), default=1)
    for y, name in enumerate(names):
        end = values[name]
        if rounds:
            end = max(rounds[name])
            axis.plot([min(rounds[name]), end], [y, y], color="black", lw=1.2)
        share = f"  ({values[name] / values[REFERENCE]:.2f})" if REFERENCE in values and name != REFERENCE else ""
        axis.text(end + 0.02 * largest, y, f"{values[name]:.3g}{share}", va="center", fontsize=8)
        largest = max(largest, end)
    axis.set_title(title, fontsize=10)
    axis.set_xlim(0, largest * 1.4)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _lines(axis, points: list[tuple[int, dict]], xlabel: str, title: str):
    for peer, colour in ((REFERENCE, THEIRS), ("ours", OURS)):
        figures = [(x, case["figures"].get(peer, {})) for x, case in points]
        line = [(x, statistics.median(f["added"]) / 1024) for x, f in figures if "added" in f]
        if line:
            axis.plot(*zip(*line, strict=True), "o-", color=colour)
            axis.annotate(NAMES[peer], line[-1], textcoords="offset points", xytext=(-8, 5), ha="right", fontsize=8)
    axis.set_xticks([x for x, _ in points])
    axis.set_xlabel(xlabel, fontsize=9)
    axis.set_title(title, fontsize=10)
    axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
