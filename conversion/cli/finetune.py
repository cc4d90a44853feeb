"""`sam-split finetune`: an adapter from images and masks."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from ..errors import CheckFailed, ConversionError
from .parser import add_command, add_data_options, add_quiet, at_least, check_installed, say_next, share

FINETUNE = """\
Train an adapter of BASE on images and the masks of their objects, and see how masks change.

BASE is what `sam-split convert` made. DATA is one of
  a folder with images/NAME.png (or .jpg) and masks/NAME.png (or .tif; 8 or 16 bits), 0 for background,
  another value per object
  a folder with images/ and COCO's annotations.json (polygons or run lengths; crowds count as void)
  a Hugging Face dataset, a saved one or its Hub id, with columns of images and of such masks
Images have 8 bits per channel. All are read once before training: one that cannot be used ends the run, or is left out
with --skip-bad.

Each step is prompted as a person prompts: with a rough box and with one click on each object, with clicks that correct
the masks that came out, and with clicks on background, whose masks are worth nothing.

At the end BASE and the adapter are measured on held-out images: IoU from the box, from 1 and from 3 clicks, and
everything-mode. OUT gets adapter/ with its card, results.json, overlays/index.html (masks before and after, the worst
images first) and checkpoints/. Several presets run one after the other, each in OUT/PRESET, and end in one table. A
run that was stopped goes on with --resume.

The presets name what the adapter changes:
  encoder          q and v of the image encoder; predicted IoUs change only as far as the image embedding does
  encoder-qkv      q, k and v of the image encoder, likewise
  late             q and v of its last layers; what the frozen ones compute is kept in files
  decoder          the mask decoder's attention and MLPs, and the heads that make masks and predict their IoU; what the
                   image encoder computes is kept in files
  encoder+decoder  what encoder and decoder change
  dora             what encoder changes, by DoRA
Everything-mode keeps masks by their predicted IoU: only decoder and encoder+decoder can teach what masks are worth.

