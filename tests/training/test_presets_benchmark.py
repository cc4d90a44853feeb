"""`python -m benchmarks.presets`: every row is trained by its own settings, measured once, and kept."""

import json
import re
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
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
    assert set(presets.ROWS) == {*PRESETS, presets.FUSED, presets.BOX_ONLY, *presets.PEFT}
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


@pytest.mark.slow
@pytest.mark.parametrize("row", presets.PEFT)
def test_variants_of_lora(row, out, tmp_path, monkeypatch):
    """Each is what its name says, and trained as it says."""
    rates, step = set(), torch.optim.AdamW.step

    def noted(optimizer, *given):
        rates.update(group["lr"] for group in optimizer.param_groups if group["params"])
        return step(optimizer, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    (tmp_path / "coins").mkdir()
    shutil.copytree(out / "coins" / "data", tmp_path / "coins" / "data")
    presets.main(["--domain", "coins", "--seeds", "0", "--steps", "1", "--out", str(tmp_path), "--only", row])
    adapter = tmp_path / "coins" / row.replace(" ", "-") / "0" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["use_rslora"] == (row == "rsLoRA")
    assert config["lora_alpha"] == (16 if row == "rsLoRA" else 32)
    assert config["init_lora_weights"] == ("pissa" if row == "PiSSA" else True)
    assert sorted(rates) == pytest.approx([2e-3, 8e-3] if row == "LoRA+" else [3e-3])
    weights = load_file(adapter / "adapter_model.safetensors")
    ranks: dict[str, int] = {}  # the largest of each part: PiSSA's is at most that of the layer
    for name, tensor in weights.items():
        if "mask_decoder" in name and "lora_A" in name:
            part = name.split(".")[3]
            ranks[part] = max(len(tensor), ranks.get(part, 0))
    heads = 64 if row == "rank 64 in the heads" else 16
    assert ranks == {"transformer": 16, "iou_prediction_head": heads, "output_hypernetworks_mlps": heads}


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
