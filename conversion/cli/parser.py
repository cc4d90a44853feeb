"""How every subcommand is made, says what is wrong with its arguments, and names the command that follows."""

import argparse
import difflib
import importlib.util
import math
import shlex
from collections.abc import Callable, Mapping, Sequence

from ..errors import ConversionError


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong and what was probably meant. No option can be shortened."""

    def __init__(self, **options):
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_known_args(self, args=None, namespace=None):
        """Each command answers for its own words; argparse has the parser of all commands answer."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near(unknown[0], self._option_string_actions)}")
        return namespace, unknown

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            known = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}{near(value, action.choices)} (choose from {known})"
            )

    def error(self, message):
        program, *_ = self.prog.split()  # "sam-split" of "sam-split convert"
        self.exit(2, f"{program}: error: {' '.join(message.split())}; see {self.prog} --help\n")


def near(word: str, known) -> str:
    """The known word that was probably meant, as the end of a message, or nothing."""
    found = difflib.get_close_matches(str(word).split("=")[0], map(str, known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


class Version(argparse.Action):
    """`--version`: argparse's own wants the number before it is asked for, and reading it takes a while."""

    def __init__(self, **options):
        super().__init__(**{**options, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}, nargs=0)

    def __call__(self, parser, namespace, values, option_string=None):
        print(f"{parser.prog} {version()}")
        parser.exit()


def version() -> str:
    from importlib import metadata

    try:
        return metadata.version("sam-split")
    except metadata.PackageNotFoundError:
        return "(a checkout, not installed)"


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


def say_next(*commands: Sequence[str]) -> None:
    """Print the commands that make sense after this one, a line each, to be copied.

    Args:
        commands: the words of each; those that are for the user to choose are in capitals.
    """
    for words in commands:
        print(f"{'next' if words is commands[0] else '  or'}: {shlex.join(words)}")


def add_quiet(parser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def at_least(least: float, kind: type = int, most: float = math.inf) -> Callable[[str], float]:
    """A parser of numbers that are neither too small nor too large to be meant; integers are those of tensors."""
    if kind is int:
        most = min(most, 2**31 - 1)

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or math.isinf(value):  # nor NaN
            whole = "an integer" if kind is int else "a number"
            wanted = f"from {least} to {most}" if value > most else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"must be {whole} {wanted}, got {text}")
        return value

    return number


def share(*, ends: bool) -> Callable[[str], float]:
    """A parser of numbers from 0 to 1, `ends` included or not."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (0 <= value <= 1 if ends else 0 < value < 1):  # nor NaN
            wanted = "from 0 to 1" if ends else "between 0 and 1"
            raise argparse.ArgumentTypeError(f"must be a number {wanted}, got {text}")
        return value

    return number


def add_data_options(group) -> None:
    """How examples are found in DATA."""
    group.add_argument("--split", default="train", help="of a Hugging Face dataset (%(default)s)")
    group.add_argument("--image-column", default="image", help="of a Hugging Face dataset (%(default)s)")
    group.add_argument("--mask-column", default="mask", help="of a Hugging Face dataset (%(default)s)")
    group.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be used")


def check_installed(command: str, *packages: str, extra: str = "train") -> None:
    """Raise before hours of work, and not after them, if a package of an extra is missing."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ConversionError(f'{command} needs {name}, which is not installed: pip install "sam-split[{extra}]"')
