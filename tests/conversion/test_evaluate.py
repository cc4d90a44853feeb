"""`sam-split evaluate`: the library's numbers in its table and files, and one line for what it cannot use."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from models import stock_model
from peft import PeftModel
from PIL import Image
from skimage import data
from trained_adapters import trained
from transformers import AutoProcessor

from conversion import convert
from conversion.cli import main
from conversion.cli.demo import TINY_SAM
from sam_split import SamSplitModel
from sam_split.training import evaluate, evaluation_table, find_examples


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Models, adapters, two crops with coins, and what is none of these."""
    here = tmp_path_factory.mktemp("evaluate")
    convert(TINY_SAM, here / "tiny", progress=False)
    for seed, name in (3, "mine"), (4, "yours"):
        model = SamSplitModel.from_pretrained(here / "tiny")
        trained(model, here / name / "adapter", seed, r=2, target_modules=["q", "v"])
    trained(stock_model(), here / "other", r=2, target_modules=["qkv"])
    coins = data.coins()
    for part, x in ("coins", 40), ("cut", 40):
        for kind in ("images", "masks"):
            (here / part / kind).mkdir(parents=True)
        for number, y in enumerate((133, 200)):
            pixels = coins[y : y + 128, x : x + 120]
            Image.fromarray(pixels).save(here / part / "images" / f"{number}.png")
            mask = np.zeros(pixels.shape, np.uint8)
            mask[10:60, 5:60], mask[70:120, 50:110] = 1, 2
            Image.fromarray(mask).save(here / part / "masks" / f"{number}.png")
    (here / "cut" / "images" / "1.png").write_bytes(b"")
    (here / "empty").mkdir()
    (here / "file").write_text("text")
    shutil.copytree(here / "mine" / "adapter", here / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    return here


@pytest.fixture
def run(here, monkeypatch, capsys):
    """Run a command line in the folder; its exit code and what it printed."""

    def run(line):
        monkeypatch.chdir(here)
        try:
            code = main(["evaluate", *line.split()])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def expected(here, adapter, **options):
    model = SamSplitModel.from_pretrained(here / "tiny")
    if adapter:
        model = PeftModel.from_pretrained(model, here / adapter).merge_and_unload()
    processor = AutoProcessor.from_pretrained(here / "tiny")
    return evaluate(model, processor, find_examples(here / "coins"), progress=False, **options)


def test_an_adapter_is_measured_beside_its_base(here, run, tmp_path):
    code, printed, error = run(f"tiny coins --adapter mine/adapter --out {tmp_path}/out")
    assert code == 0, error
    after, before = expected(here, "mine/adapter"), expected(here, None)
    table = evaluation_table({"tiny": before, "mine/adapter": after})
    merge = "next: sam-split merge tiny mine/adapter MERGED"
    assert printed == f"{table}\nlook at {tmp_path}/out/index.html\n{merge}\n"
    assert "AR@100" in table
    assert before.means["iou_box"] != after.means["iou_box"]
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["evaluations"] == {"tiny": before.as_dict(), "mine/adapter": after.as_dict()}
    assert found["options"]["adapter"] == "mine/adapter"
    assert found["versions"]["torch"] == torch.__version__
    digest = find_examples(here / "coins").usable().digest()
    assert found["data"] == {"source": "coins", "images": 2, "digest": digest}
    sources = {name: (model["model"], model["adapter"]) for name, model in found["models"].items()}
    assert sources == {"tiny": ("tiny", None), "mine/adapter": ("tiny", "mine/adapter")}
    assert len({model["weights"] for model in found["models"].values()}) == 2
    assert table in (tmp_path / "out" / "results.md").read_text()
    names = ["gains.png", "index.html", "pictures", "results.json", "results.md"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2 * 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("line", "columns"),
    [
        ("tiny coins", ["tiny"]),
        ("tiny coins --adapter mine/adapter", ["tiny", "mine/adapter", "change"]),
        ("tiny coins --adapter mine/adapter --against yours/adapter", ["yours/adapter", "mine/adapter", "change"]),
        ("tiny coins --against yours/adapter", ["yours/adapter", "tiny", "change"]),
        (f"tiny coins --against {TINY_SAM}", ["tiny_sam", "tiny", "change"]),
        ("tiny coins --against ./tiny --adapter mine/adapter", ["tiny", "mine/adapter", "change"]),
    ],
)
def test_what_is_compared(here, run, line, columns):
    code, printed, error = run(f"{line} --no-everything --quiet")
    assert (code, error) == (0, "")
    table, last = printed.split("to see where it fails, add --out FOLDER\n")
    assert last == ("next: sam-split merge tiny mine/adapter MERGED\n" if "--adapter" in line else "")
    cells = [[cell.strip() for cell in row.split("|")[2:-1]] for row in table.splitlines()]
    assert cells[0] == columns
    adapters = {"yours/adapter": "yours/adapter", "mine/adapter": "mine/adapter"}
    for index, column in enumerate(column for column in columns if column != "change"):
        means = expected(here, adapters.get(column), everything=False).means
        assert [float(row[index]) for row in cells[2:]] == [round(value, 3) for value in means.values()]


BAD = {
    "no data": ("tiny", "DATA"),
    "no model": ("nowhere.pth coins", "nowhere.pth does not exist"),
    "an empty name": ("tiny coins --against=", "name is empty"),
    "a text as model": ("file coins", "file"),
    "an adapter as model": ("mine/adapter coins", "mine/adapter holds no config.json"),
    "no adapter": ("tiny coins --adapter nowhere.pth", "nowhere.pth does not exist"),
    "a model as adapter": ("tiny coins --adapter tiny", "tiny holds no adapter_config.json"),
    "an adapter of another model": ("tiny coins --adapter other", "does not fit the base"),
    "an adapter without weights": ("tiny coins --adapter weightless", "weightless"),
    "against nothing": ("tiny coins --against nowhere.pth", "nowhere.pth does not exist"),
    "against itself": ("tiny coins --against tiny", "--against tiny is what is measured"),
    "nowhere": ("tiny nowhere", "nowhere is neither a folder nor a dataset"),
    "a file as data": ("tiny file", "file is not a folder"),
    "an empty folder": ("tiny empty", "empty holds neither images/ and masks/"),
    "a cut image": ("tiny cut", "1.png: cannot identify image file"),
    "no column": ("tiny coins --mask_column x", "--mask_column"),
    "an out that is there": ("tiny coins --out empty", "empty exists already"),
    "an out without parent": ("tiny coins --out no/out", "no is not a folder"),
    "an out inside the model": ("tiny coins --out tiny/out", "tiny/out is inside tiny"),
    "an empty out": ("tiny coins --out=", "OUT is empty"),
    "no such device": ("tiny coins --device abacus", "--device 'abacus' cannot be used"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(here, run, case):
    line, message = BAD[case]
    before = sorted(here.rglob("*"))
    code, printed, error = run(f"{line} --quiet")
    assert (code, printed) == (2, "")
    lines = [line for line in error.splitlines() if line]
    assert len(lines) == 1, error
    assert lines[0].startswith("sam-split: error: ")
    assert message in lines[0]
    assert sorted(here.rglob("*")) == before


def test_bad_images_are_left_out_where_that_is_asked_for(run):
    code, printed, error = run("tiny cut --no-everything --quiet --skip-bad")
    assert code == 0
    assert error.startswith("skipped 1.png: ")
    assert printed.startswith("| 1 image, 2 objects ")


def test_a_missing_package_is_named_at_once(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    code, _, error = run("tiny coins")
    assert code == 2
    assert 'evaluate needs pycocotools, which is not installed: pip install "sam-split[train]"' in error


def test_help_imports_nothing_slow():
    code = (
        "import sys\nfrom conversion.cli import main\n"
        "try:\n    main(['evaluate', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "print({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: sam-split evaluate ")
    assert "example:\n  sam-split evaluate" in done.stdout
    assert done.stdout.endswith("\nset()\n")
