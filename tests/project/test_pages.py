"""The pages of `docs` are true: their blocks run from top to bottom, and what they name exists."""

import contextlib
import io
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from models import TINY
from pages import ELSEWHERE, PAGES, ROOT, blocks, commands, elsewhere, run_page, section
from peft import LoraConfig, get_peft_model
from PIL import Image
from skimage import data

from benchmarks import report
from benchmarks.results import Results
from conversion import convert
from conversion.cli import main
from conversion.cli.demo import TINY_SAM
from sam_split import SamSplitModel

# What a page finds, made as another page says.
GIVEN = {
    "docs/adapters.md": ["sam-split-vit-base", "my-adapter", "samed.pth"],
    "docs/convert.md": ["my-adapter"],
    "docs/deploy.md": ["sam-split-vit-base", "my-adapter", "tiny", "coins-adapter"],
    "docs/everything.md": ["sam-split-vit-base", "tiny", "coins-adapter", "photos"],
    "docs/publish.md": ["sam-split-vit-base", "my-adapter"],
}
# What a page leaves behind, where a command's exit code says little.
LEFT = {
    "docs/convert.md": ["sam-stock/config.json", "sam_vit_b.pth", "mine.pth", "sam-stock-again/model.safetensors"],
    "docs/deploy.md": ["sam-onnx/onnx/vision_encoder.onnx", "coins-page/index.html", "sam_vit_b.pth"],
    "docs/everything.md": ["masks/overlays", "coin-masks/labels", "more-masks/annotations.json"],
    "docs/finetune.md": ["coins-adapter/overlays/index.html", "late/results.json", "coins-results/index.html"],
    "docs/gallery.md": ["coins.jpg"],
    "docs/index.md": ["my-adapter/adapter_model.safetensors", "my-model/modeling_sam_split.py"],
}
AT_NIGHT = "docs/deploy.md", "docs/gallery.md", "docs/publish.md"
WITH_CODE = [page for page, text in PAGES.items() if blocks(text, "bash", "python") and page != "README.md"]


@pytest.fixture(scope="module")
def made(vit_b, tmp_path_factory):
    """All that GIVEN names."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    for name, source, adapter in (
        ("sam-split-vit-base", vit_b, "my-adapter"),
        ("tiny", TINY_SAM, "coins-adapter/adapter"),
    ):
        convert(source, folder / name, progress=False)
        config = LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)  # an adapter that changes masks
        get_peft_model(SamSplitModel.from_pretrained(folder / name), config).save_pretrained(folder / adapter)
    (folder / "photos").mkdir()
    for index in range(2):
        Image.fromarray(data.coins()[:150, 200 * index :][:, :200]).save(folder / "photos" / f"{index}.png")
    width, factors = TINY["vision_config"]["hidden_size"], 2 * TINY["vision_config"]["num_hidden_layers"]
    shapes = {"a": (4, width), "b": (width, 4)}
    pairs = {f"w_{x}_{i:03d}": torch.full(shape, 0.01) for x, shape in shapes.items() for i in range(factors)}
    torch.save(pairs, folder / "samed.pth")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.night] * (page in AT_NIGHT)) for page in WITH_CODE]
)
def test_every_block_runs(page, made, hub, tmp_path, monkeypatch):
    for name in GIVEN.get(page, []):
        copy = shutil.copytree if (made / name).is_dir() else shutil.copy
        copy(made / name, tmp_path / name)
    for folder in "conversion", "examples":
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    run_page(page, monkeypatch)
    for name in LEFT.get(page, []):
        assert (tmp_path / name).exists(), name


def test_what_runs_elsewhere_is_little():
    run = [line for text in PAGES.values() for line in commands(text)]
    assert len(run) > 30
    left_out = [line for line in run if elsewhere(line)]
    assert {start for start in ELSEWHERE if any(line.startswith(start) for line in left_out)} == ELSEWHERE.keys()
    assert len([line for line in left_out if "pip install" not in line]) <= 7
    for file in ELSEWHERE.values():
        assert (ROOT / file).is_file(), file


def test_languages_are_known():
    """A block in another language would not be run, and nobody would notice."""
    for page, text in PAGES.items():
        opened = re.findall(r"^ *```(\w*)$", text, re.MULTILINE)[::2]
        assert set(opened) <= {"bash", "python"}, page


def help_of(*words):
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0, words
    return printed.getvalue()


NAMED = {
    " ".join(words.split())
    for text in PAGES.values()
    for words in [*commands(text), *re.findall(r"`(sam-split\s[^`]*)`", text)]
    if words.startswith("sam-split")
}


@pytest.mark.parametrize("line", sorted(NAMED))
def test_commands_exist(line):
    words = re.sub(r"…|\.\.\.", "", line).split()[1:]
    text = help_of(*words[: 1 + (words[0] == "adapter")]) if words[0] != "COMMAND" else help_of()
    for flag in re.findall(r"--[a-z-]+", line):
        assert flag in text


def test_every_command_is_in_the_table():
    listed = set(re.findall(r"^ {2,4}([a-z]+)(?: {2,}|$)", help_of(), re.MULTILINE))
    assert "convert" in listed
    assert (
        set(re.findall(r"^\| `sam-split (\w+)", section("docs/index.md", "The command line"), re.MULTILINE)) == listed
    )


@pytest.mark.parametrize("page", PAGES)
def test_options_exist(page):
    """Each `--option` in a sentence is some command's."""
    helps = " ".join(help_of(*words) for words in [["convert"], ["fuse"], ["verify"], ["finetune"], ["evaluate"]])
    helps += " ".join(help_of(*words) for words in [["segment"], ["export"], ["push"], ["adapter", "fuse"], ["merge"]])
    helps += (ROOT / "examples" / "segment_ray.py").read_text(encoding="utf-8")
    for code in re.findall(r"`(--[a-z][^`]*)`", PAGES[page]):
        for flag in re.findall(r"--[a-z-]+", code):
            assert flag in helps, flag


