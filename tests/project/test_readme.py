"""The README is true: its code runs as printed, and what it names exists."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from models import IMAGE_SIZE, stock_model
from transformers import SamImageProcessor, SamProcessor

from benchmarks import report
from benchmarks.results import Results
from conversion import convert
from conversion.cli import main
from sam_split import CODE_FILES

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
    assert {"config.json", *CODE_FILES, "model.safetensors"} <= written


def help_of(*words):
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0, words
    return printed.getvalue()


LINES = re.findall(r"^sam-split [a-z].*|(?<=`)sam-split [a-z][^`]*", README, re.MULTILINE)


@pytest.mark.parametrize("line", sorted(set(LINES)))
def test_commands_exist(line):
    words = shlex.split(line, comments=True)[1:]
    text = help_of(*words[: 1 + (words[0] == "adapter")])
    for flag in re.findall(r"--[a-z-]+", line):
        assert flag in text


def test_every_command_is_in_the_table():
    commands = set(re.findall(r"^ {2,4}([a-z]+)(?: {2,}|$)", help_of(), re.MULTILINE))
    assert "convert" in commands
    table = section("The command line")
    assert set(re.findall(r"^\| `sam-split (\w+)", table, re.MULTILINE)) == commands


def test_named_files_exist():
    folders = "tests|examples|benchmarks|conversion|sam_split|hub_card"
    paths = re.findall(rf"`((?:{folders})/[\w/.*]*)`", README) + re.findall(r"\]\(([\w/]+\.\w+)\)", README)
    assert len(paths) > 20
    for path in paths:
        assert list(ROOT.glob(path)), path
    (tree,) = re.findall(r"^```\n(sam_split/.*?)^```$", README, re.DOTALL | re.MULTILINE)
    named = {line.split()[0] for line in tree.splitlines()}
    for path in named:
        assert (ROOT / path).exists(), path
    folders = {f"{path.name}/" for path in ROOT.iterdir() if list(path.glob("*.py")) and path.name != "tests"}
    assert folders <= {path.split("/")[0] + "/" for path in named}, "every folder of code stands in the tree"


def test_links_within_the_page_lead_somewhere():
    titles = re.findall(r"^#+ (.*)", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(#([^)]*)\)", README)
    assert links
    assert set(links) <= anchors


def section(title):
    return README[README.index(f"## {title}\n") :].split("\n## ")[0]


def test_speed_and_memory_are_the_reports():
    """The table is the one that the stored runs give, and nothing beside it is a figure."""
    table = report.summary(Results.read(ROOT / "benchmarks/results/cpu.json"))
    text = section("Speed and memory")
    assert table in text
    assert re.findall(r"\d+[.%]\d*", text.replace(table, "")) == []


def test_coins_are_the_reports():
    lines = (ROOT / "examples/results/coins.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    iou = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    expected = [iou[preset]["IoU box"] for preset in ("(none)", "encoder+decoder", "encoder")]
    assert re.findall(r"0\.\d+", section("Fine-tune on your data")) == expected


def test_ci_runs_the_test_command():
    (command,) = (block.strip() for block in blocks("bash") if "nox" in block)
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
