"""What `sam-split demo` checks: outputs against stock's, parameter counts against published ones, one training step.

Each check prints a table and returns the names of the rows that failed.
"""

import sys
import time
from pathlib import Path

from .demo_figure import LIMIT, Scene, View

RANK = 16
SEED = 3

# Counts for rank 16 on ViT-B in "How to hack any Transformers model", the guide in transformers' documentation:
# adapter, arguments of LoraConfig, trainable parameters, all parameters. None: not published.
BASE_PARAMETERS = 93_735_472
PUBLISHED = (
    ("LoRA q, v", {"target_modules": ["q", "v"]}, 589_824, 94_325_296),
    ("LoRA q, k, v", {"target_modules": ["q", "k", "v"]}, 884_736, None),
    ("DoRA q, v", {"target_modules": ["q", "v"], "use_dora": True}, 608_256, 94_343_728),
    ("DoRA q, k, v", {"target_modules": ["q", "k", "v"], "use_dora": True}, 912_384, 94_647_856),
)


def compare(ours, theirs, processor, image, scene: Scene):
    """Print the largest differences between two models' outputs.

    Args:
        ours, theirs: SamSplitModel and SamModel, in float32.
        processor: SamProcessor for both.
        image: (height, width, 3) bytes.
        scene: the prompts.

    Returns:
        The names of outputs that differ by more than `LIMIT` of the largest value, and a `View` for each prompt,
        of the mask with the highest score.
    """
    import torch

    prompts: dict[str, dict] = {
        "point": {"input_points": [[[scene.point]]]},
        "box": {"input_boxes": [[list(scene.box)]]},
    }
    rows, views = [], []
    embeddings = {}
    inputs = {name: _inputs(processor, image, **prompt) for name, prompt in prompts.items()}
    with torch.no_grad():
        for side, model in (("SamModel", theirs), ("SamSplitModel", ours)):
            start = time.perf_counter()
            embeddings[side] = model.get_image_embeddings(inputs["point"]["pixel_values"])
            say(f"{side} encoded the image in {time.perf_counter() - start:.1f} s")
        rows.append(_difference("image embedding", embeddings["SamSplitModel"], embeddings["SamModel"]))
        for name, prompt in inputs.items():
            prompt = {key: value for key, value in prompt.items() if key.startswith("input_")}
            left = ours(image_embeddings=embeddings["SamSplitModel"], **prompt)
            right = theirs(image_embeddings=embeddings["SamModel"], **prompt)
            rows.append(_difference(f"masks, {name}", left.pred_masks, right.pred_masks))
            rows.append(_difference(f"IoU scores, {name}", left.iou_scores, right.iou_scores))
            best = int(right.iou_scores[0, 0].argmax())
            logits = (_upscaled(processor, side.pred_masks, inputs[name])[best] for side in (right, left))
            views.append(View(name, best, right.iou_scores[0, 0, best].item(), *logits))
    _table(("output", "largest value", "difference", "relative", f"limit {LIMIT:g}"), rows)
    return [row[0] for row in rows if row[-1] != "ok"], views


def _inputs(processor, image, **prompt):
    inputs = processor(image, **prompt, return_tensors="pt")
    return {key: value.float() if key in ("input_points", "input_boxes") else value for key, value in inputs.items()}


def _upscaled(processor, masks, inputs):
    """Logits (1, 1, M, 4 * H, 4 * W) resized to the image, (M, height, width)."""
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    return processor.post_process_masks(masks, *sizes, binarize=False)[0][0]


def _difference(name, ours, theirs) -> tuple[str, ...]:
    largest, difference = theirs.abs().max().item(), (ours - theirs).abs().max().item()
    passed = 0 < largest and difference <= LIMIT * largest  # false for NaN
    return name, f"{largest:.4g}", f"{difference:.2g}", f"{difference / (largest or 1):.2g}", _mark(passed)


def count_adapters(model) -> list[str]:
    """Print the model's parameter counts with each adapter and the published counts.

    The model is left without an adapter. Returns the names of the rows that differ.
    """
    from peft import LoraConfig, get_peft_model

    known = count(model) == BASE_PARAMETERS
    rows = [_counted("no adapter", 0, count(model), 0, BASE_PARAMETERS, known)]
    for name, options, published_trainable, published_total in PUBLISHED:
        adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, lora_dropout=0.1, **options))
        trainable, total = adapted.get_nb_trainable_parameters()
        rows.append(_counted(name, trainable, total, published_trainable, published_total, known))
        adapted.unload()
    _table(("adapter", "trainable", "published", "all parameters", "published", ""), rows)
    if not known:
        say(f"the published counts are for ViT-B, {BASE_PARAMETERS:,} parameters; this model has another size")
    return [row[0] for row in rows if known and row[-1] != "ok"]


