"""`sam-split segment`: everything in many images, as one COCO json."""

import signal
import sys

from .parser import add_command, add_quiet, at_least, share

SEGMENT = """\
Segment everything in IMAGES: a grid of points over each image, and every good mask once.

MODEL is a split folder, or any other checkpoint that `sam-split convert` reads. It is computed in float32.
IMAGES are files, folders (with all below them) and patterns such as 'photos/**/*.jpg'. Photographs are turned upright
first, as their EXIF orientation says.

OUT is a folder, with
  annotations.json          all masks in COCO's format, as run lengths, with box, area and predicted IoU (score)
and, where asked for, named as the image is
  masks/NAME/0001.png ...   --format png: each mask alone, white inside, in the order of annotations.json
  labels/NAME.png           --format labels: 16 bits, 0 where no mask is, else the number of the smallest mask there
  overlays/NAME.jpg         --overlay: the image with its masks

A run that was stopped goes on when the command is repeated; a finished image is not done again. What is drawn may be
asked for later. annotations.json holds the images that the last command named.
"""


def add_parser(subparsers) -> None:
    parser = add_command(
        subparsers,
        "segment",
        run,
        help="everything in many images: masks as COCO json, label maps, overlays",
        description=SEGMENT,
        example="sam-split segment sam-split-vit-base photos masks --overlay\n"
        "sam-split segment tiny 'photos/*.jpg' more/photo.png masks --adapter coins-adapter/adapter --format labels",
        positionals={"MODEL": "split folder, Hub id, or a checkpoint in any format"},
    )
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="files, folders, patterns")
    parser.add_argument("out", metavar="OUT", help="folder to make, or to go on with")
    parser.add_argument("--adapter", help="PEFT folder or Hub id, merged into MODEL in memory")
    parser.add_argument("--format", choices=("coco", "png", "labels"), default="coco", help="what to write")
    parser.add_argument("--overlay", action="store_true", help="draw each image with its masks")
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda where there is one, else cpu)")
    add_quiet(parser)
    options = parser.add_argument_group("which masks (a run that goes on needs the same)")
    options.add_argument(
        "--points", metavar="N", type=at_least(1, most=1024), default=32, help="along a side of the grid (32)"
    )
    options.add_argument(
        "--crop-layers",
        metavar="N",
        type=at_least(0, most=8),
        default=0,
        help="repeat on 4, 16, ... crops: small objects",
    )
    options.add_argument(
        "--min-iou", metavar="X", type=share(ends=True), default=0.88, help="predicted IoU of a mask (0.88)"
    )
    options.add_argument(
        "--min-stability", metavar="X", type=share(ends=True), default=0.95, help="stability of a mask (0.95)"
    )
    options.add_argument(
        "--min-region", metavar="N", type=at_least(0), default=0, help="fill holes, drop islands of N pixels or fewer"
    )


def run(args) -> int | None:
    from ..segmentation import segment

    try:
        report = segment(
            args.model,
            args.images,
            args.out,
            adapter=args.adapter,
            format=args.format,
            overlay=args.overlay,
            skip_bad=args.skip_bad,
            device=args.device,
            progress=not args.quiet,
            points_per_crop=args.points,
            crops_n_layers=args.crop_layers,
            pred_iou_thresh=args.min_iou,
            stability_score_thresh=args.min_stability,
            max_hole_area=args.min_region,
            max_sprinkle_area=args.min_region,
        )
    except KeyboardInterrupt:
        print(
            "sam-split: error: interrupted; the same command goes on, no finished image is done again", file=sys.stderr
        )
        return 128 + signal.SIGINT
    if not report.segmented and not report.drawn:
        print("nothing to do: every image was finished before")
    print(f"{args.out}/annotations.json: {_count(report.masks, 'mask')} of {_count(report.images, 'image')}")
    print(f"file names in it start from {report.root}")
    if not report.masks:
        print("no mask passed; lower --min-iou or --min-stability, and name another folder")
    for name in report.skipped:
        print(f"left out, because it cannot be read: {name}")
    if args.format != "coco":
        print(f"{args.out}/{'masks' if args.format == 'png' else 'labels'}: {_count(report.images, 'image')}")
    if args.overlay:
        print(f"look at {args.out}/overlays")
    else:
        print("to look at the masks, add --overlay to the same command")
    return None


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
