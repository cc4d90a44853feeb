"""The command line: `sam-split`, the same as `python -m conversion`.

Nothing slow is imported before `main` runs, so that Ctrl-C ends in one line from the start.
"""

import contextlib
import logging
import signal
import sys
import threading
import warnings

from ..errors import CheckFailed, ConversionError, ConversionWarning

OVERVIEW = """\
Segment Anything with native q, k and v layers. Five things that one does:

  sam-split convert facebook/sam-vit-base sam           split a checkpoint, once
  sam-split segment sam photos masks --overlay          find everything in images
  sam-split finetune sam cells lora                     adapt it to your images
  sam-split evaluate sam cells --adapter lora/adapter   measure what that gives
  sam-split push sam you/sam                            publish it

First, without a download:  sam-split demo
All commands:               sam-split --help
One of them:                sam-split COMMAND --help"""


def build_parser():
    """The parser with every subcommand; each sets `run`, a function of the parsed arguments."""
    from . import adapters, checkpoints, completion, demo, env, evaluate, export, finetune, push, segment
    from .parser import Parser, Version

    parser = Parser(
        prog="sam-split",
        description="Segment Anything with native q, k and v layers: convert checkpoints, adapt with PEFT, go back.",
        epilog="sam-split COMMAND --help explains a command and shows an example",
    )
    parser.add_argument("--version", action=Version, help="print the version")
    parser.set_defaults(run=lambda args: print(OVERVIEW))
    subparsers = parser.add_subparsers(metavar="COMMAND")
    checkpoints.add_parsers(subparsers)
    adapters.add_parsers(subparsers)
    segment.add_parser(subparsers)
    export.add_parser(subparsers)
    finetune.add_parser(subparsers)
    evaluate.add_parser(subparsers)
    push.add_parser(subparsers)
    demo.add_parser(subparsers)
    env.add_parser(subparsers)
    completion.add_parser(subparsers, parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when all went well, 1 when a check failed, 2 for bad input, 130 after Ctrl-C.
    """
    with _libraries_silent(), _interruptions() as interrupted:
        try:
            return _run(argv)
        except BaseException as error:
            if interrupted or isinstance(error, KeyboardInterrupt):
                return _fail("interrupted; nothing was written", 128 + signal.SIGINT)
            if isinstance(error, CheckFailed):
                return _fail(error, 1)
            if isinstance(error, (ConversionError, OSError)):
                return _fail(error, 2)
            raise


def _run(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)

    from hub_card.errors import PushRefused

    try:
        with _no_bars() if getattr(args, "quiet", False) else contextlib.nullcontext():
            return args.run(args) or 0
    except PushRefused as error:
        return _fail(error, 2)


def _fail(error, code: int) -> int:
    print(f"sam-split: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _no_bars():
    """Without the progress bars of transformers and huggingface_hub."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@contextlib.contextmanager
def _interruptions():
    """A list with an entry after Ctrl-C, because a library that it meets in its import raises an error of its own."""
    seen = []

    def note(number, frame):
        seen.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _libraries_silent():
    """No warning but ours: what libraries tell those who call them, the user of the command line cannot change."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("always", ConversionWarning)
        warnings.showwarning = _show_warning
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def _show_warning(message, category, filename, lineno, file=None, line=None):
    if issubclass(category, ConversionWarning):
        print(f"sam-split: {message}", file=sys.stderr)
