"""The main job end to end, `sam-split demo`: convert a checkpoint, load it, compare it with stock, adapt it, draw."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic import check_out, new_folder
from ..errors import CheckFailed, ConversionError
from .parser import add_command

if TYPE_CHECKING:
    import torch

DEMO = """\
The main job, end to end, on a photograph that scikit-image ships. Seconds for the tiny SAM, minutes and 5 GB of memory
for ViT-B.

  1  take a checkpoint with fused qkv layers
  2  convert it, as `sam-split convert` does
  3  load the result through AutoModel.from_pretrained(..., trust_remote_code=True)
  4  compare every output with transformers' SamModel
  5  count the trainable parameters of LoRA and DoRA adapters beside the published figures
  6  train one LoRA step on q and v
  7  draw the masks of both models

SOURCE is a Hub id or a transformers folder. Without it the tiny SAM is taken that comes with this package, 0.5 million
weights trained on generated shapes, so nothing is downloaded; step 5 then counts on ViT-B's shapes.

OUT is a new folder with what was made: split/ (the converted model) and demo.png.
The exit code is 1 if a difference or a count is not what it should be.
"""

LIMIT = 1e-5  # of the largest output, as in `sam-split verify`
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

TINY_SAM = Path(__file__).parent / "tiny_sam"


@dataclass(frozen=True)
class Scene:
    """A photograph of skimage.data, and what to ask for.

    Args:
        name: of the function there.
        point: (x, y) in pixels of the part that is shown.
        box: (x0, y0, x1, y1), the same.
        part: rows and columns to show.
    """

    name: str
    point: tuple[int, int]
    box: tuple[int, int, int, int]
    part: tuple[slice, slice] = (slice(None), slice(None))

    def photograph(self):
        """(height, width, 3) bytes."""
        try:
            import matplotlib  # noqa: F401
            from skimage import color, data
        except ImportError as error:
            raise ConversionError(
                f'the demo needs {error.name}, which is not installed: pip install "sam-split[demo]"'
            ) from error
        photograph = getattr(data, self.name)()[self.part]
        return color.gray2rgb(photograph) if photograph.ndim == 2 else photograph


# The cup, and the saucer with all that stands on it. CC0, Rachel Michetti.
COFFEE = Scene("coffee", point=(290, 180), box=(78, 5, 482, 388))
# One of some Greek coins from Pompeii, as large as the shapes that the tiny SAM knows. Public domain, Brooklyn Museum.
COINS = Scene("coins", point=(62, 62), box=(39, 40, 85, 85), part=(slice(133, 261), slice(40, 168)))


@dataclass(frozen=True)
class View:
    """What both models make of one prompt.

    Args:
        prompt: "point" or "box".
        mask: number of the mask, from 0.
        score: IoU that stock predicts for it.
        theirs, ours: (height, width) of the photograph, its logits.
    """

    prompt: str
    mask: int
    score: float
    theirs: "torch.Tensor"
    ours: "torch.Tensor"


def add_parser(subparsers) -> None:
    parser = add_command(
        subparsers,
        "demo",
        run,
        help="convert, load, compare, adapt and draw, on a photograph; downloads nothing",
        description=DEMO,
        example="sam-split demo\nsam-split demo --source facebook/sam-vit-base --out sam-vit-base-demo",
        positionals={},
    )
    parser.add_argument("--source", help="Hub id or transformers folder (default: the tiny SAM of this package)")
    parser.add_argument("--out", default="sam-split-demo", help="folder to make (default: %(default)s)")


def run(args) -> None:
    """Make `args.out`, whole or not at all, then fail if a check did.

    Raises:
        ConversionError: if `args.source` is no fused transformers checkpoint, or `args.out` exists.
        CheckFailed: if a difference or a count is not what it should be; `args.out` is there to be looked at.
    """
    if args.source == "":
        raise ConversionError("--source is empty; name a Hub id or a transformers folder, or leave it out")
    scene = COFFEE if args.source else COINS
    photograph = scene.photograph()
    with new_folder(check_out(args.out, args.source)) as folder:
        failed = _demo(args.source, folder, scene, photograph, args.out)
    _say(f"\nwrote {args.out}: split/ is the converted model, demo.png shows what both models draw")
    if failed:
        raise CheckFailed(f"not as expected: {', '.join(failed)}; {args.out} is kept to be looked at")


def _demo(source, folder, scene, photograph, shown) -> list[str]:
    """All steps. Returns the names of what failed."""
    import torch
    from transformers import AutoModel, AutoProcessor, SamModel

    from sam_split import SamSplitConfig, SamSplitModel

    from ..checkpoints import convert

    name = str(source or "a tiny SAM, trained on generated shapes")
    _step(1, f"a fused checkpoint: {name}")
    if source and Path(source).is_file():
        raise ConversionError(
            f"{source} is a file, and the comparison needs a Hub id or a transformers folder; for a .pth use "
            "`sam-split convert` and `sam-split verify`"
        )

    _step(2, f"sam-split convert, into {shown}/split")
    convert(source or TINY_SAM, folder / "split", progress=sys.stderr.isatty())

    _step(3, f"AutoModel.from_pretrained('{shown}/split', trust_remote_code=True)")
    ours = AutoModel.from_pretrained(folder / "split", trust_remote_code=True).float().eval()
    _say(f"{type(ours).__name__} of {type(ours).__module__.split('.')[0]}, {_count(ours):,} parameters")

    _step(4, f"outputs beside transformers' SamModel; photograph `{scene.name}`, {_size(photograph)}")
    theirs = SamModel.from_pretrained(source or TINY_SAM).float().eval()
    processor = AutoProcessor.from_pretrained(folder / "split")
    failed, views = compare(ours, theirs, processor, photograph, scene)
    del theirs

    _step(5, f"parameters with adapters of rank {RANK} from PEFT")
    if source:
        failed += count_adapters(ours)
    else:
        with torch.device("meta"):
            failed += count_adapters(SamSplitModel(SamSplitConfig()))
        _say("counted on ViT-B's shapes; the tiny SAM has none of its weights")

    _step(6, "one LoRA step on q and v: lora_alpha 32, lora_dropout 0.1, AdamW 1e-3; target: an ellipse in the box")
    failed += train_one_step(ours, processor, photograph, scene.box, folder / "split")

    _step(7, f"the picture, {shown}/demo.png")
    draw(folder / "demo.png", photograph, scene, views, name)
    return failed


def compare(ours, theirs, processor, photograph, scene: Scene):
    """Print the largest differences between two models' outputs.

    Args:
        ours, theirs: SamSplitModel and SamModel, in float32.
        processor: SamProcessor for both.
        photograph: (height, width, 3) bytes.
        scene: what to ask for.

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
    inputs = {name: _inputs(processor, photograph, **prompt) for name, prompt in prompts.items()}
    with torch.no_grad():
        for side, model in (("SamModel", theirs), ("SamSplitModel", ours)):
            start = time.perf_counter()
            embeddings[side] = model.get_image_embeddings(inputs["point"]["pixel_values"])
            _say(f"{side} encoded the photograph in {time.perf_counter() - start:.1f} s")
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


