"""`sam-split completion`: what the Tab key proposes, written from the parser."""

import argparse
from collections.abc import Iterator

from .parser import add_command

COMPLETION = """\
Print a script by which a shell completes commands, options and their choices; everything else completes to files.

In ~/.bashrc or ~/.zshrc:
  eval "$(sam-split completion bash)"
  eval "$(sam-split completion zsh)"
"""

SCRIPT = """\
_sam_split() {{
    local proposals="" before="${{COMP_WORDS[*]:1:$((COMP_CWORD - 1))}} "
    case "$before" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$proposals" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _sam_split sam-split
"""
ZSH = """\
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
"""


def add_parser(subparsers, parser) -> None:
    """`parser` is the one that is completed."""
    completion = add_command(
        subparsers,
        "completion",
        lambda args: print({"bash": "", "zsh": ZSH}[args.shell] + script(parser), end=""),
        help="a script for the shell, by which Tab completes commands and options",
        description=COMPLETION,
        example="sam-split completion bash > ~/.local/share/bash-completion/completions/sam-split",
        positionals={},
    )
    completion.add_argument("shell", metavar="SHELL", choices=("bash", "zsh"), help="bash or zsh")


def script(parser: argparse.ArgumentParser) -> str:
    """A function of bash, which looks at the words before the cursor; the first case that fits counts."""
    cases = [f'        {pattern}) proposals="{" ".join(words)}" ;;' for pattern, words in _cases(parser, "")]
    return SCRIPT.format(cases="\n".join(cases))


def _cases(parser: argparse.ArgumentParser, command: str) -> Iterator[tuple[str, list[str]]]:
    """Pattern -> proposals: those of the commands below this one, then values of its options, then what it takes."""
    start = f'"{command} "*' if command else '" "'
    proposals: list[str] = []
    files: list[str] = []
    for action in parser._actions:
        flag, choices = action.option_strings[-1:], list(action.choices or ())
        if isinstance(action, argparse._SubParsersAction):
            for name in choices:
                yield from _cases(action.choices[name], f"{command} {name}".strip())
        proposals += flag or choices
        if flag and action.nargs != 0:
            pattern = f'{start}"{flag[0]} "'
            if choices:
                yield pattern, choices
            else:
                files.append(pattern)
    if files:
        yield "|".join(files), []
    yield start, proposals
