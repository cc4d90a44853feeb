"""`sam-split` itself: subcommands, help, version, and an interrupt at any moment."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from transformers.utils import logging

import sam_split
from conversion.cli import build_parser, main, segment


def commands_of(parser):
    """All commands below a parser, such as "adapter fuse"."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield below.prog.partition(" ")[2]
                yield from commands_of(below)


COMMANDS = sorted(commands_of(build_parser()))
SLOW = {"torch", "transformers", "peft", "numpy", "huggingface_hub", "safetensors", "tqdm", "PIL", "matplotlib"}
HELP = f"""
import contextlib, io, sys, time
from conversion.cli import main
for command in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(command.split())
print(sorted({SLOW} & set(sys.modules)), time.process_time())
"""


def help_in_a_process(*commands):
    """What of `SLOW` was imported, and how long the processor worked from the start of Python on, in seconds."""
    run = subprocess.run([sys.executable, "-c", HELP, *commands], capture_output=True, text=True, check=True)
    imported, seconds = run.stdout.rsplit(maxsplit=1)
    return imported, float(seconds)


def test_help_of_no_command_waits_for_a_library():
    assert {"convert", "adapter import", "push", "finetune"} <= set(COMMANDS)
    imported, _ = help_in_a_process("--help", "--version", *(f"{command} --help" for command in COMMANDS))
    assert imported == "[]"


@pytest.mark.parametrize("command", ["--version", "--help", "convert --help", "finetune --help"])
def test_help_takes_less_than_0_4_seconds(command):
    """Of the processor's time, which other work on the machine lengthens less: 0.15 where this was written."""
    assert help_in_a_process(command)[1] < 0.4


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does_and_shows_an_example(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: sam-split {command} ")
    assert "\n\n" in printed
    if command != "adapter":
        assert f"example:\n  sam-split {command}" in printed


def test_without_a_command_it_shows_five_that_are_accepted(capsys):
    assert main([]) == 0
    shown = re.findall(r"^  (sam-split .+?)   ", capsys.readouterr().out, re.MULTILINE)
    assert len(shown) == 5
    for line in shown:
        build_parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize(
    ("typed", "proposed"),
    [
        ("fin", "finetune"),
        ("adapter im", "import"),
        ("verify --js", "--json"),
        ("merge base adapter out --format me", "meta"),
        ("merge base adapter out --fo", "--format"),
        ("adapter fuse lora out --b", "--base"),
        ("convert sto", ""),
        ("convert stock out --revision --q", ""),
        ("nonsense --q", ""),
    ],
)
def test_tab_completes_in_bash(typed, proposed, capsys):
    """An empty proposal leaves it to the shell, which completes to files."""
    assert main(["completion", "bash"]) == 0
    words = ["sam-split", *typed.split()]
    state = f'COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _sam_split; echo "${{COMPREPLY[*]}}"'
    run = subprocess.run(
        [shutil.which("bash"), "-c", f"{capsys.readouterr().out}\n{state}"], capture_output=True, text=True, check=True
    )
    assert (run.stdout, run.stderr) == (f"{proposed}\n", "")


def test_all_commands_are_proposed(capsys):
    assert main(["completion", "zsh"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("autoload -U +X compinit && compinit\n")
    (first,) = re.findall(r'^ +" "\) proposals="--help --version (.*)" ;;$', printed, re.MULTILINE)
    assert sorted(first.split()) == [command for command in COMMANDS if " " not in command]


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"sam-split {sam_split.__version__}\n"
    assert set(vars(build_parser().parse_args(["env"]))) == {"run"}, "finetune takes what it is given for settings"


@pytest.mark.parametrize("options", [[], ["--quiet"]])
def test_quiet_hides_the_bars_of_libraries_as_well(options, monkeypatch):
    shown = []
    monkeypatch.setattr(segment, "run", lambda args: shown.append(logging.is_progress_bar_enabled()))
    assert main(["segment", "model", "image", "out", *options]) == 0
    assert shown == [not options]
    assert logging.is_progress_bar_enabled()


def test_the_parser_itself_demands_the_base_of_an_import(capsys):
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(["adapter", "import", "lora.pth", "out"])
    assert capsys.readouterr().err.startswith("sam-split: error: the following arguments are required: --base")
    assert build_parser().parse_args(["adapter", "fuse", "lora", "out"]).base is None


def test_importing_the_command_line_imports_nothing_slow():
    """Ctrl-C in the middle of an import would print a traceback before `main` could catch it."""
    code = "import sys, conversion.cli; print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
