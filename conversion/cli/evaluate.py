"""`sam-split evaluate`: how good a model's masks are on a person's images, and where it fails."""

import sys
from pathlib import Path

from ..errors import ConversionError
from .parser import add_command, add_data_options, add_quiet, check_installed, say_next

EVALUATE = """\
Measure the masks of MODEL on DATA, images and the masks of their objects that people made.

MODEL is a split folder, or any other checkpoint that `sam-split convert` reads. DATA is, as for `sam-split finetune`,
  a folder with images/NAME.png (or .jpg) and masks/NAME.png (or .tif; 8 or 16 bits), 0 for background,
  another value per object
  a folder with images/ and COCO's annotations.json (polygons or run lengths)
  a Hugging Face dataset, a saved one or its Hub id, with columns of images and of such masks

The table has
  IoU from the box, 1 click, 3 clicks   means over objects. The first click is in the middle of the object, the others
                                        in the middle of what is wrong. Of one click's three masks the model chooses
  everything-mode                       at its default thresholds: AR@100 as COCO defines it, the share of objects
                                        found at IoU 0.5, and masks per image
  error of the predicted IoU            the mean difference to the true IoU

With --adapter the base is measured as well, or what --against names: another model, or another adapter of MODEL.

--out makes a folder with
  index.html     the worst images with their masks, and each image's gain; open it in a browser
  results.json   all numbers, those of each image as well; results.md has the table
"""


def add_parser(subparsers) -> None:
    parser = add_command(
        subparsers,
        "evaluate",
        run,
        help="how good masks are on images of yours, before and after; where they fail",
        description=EVALUATE,
        example="sam-split evaluate sam-split-vit-base cells/test --no-everything\n"
        "sam-split evaluate sam-split-vit-base cells/test --adapter cells-adapter/adapter --out cells-results\n"
        "sam-split evaluate sam-split-vit-base cells/test --adapter mine/adapter --against yours/adapter",
        positionals={
            "MODEL": "split folder, Hub id, or a checkpoint in any format",
            "DATA": "a folder of images and masks, or a Hugging Face dataset",
        },
    )
    parser.add_argument("--adapter", help="PEFT folder or Hub id, merged into MODEL in memory")
    parser.add_argument("--against", help="what to compare with: a model, or an adapter of MODEL (default: the base)")
    parser.add_argument("--out", help="folder to make (default: the table is printed, nothing is written)")
    parser.add_argument(
        "--no-everything",
        dest="everything",
        action="store_false",
        help="leave out everything-mode, the slowest part",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda where there is one, else cpu)")
    add_quiet(parser)
    add_data_options(parser.add_argument_group("data"))


def run(args) -> None:
    check_installed("evaluate", "matplotlib", "PIL", "pycocotools", "scipy", "torchvision")

    from sam_split.training import evaluation_table, find_examples

    from ..atomic import check_out

    out = None if args.out is None else check_out(args.out, args.model, args.adapter, args.against)
    models = _models(args)
    loaded = {name: _load(source, adapter, args.device) for name, (source, adapter) in models.items()}
    try:
        examples = find_examples(args.data, args.split, args.image_column, args.mask_column).usable(args.skip_bad)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    evaluations = {}
    for name, (model, processor, _) in loaded.items():
        if len(models) > 1 and not args.quiet:
            print(f"{name}:", file=sys.stderr)
        evaluations[name] = _evaluate(model, processor, examples, args)
    table = evaluation_table(evaluations)
    if out is not None:
        about = {
            name: {"model": source, "adapter": adapter, "weights": loaded[name][2]}
            for name, (source, adapter) in models.items()
        }
        _write(out, args, examples, about, evaluations, table)
    print(table)
    print(f"look at {args.out}/index.html" if out else "to see where it fails, add --out FOLDER")
    if args.adapter is not None:
        say_next(["sam-split", "merge", args.model, args.adapter, "MERGED"])


def _models(args) -> dict:
    """Name -> source and adapter of what is measured; what it is compared with comes first."""
    from ..sources import fetch

    measured = [(args.model, args.adapter)]
    if args.against is not None:
        adapted = (
            not Path(args.against).is_file()
            and (fetch(args.against, None, ["config.json", "adapter_config.json"]) / "adapter_config.json").is_file()
        )
        measured.insert(0, (args.model, args.against) if adapted else (args.against, None))
    elif args.adapter is not None:
        measured.insert(0, (args.model, None))
    if len(measured) == 2 and measured[0] == measured[1]:
        raise ConversionError(f"--against {args.against} is what is measured; name something else to compare it with")
    short = {_short(adapter or model): (model, adapter) for model, adapter in measured}
    if len(short) == len(measured):
        return short
    return {model + (f" + {adapter}" if adapter else ""): (model, adapter) for model, adapter in measured}


def _short(name: str) -> str:
    """A Hub id as it is; of a path the last part, or the last two where it is called `adapter`, as most are."""
    from hub_card.card import short_name

    return short_name(name) if Path(name).exists() else name


def _load(source, adapter, device):
    """The model, its image processor, and a digest of both."""
    from ..loading import image_processor, load_model, on_device

    model, settings, digest = load_model(source, adapter)
    return on_device(device, model), image_processor(settings), digest


def _evaluate(model, processor, examples, args):
    import torch

    from sam_split.training import evaluate

    try:
        return evaluate(
            model, processor, examples, everything=args.everything, progress=not args.quiet and sys.stderr.isatty()
        )
    except torch.OutOfMemoryError as error:
        raise ConversionError("an image does not fit into the device's memory; use --device cpu") from error
    except ValueError as error:
        raise ConversionError(str(error)) from error


def _write(out, args, examples, models, evaluations, table) -> None:
    from sam_split.training import overlay_page
    from sam_split.training.report import versions

    from ..atomic import new_folder
    from ..folder import write_json

    title = f"{list(evaluations)[-1]} on {args.data}"
    content = {
        "options": {name: value for name, value in vars(args).items() if name not in ("run", "quiet")},
        "versions": versions(),
        "data": {"source": args.data, "images": len(examples), "digest": examples.digest()},
        "models": models,
        "evaluations": {name: evaluation.as_dict() for name, evaluation in evaluations.items()},
    }
    with new_folder(out) as folder:
        write_json(folder / "results.json", content)
        (folder / "results.md").write_text(f"# {title}\n\n{table}\n", encoding="utf-8")
        overlay_page(folder, examples, evaluations, title=title)