def _counted(name, trainable, total, published_trainable, published_total, known) -> tuple[str, ...]:
    published = (published_trainable, published_total) if known else (None, None)
    passed = all(want in (None, have) for have, want in zip((trainable, total), published, strict=True))
    shown = ["-" if want is None else f"{want:,}" for want in published]
    return name, f"{trainable:,}", shown[0], f"{total:,}", shown[1], _mark(passed) if known else "-"


def train_one_step(model, processor, image, box, folder: Path) -> list[str]:
    """Train q and v of a model for one step, and print which weights changed.

    Args:
        model: SamSplitModel in float32.
        processor: its SamProcessor.
        image: (height, width, 3) bytes.
        box: (x0, y0, x1, y1) in it.
        folder: the model's folder. The base weights must still equal its file bit for bit.

    Returns:
        The names of the rows that failed.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    adapted = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=32, target_modules=["q", "v"], lora_dropout=0.1)
    ).train()
    inputs = _inputs(processor, image, input_boxes=[[list(box)]])
    inputs = {"pixel_values": inputs["pixel_values"], "input_boxes": inputs["input_boxes"]}
    inputs["labels"] = ellipse(inputs["input_boxes"][0, 0], tuple(inputs["pixel_values"].shape[-2:]))
    trainable = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)

    start = time.perf_counter()
    before = adapted(**inputs).loss
    before.backward()
    optimizer.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        after = adapted.eval()(**inputs).loss
    before, after = before.item(), after.item()

    trained = dict(adapted.named_parameters())
    moved = [name for name, initial in trainable.items() if not torch.equal(trained[name], initial)]
    # The first step leaves lora_A as it is: lora_B is zero, so the gradient of lora_A is zero too.
    expected = [name for name in trainable if ".lora_B." in name]
    changed = _changed_base(trained, folder)
    rows = [
        ("loss", f"{before:.6f} before the step, {after:.6f} after it", _mark(after < before)),
        (
            "LoRA on q and v",
            f"{len(moved)} of {len(expected)} matrices B moved",
            _mark(sorted(moved) == sorted(expected)),
        ),
        ("base weights", f"{len(changed)} changed", _mark(not changed)),
        ("time", f"{seconds:.1f} s forward and backward, {torch.get_num_threads()} threads", ""),
        ("memory", _peak_memory(), ""),
    ]
    _table((), rows)
    return [row[0] for row in rows if row[-1] == "FAIL"]


def ellipse(box, size: tuple[int, int]):
    """Labels (1, 1, height, width), 1 inside the ellipse that fills a box.

    Args:
        box: (4,), (x0, y0, x1, y1) in pixels.
        size: (height, width).
    """
    import torch

    (x0, y0, x1, y1), (height, width) = box.tolist(), size
    x = (2 * torch.arange(width) + 1 - x0 - x1) / (x1 - x0)  # -1 to 1 between the sides of the box
    y = (2 * torch.arange(height) + 1 - y0 - y1) / (y1 - y0)
    return (x**2 + y[:, None] ** 2 <= 1).long()[None, None]


def _changed_base(parameters, folder: Path) -> list[str]:
    """Names of base weights that differ from the model folder's file."""
    import torch
    from safetensors import safe_open

    changed = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            stored = {name: weights.get_tensor(name).float() for name in weights.keys()}
        for name, parameter in parameters.items():
            base = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if base in stored and not torch.equal(parameter, stored[base]):
                changed.append(base)
    return changed


def _peak_memory() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return "not measured on this system"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB, over all steps"


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _mark(passed: bool) -> str:
    return "ok" if passed else "FAIL"


def step(number: int, text: str) -> None:
    print(f"\n[{number}/7] {text}", flush=True)


def say(text: str) -> None:
    print(text if text.startswith("\n") else f"      {text}", flush=True)


def _table(header, rows) -> None:
    """Aligned columns: the first one left, numbers right; without a header all columns are text, aligned left."""
    lines = [row for row in (header, *rows) if row]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = [
            cell.ljust(width) if column == 0 or not header else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        say("  ".join(cells).rstrip())
