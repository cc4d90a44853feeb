"""The README is true: its code runs as printed, and what it names exists."""

import contextlib
import io
import re
from pathlib import Path

import pytest
from models import IMAGE_SIZE, stock_model
from transformers import SamImageProcessor, SamProcessor

from conversion import convert
from conversion.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stock_model().save_pretrained("stock")
    size, pad_size = {"longest_edge": IMAGE_SIZE}, {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    mask_sizes = {"mask_size": {"longest_edge": IMAGE_SIZE // 4}, "mask_pad_size": pad_size}
    SamProcessor(SamImageProcessor(size=size, pad_size=pad_size, **mask_sizes)).save_pretrained("stock")
    convert("stock", "sam-split-vit-base", progress=False)
    namespace = {}
    assert len(blocks("python")) >= 3
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    height, width = namespace["data"].astronaut().shape[:2]
    assert namespace["masks"][0].shape == (1, 1, height, width)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    written = {path.name for path in (tmp_path / "my-model").iterdir()}
    assert {"config.json", "configuration_sam_split.py", "modeling_sam_split.py", "model.safetensors"} <= written


@pytest.mark.parametrize("line", sorted(set(re.findall(r"`(sam-split [a-z]+[^`]*)`", README))))
def test_commands_exist(line):
    command = line.split()[1]
    if command == "COMMAND":
        return
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    for flag in re.findall(r"--[a-z-]+", line):
        assert flag in printed.getvalue()


def test_named_files_exist():
    for path in re.findall(r"`((?:tests|examples|benchmarks)/[\w/.*]+)`", README):
        assert list(ROOT.glob(path)), path
    (tree,) = re.findall(r"^```\n(sam_split/.*?)^```$", README, re.DOTALL | re.MULTILINE)
    for line in tree.splitlines():
        assert (ROOT / line.split()[0]).exists(), line


def test_figures_are_measured_ones():
    reports = (ROOT / "benchmarks/results").rglob("*.md")
    measured = {figure for report in reports for figure in re.findall(r"\d+\.\d+", report.read_text(encoding="utf-8"))}
    section = README[README.index("## Speed and memory") : README.index("## Fine-tune on your data")]
    quoted = re.findall(r"\d+\.\d+", section)
    assert len(quoted) > 5
    assert set(quoted) <= measured


def test_ci_runs_the_test_command():
    (command,) = (block.strip() for block in blocks("bash") if "nox" in block)
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