Several processes: torchrun --nproc-per-node 2 --no-python sam-split finetune ..., or
accelerate launch --multi_gpu --num_processes 2 --no_python sam-split finetune ...
"""
PRESETS = ("encoder", "encoder-qkv", "late", "decoder", "encoder+decoder", "dora")


def add_parser(subparsers) -> None:
    parser = add_command(
        subparsers,
        "finetune",
        run,
        help="train an adapter on images and masks",
        description=FINETUNE,
        example="sam-split finetune sam-split-vit-base cells/train cells-adapter --val cells/test\n"
        "sam-split finetune sam-split-vit-base cells out --preset encoder decoder --batch 1 --accumulate 8",
        positionals={
            "BASE": "a SamSplit folder or Hub id",
            "DATA": "a folder of images and masks, or a Hugging Face dataset",
            "OUT": "folder to make",
        },
    )
    data = parser.add_argument_group("data")
    data.add_argument("--val", help="images to test on, in the form of DATA (default: a part of DATA)")
    data.add_argument("--holdout", type=share(ends=False), default=0.2, help="that part (%(default)s)")
    add_data_options(data)
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument(
        "--preset", nargs="+", choices=PRESETS, default=["encoder+decoder"], help="one or several (encoder+decoder)"
    )
    adapter.add_argument(
        "--rank", type=at_least(1, most=1024), default=16, help="of the change of each layer (%(default)s)"
    )
    adapter.add_argument("--late-layers", type=at_least(1), default=3, help="layers that late trains (%(default)s)")
    adapter.add_argument("--cache", help="folder where late and decoder keep what frozen layers compute (OUT/cache)")
    adapter.add_argument("--revision", help="of BASE on the Hub")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--prompts", choices=("box", "points", "mixed"), default="mixed", help="a step's first: mixed has both (mixed)"
    )
    prompts.add_argument("--corrections", type=at_least(0), default=1, help="correcting clicks, at most (%(default)s)")
    prompts.add_argument(
        "--background",
        type=at_least(0),
        default=4,
        help="clicks on an image's background beside single clicks (%(default)s); 0 if not every object has a mask",
    )
    prompts.add_argument("--objects", type=at_least(1), default=8, help="of an image in a step (%(default)s)")
    steps = parser.add_argument_group("training")
    steps.add_argument(
        "--focal",
        type=at_least(0, float),
        default=0,
        help="weight of the focal loss beside Dice (0: edges stay steep, as everything-mode needs; SAM's own was 20)",
    )
    steps.add_argument("--epochs", type=at_least(0, float), default=10, help="times that each image is seen (10)")
    steps.add_argument("--steps", type=at_least(1), help="instead of epochs")
    steps.add_argument("--batch", type=at_least(1), default=2, help="images at once (%(default)s)")
    steps.add_argument("--accumulate", type=at_least(1), default=1, help="batches in a step (%(default)s)")
    steps.add_argument("--lr", type=at_least(0, float), default=1e-3, help="learning rate (%(default)s)")
    steps.add_argument(
        "--patience", type=at_least(0), default=0, help="stop after this many epochs without gain (%(default)s: never)"
    )
    steps.add_argument("--checkpointing", action="store_true", help="less memory, more time")
    steps.add_argument("--bf16", action="store_true", help="compute in bfloat16; the adapter stays in float32")
    steps.add_argument("--seed", type=at_least(0), default=0, help="of all that is random (%(default)s)")
    steps.add_argument(
        "--deterministic", action="store_true", help="the same adapter, bit for bit, in every run; slower"
    )
    steps.add_argument(
        "--save-steps", type=at_least(1), help="a checkpoint every so many steps, beside that of each epoch"
    )
    steps.add_argument("--resume", action="store_true", help="from OUT's last checkpoint, if there is one")
    report = parser.add_argument_group("report")
    report.add_argument(
        "--no-everything",
        dest="everything",
        action="store_false",
        help="evaluate without everything-mode, the slowest part",
    )
    report.add_argument(
        "--report-to", nargs="+", default=[], metavar="TRACKER", help="of transformers: tensorboard, wandb, ..."
    )
    add_quiet(report)


def run(args) -> int | None:
    is_new = not Path(args.out).exists()
    try:
        return _run_one(args) if len(args.preset) == 1 else _run_each(args)
    except KeyboardInterrupt:
        kept = any(Path(args.out).glob("**/checkpoint-*"))
        rest = "the same command with --resume goes on" if kept else "before the first checkpoint, nothing was kept"
        print(f"sam-split: error: interrupted; {rest}", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        for folder in (Path(args.out) / "checkpoints", Path(args.out)) if is_new else ():
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing is in it


def _run_one(args):
    check_installed("finetune", "accelerate", "matplotlib", "PIL", "pycocotools", "scipy", "torchvision")
    from sam_split.training.finetuning import finetune
    from sam_split.training.trainer import TrainingDiverged

    if any((Path(args.out) / preset / "checkpoints").exists() for preset in PRESETS):
        raise ConversionError(f"{args.out} holds runs of several presets; name another OUT, or the same presets")

    try:
        results = finetune(args.base, args.data, args.out, settings_of(args, args.preset[0]))
    except TrainingDiverged as error:
        raise CheckFailed(str(error)) from error
    except ValueError as error:
        raise ConversionError(str(error)) from error
    if results is None:  # not the main process
        return
    adapter = str(Path(args.out) / "adapter")
    print(f"wrote {args.out}; look at {args.out}/overlays/index.html")
    say_next(
        ["sam-split", "evaluate", args.base, args.val or "DATA", "--adapter", adapter, "--out", "RESULTS"],
        ["sam-split", "segment", args.base, "IMAGES", "MASKS", "--adapter", adapter],
        ["sam-split", "merge", args.base, adapter, "MERGED"],
    )


def settings_of(args, preset):
    from sam_split.training.settings import Settings

    given = {name: value for name, value in vars(args).items() if name not in ("run", "base", "data", "out")}
    return Settings(**{**given, "preset": preset, "report_to": tuple(args.report_to)})


def _run_each(args):
    """One preset after the other, each in a process of its own, or the memory of one would count for the next."""
    if len(set(args.preset)) < len(args.preset):
        raise ConversionError(f"--preset names one twice: {' '.join(args.preset)}; leave one out")
    if "WORLD_SIZE" in os.environ:
        raise ConversionError("several presets run one after the other; with several processes, name one --preset")
    if (Path(args.out) / "checkpoints").exists():
        raise ConversionError(f"{args.out} holds the run of one preset; name another OUT, or that preset")
    from sam_split.training.report import presets_table

    runs = []
    for preset in args.preset:
        out = Path(args.out) / preset
        command = settings_of(args, preset).command(args.base, args.data, out)
        if code := subprocess.run([sys.executable, "-m", "conversion", *command[1:]]).returncode:
            return code  # it has said why
        runs.append(json.loads((out / "results.json").read_text(encoding="utf-8")))
    table = presets_table(runs)
    (Path(args.out) / "results.md").write_text(table + "\n", encoding="utf-8")
    print(table)