def _inputs(processor, photograph, **prompt):
    inputs = processor(photograph, **prompt, return_tensors="pt")
    return {key: value.float() if key in ("input_points", "input_boxes") else value for key, value in inputs.items()}


def _upscaled(processor, masks, inputs):
    """Logits (1, 1, M, 4 * H, 4 * W) at the size of the photograph, (M, height, width)."""
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    return processor.post_process_masks(masks, *sizes, binarize=False)[0][0]


def _difference(name, ours, theirs) -> tuple[str, ...]:
    largest, difference = theirs.abs().max().item(), (ours - theirs).abs().max().item()
    passed = 0 < largest and difference <= LIMIT * largest  # false for NaN
    return name, f"{largest:.4g}", f"{difference:.2g}", f"{difference / (largest or 1):.2g}", _mark(passed)


def count_adapters(model) -> list[str]:
    """Print parameters of the model with each adapter beside the published figures.

    The adapters are taken off again. Returns the names of the rows that disagree.
    """
    from peft import LoraConfig, get_peft_model

    known = _count(model) == BASE_PARAMETERS
    rows = [_counted("no adapter", 0, _count(model), 0, BASE_PARAMETERS, known)]
    for name, options, published_trainable, published_total in PUBLISHED:
        adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, lora_dropout=0.1, **options))
        trainable, total = adapted.get_nb_trainable_parameters()
        rows.append(_counted(name, trainable, total, published_trainable, published_total, known))
        adapted.unload()
    _table(("adapter", "trainable", "published", "all parameters", "published", ""), rows)
    if not known:
        _say(f"published figures are for ViT-B, {BASE_PARAMETERS:,} parameters; this model has another size")
    return [row[0] for row in rows if known and row[-1] != "ok"]


def _counted(name, trainable, total, published_trainable, published_total, known) -> tuple[str, ...]:
    published = (published_trainable, published_total) if known else (None, None)
    passed = all(want in (None, have) for have, want in zip((trainable, total), published, strict=True))
    shown = ["-" if want is None else f"{want:,}" for want in published]
    return name, f"{trainable:,}", shown[0], f"{total:,}", shown[1], _mark(passed) if known else "-"


