"""The options of `sam-split finetune` are those of the library, and asking for them is quick."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conversion.cli import finetune
from conversion.cli.finetune import add_parser
from sam_split.training import PRESETS
from sam_split.training.prompts import FIRST_PROMPTS
from sam_split.training.settings import Settings

ROOT = Path(__file__).parents[2]


def parse(*words):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["finetune", "base", "data", "out", *words])


def test_defaults_are_the_librarys():
    """Every option is there, with the same default: `Settings` has the same names in the same groups."""
    args = parse()
    assert finetune.settings_of(args, *args.preset) == Settings()
    assert finetune.PRESETS == tuple(PRESETS)
    assert all(parse("--prompts", kind) for kind in FIRST_PROMPTS)


def test_command_line_parses_to_its_settings():
    """One value of each option that is not its default."""
    options = {
        "val": "test images", "holdout": 0.5, "split": "test", "image_column": "photo", "mask_column": "truth",
        "skip_bad": True, "preset": "late", "rank": 4, "late_layers": 2, "cache": "cache", "revision": "main",
        "prompts": "box", "corrections": 0, "background": 0, "objects": 3, "epochs": 2.5, "steps": 7, "batch": 1,
        "accumulate": 2, "focal": 2.5, "lr": 1e-05, "patience": 1, "checkpointing": True, "bf16": True, "seed": 3,
        "deterministic": True, "save_steps": 5, "resume": True, "everything": False,
        "report_to": ("tensorboard", "wandb"), "quiet": True,
    }  # fmt: skip
    assert set(options) == set(Settings.__dataclass_fields__)
    settings = Settings(**options)
    for name in options:
        assert getattr(settings, name) != getattr(Settings(), name), name
    words = settings.command("base", "data", "out")
    assert words[:5] == ["sam-split", "finetune", "base", "data", "out"]
    args = parse(*words[5:])
    assert finetune.settings_of(args, *args.preset) == settings
    assert shlex.split(settings.command_line("base", "data", "out")) == words


@pytest.mark.parametrize("words", [("finetune", "--help"), ("finetune", "base", "data", "out", "--preset", "all")])
def test_no_torch_for_help_and_bad_options(words):
    script = """import sys
from conversion.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    assert 'torch' not in sys.modules
    print('quick')
"""
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("quick\n"), done.stderr
