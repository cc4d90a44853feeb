"""`python -m benchmarks.presets`: every row is trained by its own settings, measured once, and kept."""

import json
import re

import pytest
import torch
from peft import get_peft_model
from training_data import image_folder

from benchmarks import presets
from sam_split import SamSplitConfig, SamSplitModel
from sam_split.training import PRESETS, lora_config
from sam_split.training.settings import Settings

ROWS = ["encoder", presets.FUSED, presets.BOX_ONLY]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The runs of three rows with two seeds on two images of noise."""
    out = tmp_path_factory.mktemp("runs")
    for part in ("train", "test"):
        image_folder(out / "coins" / "data" / part, 2)
    presets.main(words(out))
    return out


def words(out, *more):
    return ["--domain", "coins", "--seeds", "0", "1", "--steps", "1", "--out", str(out), "--only", *ROWS, *more]


def runs(out, row):
    return [json.loads((out / "coins" / row.replace(" ", "-") / seed / "presets.json").read_text()) for seed in "01"]


def test_rows(out):
    """The presets, stock's fused qkv, and boxes only; all with the steps and the rate asked for."""
    assert set(presets.ROWS) == {*PRESETS, presets.FUSED, presets.BOX_ONLY}
    for row in ROWS:
        first, second = runs(out, row)
        assert first["iou_box"] != second["iou_box"], "another seed"
        assert first["steps"] == 1
        assert "--lr=0.003" in first["settings"]
        assert "average_recall" in first
        assert ("--prompts=box" in first["settings"]) == (row == presets.BOX_ONLY)
    trained = {row: runs(out, row)[0]["trainable"] for row in ROWS}
    assert trained["encoder"] == 4 * 2 * 16 * 2 * 96, "layers, q and v, rank, A and B, channels"
    assert trained[presets.FUSED] == 4 * 16 * (96 + 3 * 96)
    assert trained[presets.BOX_ONLY] > trained["encoder"]
    assert Settings().preset == "encoder+decoder"


def test_table(out):
    """The mean over the seeds, the smallest and the largest, and the base in the first line."""
    lines = (out / "coins" / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [line[0] for line in cells[2:]] == ["(none)", *ROWS]
    assert len({len(line) for line in cells}) == 1
    low, high = sorted(run["iou_1_click"] for run in runs(out, "encoder"))
    at = cells[0].index("1 click")
    assert cells[3][at] == f"{(low + high) / 2:.3f} ({low:.3f} to {high:.3f})"
    assert float(cells[2][at]) == pytest.approx(low, abs=0.2)


def test_what_is_done_is_kept(out, monkeypatch, capsys):
    """A stopped command goes on: only the run without a result is made, and the table is the same."""
    table = (out / "coins" / "table.md").read_text()
    done = out / "coins" / "encoder" / "1" / "presets.json"
    figures = json.loads(done.read_text())
    done.unlink()
    made = []
    real = presets.fit
    monkeypatch.setattr(presets, "fit", lambda *given: made.append(given) or real(*given))
    presets.main(words(out))
    assert [given[3].seed for given in made] == [1]
    assert {**json.loads(done.read_text()), "cpu_seconds_per_step": 0} == {**figures, "cpu_seconds_per_step": 0}
    again = (out / "coins" / "table.md").read_text()
    assert [line.split("|")[:-2] for line in again.splitlines()] == [
        line.split("|")[:-2] for line in table.splitlines()
    ]  # all but the seconds
    assert "6/6 coins" in capsys.readouterr().err


def test_figures_of_other_settings_are_not_mixed(out):
    with pytest.raises(SystemExit, match="name another --out"):
        presets.main([*words(out), "--lr", "1e-4"])


def test_documented_parameters():
    """Those of ViT-B, in the table that explains the presets."""
    printed = re.findall(r"\| `(\S+)` \|.*\| ([\d,]+) \|", lora_config.__doc__)
    trained = {}
    for preset in PRESETS:
        with torch.device("meta"):
            model = SamSplitModel(SamSplitConfig())
            trained[preset] = get_peft_model(model, lora_config(preset, model)).get_nb_trainable_parameters()[0]
    assert {preset: int(number.replace(",", "")) for preset, number in printed} == trained
