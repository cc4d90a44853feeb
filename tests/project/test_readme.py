"""README is one screen, and true: its code runs as printed, and its figures are the reports'."""

import re

from pages import PAGES, ROOT, blocks, run_page, section

from benchmarks import report
from benchmarks.results import Results
from sam_split import CODE_FILES

README = PAGES["README.md"]


def test_one_screen():
    assert len(README.splitlines()) <= 130
    (code,) = (code for _, code in blocks(README, "python"))
    assert len([line for line in code.splitlines() if line]) <= 15


def test_it_runs(hub, tmp_path, monkeypatch):
    """A tiny model stands for ViT-B."""
    monkeypatch.chdir(tmp_path)
    namespace = run_page("README.md", monkeypatch)
    assert namespace["outputs"].pred_masks.shape[:3] == (1, 1, 1)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    written = {path.name for path in (tmp_path / "sam-split-vit-base").iterdir()}
    assert {"config.json", *CODE_FILES, "model.safetensors"} <= written


def test_speed_and_memory_are_the_reports():
    """Each row is one of the table that the stored runs give, and nothing beside them is a figure."""
    rows = report.summary(Results.read(ROOT / "benchmarks/results/cpu.json")).splitlines()
    text = section("README.md", "Speed and memory")
    table = re.findall(r"^\|.*", text, re.MULTILINE)
    assert len(table) == 6
    assert set(table) <= set(rows)
    assert re.findall(r"\d+[.%]\d*", re.sub(r"^\|.*", "", text, flags=re.MULTILINE)) == []


def test_ci_runs_the_test_command():
    (command,) = (code.strip() for _, code in blocks(README, "bash") if "nox" in code)
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
