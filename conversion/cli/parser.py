"""How every subcommand is made, and how it says what is wrong with its arguments."""

import argparse
import importlib.util
import math
from collections.abc import Callable, Mapping

from ..errors import ConversionError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the commands themselves do, and takes no shortened options."""

    def __init__(self, **options):
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message):
        program, *_ = self.prog.split()  # "sam-split" of "sam-split convert"
        self.exit(2, f"{program}: error: {' '.join(message.split())}; see {self.prog} --help\n")


def add_command(
    subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    *,
    help: str,
    description: str,
    example: str,
    positionals: Mapping[str, str],
) -> argparse.ArgumentParser:
    """Add a subcommand; its further options are for the caller to add.

    Args:
        subparsers: of the parser above it.
        name: of the subcommand.
        run: what it does with the parsed arguments; returns the exit code, None for 0.
        help: its line in the list of commands.
        description: the text above its arguments, printed as it is.
        example: whole command lines, printed below its arguments.
        positionals: name in capitals -> what it is, in order.
    """
    parser = subparsers.add_parser(
        name,
        help=help,
        description=description,
        epilog="example:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for positional, meaning in positionals.items():
        parser.add_argument(positional.lower(), metavar=positional, help=meaning)
    parser.set_defaults(run=run)
    return parser


def add_quiet(parser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def at_least(least: float, kind: type = int) -> Callable[[str], float]:
    """A parser of numbers that are not too small, nor endless, nor an integer that no tensor can hold."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < (2**31 if kind is int else math.inf):  # nor NaN
            whole = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {whole} of at least {least}, got {text}")
        return value

    return number


def add_data_options(group) -> None:
    """How examples are found in DATA."""
    group.add_argument("--split", default="train", help="of a Hugging Face dataset (%(default)s)")
    group.add_argument("--image-column", default="image", help="of a Hugging Face dataset (%(default)s)")
    group.add_argument("--mask-column", default="mask", help="of a Hugging Face dataset (%(default)s)")
    group.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be used")


def check_installed(command: str, *packages: str) -> None:
    """Raise before hours of work, and not after them, if a package of the extra `train` is missing."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ConversionError(f'{command} needs {name}, which is not installed: pip install "sam-split[train]"')
