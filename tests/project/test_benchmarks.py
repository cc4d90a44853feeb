"""The benchmarks measure what they say: one model for all peers, a process for each, figures that are never mixed."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import meters, report, rounds
from benchmarks.cases import MODELS, REFERENCE, TARGETS, TITLES, Case, cases
from benchmarks.results import Results, UnlikeError
from benchmarks.tasks import Tasks

ROOT = Path(__file__).parents[2]
TINY = {case.name.split()[0]: case for case in cases(["tiny"], ["float32"], [1])}
MACHINE = {
    "device": "here",
    "threads": 1,
    "system": "this",
    "versions": {"torch": "2"},
    "sam_split": "abc",
    "date": "-",
}


def run(*arguments, out):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--rounds", "1", "--out", str(out), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("case", ["encoder-b1", "decoder-64", "lora-b1"])
def test_peers_compute_the_same(case, tmp_path):
    """Otherwise a ratio between them would mean nothing. torch.compile is left to a run that asks for it."""
    outputs = {}
    for peer in TINY[case].peers:
        tasks = Tasks(asdict(TINY[case]), peer, "cpu", tmp_path)
        outputs[peer] = tasks.call().detach()
        count = meters.flops(tasks.call)
        tasks.model.to("meta")
        tasks.make_inputs("meta")
        torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True
        # On shapes alone scaled_dot_product_attention may take another path, which counts a little otherwise.
        assert meters.flops(tasks.call) == pytest.approx(count, rel=0.01), peer
        assert count > 1e6
    reference = outputs.pop(REFERENCE)
    assert reference.std() > 0.01
    for peer, output in outputs.items():
        torch.testing.assert_close(output, reference, rtol=0, atol=1e-5 * reference.abs().max().item(), msg=peer)


@pytest.mark.parametrize("peer", ["ours", REFERENCE])
def test_step_trains_the_adapters_and_nothing_else(peer, tmp_path):
    tasks = Tasks(asdict(TINY["lora-b1"]), peer, "cpu", tmp_path)
    tasks.call()
    moved = {name for name, parameter in tasks.model.named_parameters() if parameter.grad is not None}
    assert moved == {name for name, _ in tasks.model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(("case", "peer"), [("load", "ours"), ("load", REFERENCE), ("convert", "from_transformers")])
def test_loading_and_converting(case, peer, tmp_path):
    tasks = Tasks(asdict(TINY[case]), peer, "cpu", tmp_path)
    tasks.call()
    tasks.call()  # a round may repeat it
    assert list(tmp_path.rglob("*.safetensors"))


def test_bands_are_counted():
    """In-place products are arithmetic too: torch's counter leaves them out."""
    x = torch.zeros(2, 3, 4)
    assert meters.flops(lambda: torch.zeros(2, 3, 3).baddbmm_(x, x.mT)) == 2 * 2 * 3 * 4 * 3


def test_peak_memory_is_of_one_call():
    """The high-water mark starts again with each call, and covers what is freed before it ends."""
    meter = meters.CPU(threads=1)
    large = meter.measure(lambda: torch.ones(2**26).sum(), 0)
    small = meter.measure(lambda: torch.ones(2**20).sum(), 0)
    assert large["peak"] - small["peak"] == pytest.approx(256 - 4, abs=32)


def test_every_case_of_the_plan():
    names = [case.name for case in cases(["vit_b"], ["float32", "bfloat16"], [1, 8], compiled=True)]
    assert len(set(names)) == len(names)
    for part in ("encoder-b1", "encoder-b8", "lora-b1", "lora-b8", "decoder-1", "decoder-64", "decoder-256"):
        assert {f"{part} vit_b float32", f"{part} vit_b bfloat16"} <= set(names)
    assert {"load vit_b float32", "convert vit_b float32", "encoder-512 vit_b float32"} <= set(names)
    peers = {peer for case in cases(["vit_b"], ["float32"], [1], compiled=True) for peer in case.peers}
    assert peers == TITLES.keys()
    assert all(any(target.case == name.split()[0] for name in names) or "." in target.case for target in TARGETS)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("measured")
    done = run("--only", "encoder-128", out=out)
    assert done.returncode == 0, done.stderr
    return out


def test_run(measured):
    results = Results.read(measured / "quick-cpu.json")
    (case,) = results.cases.values()
    assert case["done"] == 1
    for peer in ("ours", REFERENCE):
        figures = case["figures"][peer]
        assert len(figures["seconds"]) == 1
        assert figures["peak"][0] > figures["added"][0] > 0
        assert figures["flops"] > 1e6
    assert case["figures"]["ours"]["difference"] < 1e-5
    assert results.gemm_peak["float32"] > 1e9
    text = (measured / "quick-cpu.md").read_text()
    assert "**SamSplit**" in text
    assert "transformers, sdpa" in text


