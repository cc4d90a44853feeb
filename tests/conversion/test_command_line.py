"""`sam-split` itself: subcommands, help, version, and an interrupt at any moment."""

import subprocess
import sys

import pytest

import sam_split
from conversion.cli import build_parser, main

COMMANDS = ("convert", "fuse", "verify", "adapter", "adapter fuse", "adapter split", "adapter import", "merge", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does_and_shows_an_example(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: sam-split {command} ")
    assert "\n\n" in printed
    if command != "adapter":
        assert f"example:\n  sam-split {command}" in printed


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"sam-split {sam_split.__version__}\n"


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
