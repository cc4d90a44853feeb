"""The command line: `sam-split`, the same as `python -m conversion`."""

import argparse
import signal
import sys
import warnings

from .errors import CheckFailed, ConversionError, ConversionWarning

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
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_run_convert)


def _run_convert(args):
    from .checkpoints import convert

    convert(args.source, args.out, revision=args.revision, progress=not args.quiet)
    print(f"wrote {args.out}; load it with AutoModel.from_pretrained({args.out!r}, trust_remote_code=True)")


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand; each sets `run`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="sam-split",
        description="Segment Anything with native q, k and v layers: convert checkpoints, adapt with PEFT, go back.",
        epilog="sam-split COMMAND --help explains a command and shows an example",
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_convert(subparsers)
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
        except (ConversionError, OSError) as error:
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