def test_run_goes_on_where_it_was(measured):
    before = (measured / "quick-cpu.json").read_text()
    done = run("--only", "encoder-128", out=measured)
    assert done.returncode == 0
    assert "there already" in done.stdout
    assert (measured / "quick-cpu.json").read_text() == before


def test_figures_of_another_model_are_refused(measured, tmp_path):
    found = json.loads((measured / "quick-cpu.json").read_text())
    found["machine"]["sam_split"] = "another"
    (tmp_path / "quick-cpu.json").write_text(json.dumps(found))
    done = run("--only", "encoder-128", out=tmp_path)
    assert done.returncode == 2
    assert "--fresh" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_package_is_reported(tmp_path, monkeypatch, capsys):
    (tmp_path / "timm.py").write_text("raise ModuleNotFoundError(\"No module named 'timm'\")\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results = Results(tmp_path / "cpu.json", MACHINE)
    case = replace(TINY["encoder-b1"], peers=("timm",))
    rounds.run_case(case, rounds.Setting("cpu", 1, 1, False, 0.02), 1, str(tmp_path), results)
    text = report.markdown(Results.read(tmp_path / "cpu.json"), None)
    assert "| timm samvit | not measured: ModuleNotFoundError: No module named 'timm' |" in text


def synthetic(path: Path) -> Results:
    """Two rounds of the encoder in which ours takes 1 and 2 seconds and stock 3 and 4."""
    results = Results(path, MACHINE, {"float32": 1e9})
    (case,) = (c for c in cases(["vit_b"], ["float32"], [1]) if c.name.startswith("encoder-b1"))
    results.start(case)
    for ours, theirs in ((1.0, 3.0), (2.0, 4.0)):
        results.add(case, "ours", {"seconds": ours, "wall": ours, "added": 10.0, "peak": 50.0, "sample": [1.0, 2.0]})
        results.add(case, REFERENCE, {"seconds": theirs, "wall": 0, "added": 40.0, "peak": 80.0, "sample": [1.0, 4.0]})
    results.note(case, "ours", {"flops": 3e8})
    results.failed(case, "meta", "ImportError: a|b")
    return results


def test_report(tmp_path):
    results = synthetic(tmp_path / "cpu.json")
    assert "Image encoder" not in report.markdown(results, None), "a case that is not done yet"
    (case,) = (c for c in cases(["vit_b"], ["float32"], [1]) if c.name.startswith("encoder-b1"))
    assert not results.has(case, 2)
    results.finish(case, 2)
    text = report.markdown(Results.read(tmp_path / "cpu.json"), "cpu.png")
    row = "| **SamSplit** | 1.5 (1 to 2) | 2.50 (2.00 to 3.00) | 10 | 0.25 | 50 | 0.62 | 0 | 20% | 5e-01 |"
    assert row in text
    assert "| encoder forward, faster | float32 | 2.50 (2.00 to 3.00) | at least 1.35 | 2.1 | stretch |" in text
    assert "| encoder forward, added memory | float32 | 0.250 | at most 0.17 | 0.1 | **no** |" in text
    assert "| segment-anything (Meta) | not measured: ImportError: a/b |" in text
    assert "](cpu.png)" in text


def test_stop_in_the_middle_keeps_figures(tmp_path):
    """Every figure is on disk at once; a case that was not finished is measured again, in full."""
    synthetic(tmp_path / "cpu.json")
    results = Results.open(tmp_path / "cpu.json", {**MACHINE, "date": "tomorrow"}, fresh=False)
    (found,) = results.cases.values()
    assert found["figures"]["ours"]["seconds"] == [1.0, 2.0]
    assert found["done"] == 0
    with pytest.raises(UnlikeError, match=r"'device'.*--fresh"):
        Results.open(tmp_path / "cpu.json", {**MACHINE, "device": "there"}, fresh=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float16"], "'float16' is none of float32, bfloat16"),
        (["--rounds", "0"], "'0' is no positive number"),
        (["--only", "("], "no regular expression"),
        (["--model", "tiny"], "'tiny' is none of vit_b, vit_l, vit_h"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_no_case(capsys):
    assert command.main(["--only", "decoding"]) == 2
    assert "--list" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    for option in ("--quick", "--only", "--rounds", "--device", "--dtype", "--compile", "--fresh", "--report"):
        assert option in text
    assert "examples:" in text


def test_plot(measured, tmp_path):
    """Drawn when all parts are there, and left out of the report when they are not."""
    from benchmarks.plot import draw

    results = Results.read(measured / "quick-cpu.json")
    assert not draw(results, tmp_path / "none.png")
    (found,) = results.cases.values()
    for case in TINY.values():
        results.cases[case.name] = {**asdict(case), "peers": list(case.peers), "done": 1, "figures": found["figures"]}
    assert draw(results, tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 10_000
    assert isinstance(TINY["load"], Case)
    assert set(MODELS) == {"vit_b", "vit_l", "vit_h", "tiny"}
