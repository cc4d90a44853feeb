"""`sam-split demo`, the main job end to end: convert a checkpoint, load it, compare with stock, train an adapter."""

import sys
from pathlib import Path

from ..errors import CheckFailed, ConversionError
from .parser import add_command, say_next

DEMO = """\
The main job, end to end, on an image that scikit-image ships. It takes seconds for the tiny SAM, and minutes and 5 GB
of memory for ViT-B.

  1  take a checkpoint with fused qkv layers
  2  convert it, as `sam-split convert` does
  3  load the result through AutoModel.from_pretrained(..., trust_remote_code=True)
  4  compare every output with transformers' SamModel, and segment everything in the whole photograph
  5  count the trainable parameters of LoRA and DoRA adapters, and compare with the published counts
  6  train one LoRA step on q and v
  7  plot the masks of both models, and everything-mode's

SOURCE is a Hub id or a transformers folder. The default is the tiny SAM in this package: 0.5 million parameters,
trained on generated shapes. Nothing is downloaded, and step 5 counts on ViT-B's shapes.

OUT is a new folder. It gets split/ (the converted model) and demo.png.
The exit code is 1 if an output or a count is wrong.
"""

TINY_SAM = Path(__file__).parent / "tiny_sam"


def add_parser(subparsers) -> None:
    parser = add_command(
        subparsers,
        "demo",
        run,
        help="convert, load, compare, train and plot on one image; downloads nothing",
        description=DEMO,
        example="sam-split demo\nsam-split demo --source facebook/sam-vit-base --out sam-vit-base-demo",
        positionals={},
    )
    parser.add_argument("--source", help="Hub id or transformers folder (default: the tiny SAM of this package)")
    parser.add_argument("--out", default="sam-split-demo", help="folder to make (default: %(default)s)")


def run(args) -> None:
    """Make `args.out`, whole or not at all, then fail if a check did.

    Raises:
        ConversionError: if `args.source` is not a fused transformers checkpoint, or `args.out` exists.
        CheckFailed: if an output or a count is wrong; `args.out` is kept.
    """
    from ..atomic import check_out, new_folder
    from .demo_checks import say
    from .demo_figure import COFFEE, COINS

    if args.source == "":
        raise ConversionError("--source is empty; name a Hub id or a transformers folder, or leave it out")
    scene = COFFEE if args.source else COINS
    image = scene.image()
    with new_folder(check_out(args.out, args.source)) as folder:
        failed = _demo(args.source, folder, scene, image, args.out)
    say(f"\nwrote {args.out}: split/ is the converted model, demo.png shows masks")
    if failed:
        raise CheckFailed(f"not as expected: {', '.join(failed)}; {args.out} is kept for inspection")
    say_next(["sam-split", "convert", "facebook/sam-vit-base", "sam-vit-base"])


def _demo(source, folder, scene, image, out) -> list[str]:
    """All steps. Returns the names of the checks that failed."""
    import torch
    from transformers import AutoModel, AutoProcessor, SamModel

    from sam_split import SamSplitConfig, SamSplitModel
    from sam_split.images_sam_split import pixels_of

    from ..checkpoints import convert
    from ..segmentation import masks_of
    from .demo_checks import RANK, compare, count, count_adapters, say, step, train_one_step
    from .demo_figure import plot

    name = str(source or "a tiny SAM, trained on generated shapes")
    step(1, f"a fused checkpoint: {name}")
    if source and Path(source).is_file():
        raise ConversionError(
            f"{source} is a file, and the comparison needs a Hub id or a transformers folder; for a .pth use "
            "`sam-split convert` and `sam-split verify`"
        )

    step(2, f"sam-split convert, into {out}/split")
    convert(source or TINY_SAM, folder / "split", progress=sys.stderr.isatty())

    step(3, f"AutoModel.from_pretrained('{out}/split', trust_remote_code=True)")
    ours = AutoModel.from_pretrained(folder / "split", trust_remote_code=True).float().eval()
    say(f"{type(ours).__name__} of {type(ours).__module__.split('.')[0]}, {count(ours):,} parameters")

    step(4, f"outputs compared with transformers' SamModel; image `{scene.name}`, {image.shape[1]} x {image.shape[0]}")
    theirs = SamModel.from_pretrained(source or TINY_SAM).float().eval()
    processor = AutoProcessor.from_pretrained(folder / "split")
    failed, views = compare(ours, theirs, processor, image, scene)
    del theirs
    found = masks_of(ours, scene.name, pixels_of(scene.photograph()), scene.everything)["annotations"]
    say(f"everything-mode, at its default thresholds, finds {len(found)} masks in the whole photograph")

    step(5, f"parameters with PEFT adapters of rank {RANK}")
    if source:
        failed += count_adapters(ours)
    else:
        with torch.device("meta"):
            failed += count_adapters(SamSplitModel(SamSplitConfig()))
        say("counted on ViT-B's shapes, without weights")

    step(6, "one LoRA step on q and v: lora_alpha 32, lora_dropout 0.1, AdamW 1e-3; target: the ellipse in the box")
    failed += train_one_step(ours, processor, image, scene.box, folder / "split")

    step(7, f"the figure, {out}/demo.png")
    plot(folder / "demo.png", image, scene, views, found, name)
    return failed
