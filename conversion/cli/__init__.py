"""The command line: `sam-split`, the same as `python -m conversion`."""

import argparse
import signal
import sys
import warnings

from hub_card import push
from hub_card.errors import PushRefused

from ..errors import CheckFailed, ConversionError, ConversionWarning
from . import demo

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


def _add_convert(subparsers):
    parser = subparsers.add_parser(
        "convert",
        help="SOURCE (Hub id, folder or .pth) to a split folder",
        description=CONVERT,
        epilog="example:\n  sam-split convert facebook/sam-vit-base sam-split-vit-base",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--image-size",
        metavar="N|HxW",
        help="resample the position tables for another input size in pixels, such as 512 or 768x1024",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    push.add_push_to_hub(parser)
    parser.set_defaults(run=_run_convert)


def _run_convert(args):
    from ..checkpoints import convert
    from ..image_size import parse_image_size

    push.check_push_to_hub(args)
    image_size = args.image_size and parse_image_size(args.image_size)
    convert(args.source, args.out, revision=args.revision, image_size=image_size, progress=not args.quiet)
    print(f"wrote {args.out}; load it with AutoModel.from_pretrained({args.out!r}, trust_remote_code=True)")
    return push.run_push_to_hub(args)


FUSE = """\
Turn a SamSplit folder back into what other tools read, bit for bit.

  --format transformers     OUT is a folder for stock SamModel
  --format meta             OUT is a .pth for segment_anything's sam_model_registry
"""


def _add_fuse(subparsers):
    parser = subparsers.add_parser(
        "fuse",
        help="a split folder to stock transformers or Meta's .pth",
        description=FUSE,
        epilog="example:\n  sam-split fuse sam-split-vit-base sam_vit_b.pth --format meta",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--format", choices=("transformers", "meta"), default="transformers")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_run_fuse)


def _run_fuse(args):
    from ..checkpoints import fuse

    fuse(args.source, args.out, format=args.format, progress=not args.quiet)
    print(f"wrote {args.out}")


VERIFY = """\
Check that two checkpoints hold the same model: configs, every tensor bit for bit, then the outputs on a fixed image.

A and B are split folders, transformers folders, .pth files or Hub ids, in any combination. The first difference is
named and the exit code is 1.
"""


def _add_verify(subparsers):
    parser = subparsers.add_parser(
        "verify",
        help="do two checkpoints hold the same model?",
        description=VERIFY,
        epilog="example:\n  sam-split verify sam_vit_b_01ec64.pth sam-split-vit-base",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument(
        "--tensors-only", action="store_true", help="do not run the models, which takes minutes for ViT-H"
    )
    parser.set_defaults(run=_run_verify)


def _run_verify(args):
    from ..verification import table, verify

    try:
        rows = verify(args.a, args.b, outputs=not args.tensors_only)
    except CheckFailed as error:
        print(table(error.rows))
        raise
    print(table(rows))


ADAPTER = """\
Carry LoRA and DoRA adapters between SamSplit's q, k, v and stock SamModel's fused qkv, and out of other tools' files.

  fuse     a PEFT adapter of SamSplit's q, k and v (any of them) becomes one of stock's qkv, and needs no SamSplit
  split    the reverse
  import   a LoRA file of SAMed or Sam_LoRA (w_a_000, w_b_000, ...) becomes a PEFT adapter of SamSplit's q and v

The adapted model computes the same on both sides; what cannot be carried over exactly is refused.
"""


def _add_adapter(subparsers):
    parser = subparsers.add_parser(
        "adapter",
        help="carry LoRA and DoRA adapters between q, k, v and qkv",
        description=ADAPTER,
        epilog="example:\n  sam-split adapter fuse my-lora my-lora-for-stock --base facebook/sam-vit-base",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("fuse", "split", "import"))
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="a PEFT folder or Hub id; for import a .pth or .safetensors file"
    )
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument(
        "--base", help="the model that OUT is for; needed by import, and by DoRA on some of q, k and v"
    )
    parser.set_defaults(run=_run_adapter)


def _run_adapter(args):
    from ..adapters import transport

    if args.action == "import" and args.base is None:
        raise ConversionError("adapter import needs --base: the model that the file was trained on")
    carry = {"fuse": transport.fuse_adapter, "split": transport.split_adapter, "import": transport.import_adapter}
    carry[args.action](args.adapter, args.out, base=args.base)
    print(f"wrote {args.out}; load it with PeftModel.from_pretrained(model, {args.out!r})")


MERGE = """\
Add an adapter to its base once and for all, and write the result in the format that is deployed.

BASE is a checkpoint in any format, ADAPTER a PEFT adapter of SamSplit's q, k, v or of stock's qkv.
"""


def _add_merge(subparsers):
    parser = subparsers.add_parser(
        "merge",
        help="a base and its adapter to one model, in any format",
        description=MERGE,
        epilog="example:\n  sam-split merge sam-split-vit-base my-lora sam_vit_b_mine.pth --format meta",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("adapter", metavar="ADAPTER")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--format", choices=("split", "transformers", "meta"), default="split")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_run_merge)


def _run_merge(args):
    from ..adapters.merge import merge

    merge(args.base, args.adapter, args.out, format=args.format, progress=not args.quiet)
    print(f"wrote {args.out}")


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand; each sets `run`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="sam-split",
        description="Segment Anything with native q, k and v layers: convert checkpoints, adapt with PEFT, go back.",
        epilog="sam-split COMMAND --help explains a command and shows an example",
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_convert(subparsers)
    _add_fuse(subparsers)
    _add_verify(subparsers)
    _add_adapter(subparsers)
    _add_merge(subparsers)
    push.add_parser(subparsers)
    demo.add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when all went well, 1 when a check failed, 2 for bad input, 130 after Ctrl-C.
    """
    args = build_parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("always", ConversionWarning)
        warnings.showwarning = _show_warning
        try:
            return args.run(args) or 0
        except CheckFailed as error:
            return _fail(error, 1)
        except (ConversionError, PushRefused, OSError) as error:
            return _fail(error, 2)
        except KeyboardInterrupt:
            return _fail("interrupted; nothing was written", 128 + signal.SIGINT)


def _fail(error, code: int) -> int:
    print(f"sam-split: error: {error}", file=sys.stderr)
    return code


def _show_warning(message, category, filename, lineno, file=None, line=None):
    print(
        f"sam-split: {message}" if category is ConversionWarning else f"{category.__name__}: {message}",
        file=sys.stderr,
    )
