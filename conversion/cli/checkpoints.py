"""`sam-split convert`, `fuse` and `verify`: whole checkpoints."""

from ..errors import CheckFailed
from . import push
from .parser import add_command, add_quiet, say_next

CONVERT = """\
Split the fused qkv layers of a Segment Anything checkpoint, so that PEFT finds q, k and v.

SOURCE is one of
  facebook/sam-vit-base     a Hub id (the download is cached)
  path/to/folder            a transformers folder: model.safetensors or pytorch_model.bin, sharded or not
  sam_vit_b_01ec64.pth      a checkpoint of Meta's code, or one fine-tuned with it

OUT is a new folder. It appears when every tensor in it has been compared with SOURCE bit for bit, or not at all, and
loads with
  AutoModel.from_pretrained("OUT", trust_remote_code=True)
"""

FUSE = """\
Turn a SamSplit folder back into what other tools read, bit for bit.

  --format transformers     OUT is a folder for stock SamModel
  --format meta             OUT is a .pth for segment_anything's sam_model_registry
"""

VERIFY = """\
Check that two checkpoints hold the same model: configs, every tensor bit for bit, then the outputs on a fixed image.

A and B are split folders, transformers folders, .pth files or Hub ids, in any combination. The first difference is
named and the exit code is 1.

With --json, stdout holds one JSON object and nothing else: "same" (true or false) and "rows", a list of objects with
"compared", "result" and "passed". It is empty, and the exit code is 2, where A or B is no checkpoint.
"""


def add_parsers(subparsers) -> None:
    parser = add_command(
        subparsers,
        "convert",
        run_convert,
        help="SOURCE (Hub id, folder or .pth) to a split folder",
        description=CONVERT,
        example="sam-split convert facebook/sam-vit-base sam-split-vit-base",
        positionals={"SOURCE": "Hub id, transformers folder or .pth file", "OUT": "folder to make"},
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--image-size",
        metavar="N|HxW",
        help="resample the position tables for another input size in pixels, such as 512 or 768x1024",
    )
    add_quiet(parser)
    push.add_push_to_hub(parser)

    parser = add_command(
        subparsers,
        "fuse",
        run_fuse,
        help="a split folder to stock transformers or Meta's .pth",
        description=FUSE,
        example="sam-split fuse sam-split-vit-base sam_vit_b.pth --format meta",
        positionals={"SOURCE": "split folder, or Hub id of one", "OUT": "folder or .pth file to make"},
    )
    parser.add_argument("--format", choices=("transformers", "meta"), default="transformers")
    add_quiet(parser)

    parser = add_command(
        subparsers,
        "verify",
        run_verify,
        help="do two checkpoints hold the same model?",
        description=VERIFY,
        example="sam-split verify sam_vit_b_01ec64.pth sam-split-vit-base",
        positionals={"A": "a checkpoint in any format", "B": "another one"},
    )
    parser.add_argument(
        "--tensors-only", action="store_true", help="do not run the models, which takes minutes for ViT-H"
    )
    parser.add_argument("--json", action="store_true", help="print the report for programs to read")


def run_convert(args) -> int:
    push.check_push_to_hub(args)

    from ..checkpoints import convert
    from ..image_size import parse_image_size

    image_size = None if args.image_size is None else parse_image_size(args.image_size)
    convert(args.source, args.out, revision=args.revision, image_size=image_size, progress=not args.quiet)
    print(f"wrote {args.out}; load it with AutoModel.from_pretrained({args.out!r}, trust_remote_code=True)")
    if args.push_to_hub is None:
        say_next(
            ["sam-split", "finetune", args.out, "DATA", "ADAPTER"],
            ["sam-split", "segment", args.out, "IMAGES", "MASKS"],
            ["sam-split", "push", args.out, "NAME/REPOSITORY"],
        )
    return push.run_push_to_hub(args)


def run_fuse(args) -> None:
    from ..checkpoints import fuse

    fuse(args.source, args.out, format=args.format, progress=not args.quiet)
    print(f"wrote {args.out}")
    say_next(["sam-split", "verify", args.source, args.out])


def run_verify(args) -> None:
    from ..verification import as_json, table, verify

    try:
        rows = verify(args.a, args.b, outputs=not args.tensors_only)
    except CheckFailed as error:
        print(as_json(error.rows, same=False) if args.json else table(error.rows))
        raise
    print(as_json(rows, same=True) if args.json else table(rows))