def train_one_step(model, processor, photograph, box, folder: Path) -> list[str]:
    """Train q and v of a model for one step, and print what moved.

    Args:
        model: SamSplitModel in float32.
        processor: its SamProcessor.
        photograph: (height, width, 3) bytes.
        box: (x0, y0, x1, y1) in it.
        folder: the model's folder, whose weights the base weights must still equal bit for bit.

    Returns:
        The names of what is not as it should be.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    adapted = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=32, target_modules=["q", "v"], lora_dropout=0.1)
    ).train()
    inputs = _inputs(processor, photograph, input_boxes=[[list(box)]])
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

    now = dict(adapted.named_parameters())
    moved = [name for name, was in trainable.items() if not torch.equal(now[name], was)]
    # lora_A keeps its values in the first step: lora_B starts at zero, and so does the gradient of lora_A.
    wanted = [name for name in trainable if ".lora_B." in name]
    changed = _changed_base(now, folder)
    rows = [
        ("loss", f"{before:.6f} before the step, {after:.6f} after it", _mark(after < before)),
        ("LoRA on q and v", f"{len(moved)} of {len(wanted)} matrices B moved", _mark(sorted(moved) == sorted(wanted))),
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
    """Names of base weights that no longer equal a model folder's file."""
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
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB at most, over all steps"


def draw(path: Path, photograph, scene: Scene, views: list[View], name: str) -> None:
    """One row per prompt: the photograph with it, the mask of both models, and how far their logits are apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    largest = max(view.theirs.abs().max().item() for view in views)
    height, width = photograph.shape[:2]
    panel = 3.6  # inches
    figure, axes = plt.subplots(
        len(views),
        4,
        figsize=(4 * panel + 0.9, len(views) * (panel * height / width + 0.3) + 0.4),
        layout="constrained",
        squeeze=False,
    )
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.04, wspace=0.01, hspace=0.02)
    figure.suptitle(f"SamSplit beside transformers' SamModel — {name}", x=0.008, ha="left", fontsize=14)
    for row, view in zip(axes, views, strict=True):
        row[0].imshow(photograph)
        _draw_prompt(row[0], scene, view.prompt)
        row[0].set_title(f"{view.prompt}: mask {view.mask}, IoU score {view.score:.3f}", loc="left", fontsize=11)
        for axis, label, logits in ((row[1], "SamModel", view.theirs), (row[2], "SamSplitModel", view.ours)):
            inside = (logits > 0).numpy()
            _draw_mask(axis, photograph, inside)
            _draw_prompt(axis, scene, view.prompt)
            axis.set_title(f"{label}: {inside.mean():.1%} inside", loc="left", fontsize=11)
        gap = (view.ours - view.theirs).abs()
        shown = row[3].imshow(gap, vmin=0, vmax=LIMIT * largest, cmap="magma")
        row[3].set_title(f"difference of logits: {gap.max():.1e} at most", loc="left", fontsize=11)
    for axis in axes.flat:
        axis.set_axis_off()
    bar = figure.colorbar(shown, ax=axes[:, 3], aspect=40, pad=0.02, ticks=[0, LIMIT * largest])
    bar.ax.set_yticklabels(["0", f"{LIMIT * largest:.1e}"], fontsize=10)
    bar.set_label(f"up to {LIMIT:g} of the largest logit", fontsize=10, labelpad=-28)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_mask(axis, photograph, inside) -> None:
    """The photograph tinted inside the mask, pale grey outside, with a line between."""
    grey = photograph.mean(-1, keepdims=True)
    tinted = 0.75 * photograph + [0, 50, 60]
    axis.imshow((inside[..., None] * tinted + ~inside[..., None] * (0.35 * grey + 160)).clip(0, 255).astype("uint8"))
    if inside.any() and not inside.all():
        axis.contour(inside, levels=[0.5], colors="#0050d0", linewidths=0.7)


def _draw_prompt(axis, scene: Scene, prompt: str) -> None:
    from matplotlib.patches import Rectangle

    if prompt == "point":
        axis.plot(*scene.point, marker="*", markersize=16, color="#30e060", markeredgecolor="black")
    else:
        x0, y0, x1, y1 = scene.box
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, linewidth=2, edgecolor="#30e060"))


def _count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _size(photograph) -> str:
    return f"{photograph.shape[1]} x {photograph.shape[0]}"


def _mark(passed: bool) -> str:
    return "ok" if passed else "FAIL"


def _step(number: int, text: str) -> None:
    print(f"\n[{number}/7] {text}", flush=True)


def _say(text: str) -> None:
    print(text if text.startswith("\n") else f"      {text}", flush=True)


def _table(header, rows) -> None:
    """Aligned columns: numbers to the right, the first column and text to the left."""
    lines = [row for row in (header, *rows) if row]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = [
            cell.ljust(width) if column == 0 or not header else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        _say("  ".join(cells).rstrip())