def anchors(path):
    titles = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_named_files_and_links_exist(page):
    text, here = PAGES[page], ROOT / page
    folders = "tests|examples|benchmarks|conversion|sam_split|hub_card|docs"
    for path in re.findall(rf"`((?:{folders})/[\w/.*]*)`", text):
        assert list(ROOT.glob(path)), path
    for path, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)#?([^)]*)\)", text):
        target = (here.parent / path).resolve() if path else here
        assert target.is_file(), path
        assert not anchor or anchor in anchors(target), (path, anchor)


def test_files_of_code_have_a_place():
    """CONTRIBUTING's tree names what exists, and every folder of code."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^```\n(sam_split/.*?)^```$", text, re.DOTALL | re.MULTILINE)
    named = {line.split()[0] for line in tree.splitlines()}
    for path in named:
        assert (ROOT / path).exists(), path
    folders = {path.name for path in ROOT.iterdir() if list(path.glob("*.py"))}
    assert folders <= {path.split("/")[0] for path in named}


def test_speed_and_memory_are_the_reports():
    """The table is the one that the stored runs give, and nothing beside it is a figure."""
    table = report.summary(Results.read(ROOT / "benchmarks/results/cpu.json"))
    text = PAGES["docs/speed.md"]
    assert table in text
    assert re.findall(r"\d+[.%]\d*", text.replace(table, "")) == []


def test_peaks_of_a_step_are_the_reports():
    runs = Results.read(ROOT / "benchmarks/results/cpu.json").runs
    cases = [run.cases["lora-b1 vit_b float32"]["figures"] for run in runs if "lora-b1 vit_b float32" in run.cases]
    for peer in "ours", "ours_checkpointed":
        peaks = [peak / 1000 for case in cases for peak in case[peer]["peak"]]
        assert f"{min(peaks):.1f} to {max(peaks):.1f} GB" in " ".join(PAGES["docs/finetune.md"].split()), peer


def test_coins_are_the_reports():
    """Before and after, as the command that the page shows has printed them into the report."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "examples/results/coins.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    figures = {row[0]: row[1:3] for row in rows}
    expected = [*figures["IoU from the box"], *figures["IoU from 1 click"], *figures["everything-mode: AR@100"]]
    assert re.findall(r"0\.\d{3}", PAGES["docs/finetune.md"].split("\n## ")[0]) == expected


def test_presets_are_the_code_s():
    """The page's table is the one of `lora_config`, cut differently."""
    from sam_split.training import PRESETS, lora_config

    rows = re.findall(r"^\| `([\w+-]+)` \|.*\| ([\d,]+) \|$", section("docs/finetune.md", "Presets"), re.MULTILINE)
    assert [name for name, _ in rows] == list(PRESETS)
    for name, parameters in rows:
        assert re.search(rf"\| `{re.escape(name)}` \|.*\| {parameters} \|", lora_config.__doc__)


def test_figures_are_what_the_script_draws():
    sys.path.insert(0, str(ROOT / "docs" / "figures"))
    import draw

    for name, figure in draw.FIGURES.items():
        assert (ROOT / "docs/figures" / name).read_text(encoding="utf-8") == figure(), "python docs/figures/draw.py"
    used = {Path(path).name for path in re.findall(r"\]\((figures/[^)]*)\)", "".join(PAGES.values()))}
    assert used == draw.FIGURES.keys()
