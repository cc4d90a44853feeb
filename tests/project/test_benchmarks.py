"""The benchmarks measure what they say: one model for all peers, a process for each, figures that are never mixed."""

import mmap
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import meters, report, rounds
from benchmarks.cases import MODELS, REFERENCE, TARGETS, TITLES, Case, Target, cases
from benchmarks.results import Results, Run
from benchmarks.tasks import PADDINGS, Tasks
from sam_split import CODE_FILES, attention_sam_split, products_sam_split

ROOT = Path(__file__).parents[2]
ENCODER = next(case for case in cases(["vit_b"], ["float32"], [1]) if case.name.startswith("encoder-b1"))
TINY = {case.name.split()[0]: case for case in cases(["tiny"], ["float32"], [1])}
ABOUT = {
    "date": "2026-01-02",
    "device": "here",
    "threads": 1,
    "system": "this",
    "versions": {"torch": "2"},
    "sam_split": "abc",
}


def run(*arguments, out):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--rounds", "1", "--out", str(out), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("case", ["encoder-b1", "decoder-64", "lora-b1"])
def test_peers_compute_the_same(case, tmp_path, monkeypatch):
    """Otherwise a ratio between them would mean nothing. torch.compile is left to a run that asks for it."""
    monkeypatch.setattr(products_sam_split, "ONEDNN", False)  # whose operations torch does not count
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


def test_generators_find_the_same(tmp_path):
    """About a third of the masks, by every peer; they resize the image by their own means, so edges may differ."""
    outputs = {
        peer: Tasks(asdict(TINY["everything-64"]), peer, "cpu", tmp_path).call()
        for peer in TINY["everything-64"].peers
    }
    reference = outputs.pop(REFERENCE)
    assert 1 <= reference.max()
    for peer, output in outputs.items():
        assert (output != reference).float().mean() < 0.01, peer


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


@pytest.mark.parametrize("peer", PADDINGS)
def test_paddings_compute_the_same(peer, tmp_path, monkeypatch):
    """In the fused call, which a CPU takes when it is asked for it."""
    monkeypatch.setattr(attention_sam_split, "attention_path", lambda *_: "folded")
    shapes, fused = [], torch.nn.functional.scaled_dot_product_attention

    def seen(query, key, value, **options):
        shapes.append((key.shape[-1], value.shape[-1]))
        return fused(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    chosen = Tasks(asdict(TINY["encoder-b1"]), "ours", "cpu", tmp_path).call()
    assert set(shapes) == {(32, 32), (48, 48)}, "7 rows and columns in windows, 16 elsewhere, 16 channels"
    shapes.clear()
    monkeypatch.setattr(attention_sam_split, "kernel_widths", attention_sam_split.kernel_widths)  # to be put back
    other = Tasks(asdict(TINY["encoder-b1"]), peer, "cpu", tmp_path).call()
    assert set(shapes) == ({(32, 16), (48, 16)} if peer == "ours_narrow" else {(32, 32), (48, 48)})
    assert PADDINGS[peer](192, 64) == {"narrow": (192, 64), "equal": (192, 192), "cudnn": (192, 128)}[peer[5:]]
    torch.testing.assert_close(other, chosen, rtol=0, atol=1e-5 * chosen.abs().max().item())


def test_products_in_place_are_counted():
    """In-place products are arithmetic too: torch's counter leaves them out."""
    x = torch.zeros(2, 3, 4)
    assert meters.flops(lambda: torch.zeros(2, 3, 3).baddbmm_(x, x.mT)) == 2 * 2 * 3 * 4 * 3


def test_peak_memory_is_of_one_call():
    """The high-water mark starts again with each call, and covers what is freed before it ends."""
    meter = meters.CPU(threads=1)
    meter.rest()  # as a worker does: what other tests have freed would be used again, and no page be new
    large = meter.measure(lambda: torch.ones(2**26).sum(), 0)
    meter.rest()
    small = meter.measure(lambda: torch.ones(2**20).sum(), 0)
    assert large["peak"] - small["peak"] == pytest.approx(256 - 4, abs=32)


def test_the_systems_share_of_the_time_is_apart():
    """Fresh pages cost the system's time, arithmetic the process's own."""

    def fresh_pages():
        # Asked for beside torch's allocator, given back at once, and touched: a page fault every 4 KiB.
        pages = mmap.mmap(-1, 2**28)
        for start in range(0, 2**28, 4096):
            pages[start] = 1
        pages.close()

    meter = meters.CPU(threads=1)
    x = torch.randn(500, 500)
    faults, products = meter.measure(fresh_pages, 0), meter.measure(lambda: x @ x, 0.5)
    for measured in (faults, products):
        assert measured["user"] + measured["system"] == pytest.approx(measured["seconds"], rel=0.1, abs=0.02)
    assert faults["system"] > 0.2 * faults["seconds"]
    assert products["system"] < 0.1 * products["seconds"]


def test_every_case_of_the_plan():
    names = [case.name for case in cases(["vit_b"], ["float32", "bfloat16"], [1, 8], compiled=True)]
    assert len(set(names)) == len(names)
    for part in ("encoder-b1", "encoder-b8", "lora-b1", "lora-b8", "decoder-1", "decoder-64", "decoder-256"):
        assert {f"{part} vit_b float32", f"{part} vit_b bfloat16"} <= set(names)
    assert {"load vit_b float32", "convert vit_b float32", "encoder-512 vit_b float32"} <= set(names)
    planned = cases(["vit_b"], ["float32"], [1], compiled=True, paddings=True)
    peers = {peer for case in planned for peer in case.peers}
    assert peers == TITLES.keys()
    for target in TARGETS:
        assert any(re.fullmatch(target.case, name.split()[0]) for name in names), target
        assert (target.limit is None) == (target.stretch is None), target


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("measured")
    done = run("--only", "encoder-128|convert", "--peers", "ours", out=out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.night
def test_run(measured):
    results = Results.read(measured / "quick-cpu.json")
    (case,) = results.run.cases.values()
    assert case["done"] == 1
    assert case["figures"].keys() == {"ours", REFERENCE}
    for figures in case["figures"].values():
        assert len(figures["seconds"]) == 1
        assert figures["user"][0] + figures["system"][0] == pytest.approx(figures["seconds"][0], abs=0.05)
        assert figures["peak"][0] > figures["added"][0] > 0
        assert figures["flops"] > 1e6
    assert case["figures"]["ours"]["difference"] < 1e-5
    assert results.run.gemm_peak["float32"] > 1e9
    text = (measured / "quick-cpu.md").read_text()
    assert "**SamSplit**" in text
    assert "transformers, sdpa" in text


@pytest.mark.slow
@pytest.mark.night
def test_run_goes_on_where_it_was(measured):
    before = (measured / "quick-cpu.json").read_text()
    done = run("--only", "encoder-128", out=measured)
    assert done.returncode == 0
    assert "there already" in done.stdout
    assert (measured / "quick-cpu.json").read_text() == before


def test_runs_of_other_days_machines_and_code_are_kept_apart(tmp_path):
    path = tmp_path / "cpu.json"
    synthetic(path)
    for about in ({"date": "2026-01-03"}, {"device": "there"}, {"sam_split": "def"}):
        results = Results.open(path, ABOUT | about)
        assert results.run.cases == {}
        results.save()
    assert Results.open(path, ABOUT | about).run.about == ABOUT | about, "goes on"
    again = Results.open(path, ABOUT | about, again=True)
    assert [run.about for run in again.runs[-2:]] == [ABOUT | about] * 2
    assert list(again.labels()) == ["2026-01-02", "2026-01-03", "2026-01-02 b", "2026-01-02 c", "2026-01-02 d"]
    (case,) = again.runs[0].cases.values()
    assert case["figures"]["ours"]["seconds"] == [1.0, 2.0]


def test_missing_package_is_reported(tmp_path, monkeypatch, capsys):
    (tmp_path / "timm.py").write_text("raise ModuleNotFoundError(\"No module named 'timm'\")\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results = Results.open(tmp_path / "cpu.json", ABOUT)
    case = replace(TINY["encoder-b1"], peers=("timm",))
    rounds.run_case(case, rounds.Setting("cpu", 1, 1, False, 0.02), 1, str(tmp_path), results)
    text = report.markdown(Results.read(tmp_path / "cpu.json"), None)
    assert "| timm samvit | not measured: ModuleNotFoundError: No module named 'timm' |" in text


def synthetic(path: Path) -> Results:
    """Two rounds of the encoder in which ours takes 1 and 2 seconds and stock 3 and 4."""
    results = Results(path, [Run(ABOUT, {"float32": 1e9})])
    run = results.run
    run.start(ENCODER)
    for ours, theirs in ((1.0, 3.0), (2.0, 4.0)):
        common = {"seconds": ours, "wall": ours, "user": 0.75, "system": ours - 0.75}
        run.add(ENCODER, "ours", {**common, "added": 10.0, "peak": 50.0, "sample": [1.0, 2.0]})
        run.add(ENCODER, REFERENCE, {"seconds": theirs, "wall": 0, "added": 40.0, "peak": 80.0, "sample": [1.0, 4.0]})
    run.note(ENCODER, "ours", {"flops": 3e8})
    run.failed(ENCODER, "meta", "ImportError: a|b")
    results.save()
    return results


def test_report(tmp_path):
    results = synthetic(tmp_path / "cpu.json")
    assert "Image encoder" not in report.markdown(results, None), "a case that is not done yet"
    assert not results.run.has(ENCODER, 2)
    results.run.finish(ENCODER, 2)
    results.save()
    results = Results.open(tmp_path / "cpu.json", ABOUT | {"date": "2026-01-03"})
    results.run.told = {ENCODER.name: {"ours": {"faster": [1.25, 1.5]}}}
    results.run.remark = "told"
    results.save()
    text = report.markdown(Results.read(tmp_path / "cpu.json"), "cpu.png")
    first = "| 2026-01-02 | **SamSplit** | 1.5 (1 to 2) | 0.75 (0.25 to 1.2) | 2.50 (2.00 to 3.00) | 10 | 0.25 | 50 |"
    assert f"{first} 0.62 | 0 | 22% | 5e-01 |" in text
    assert "| 2026-01-02 | transformers, sdpa | 3.5 (3 to 4) | not known | 1.00 |" in text
    assert "| 2026-01-03 | here | this | torch 2 | abc | - | told |" in text
    ratios = "| float32 | 2.50 (2.00 to 3.00) | 1.25 to 1.50 | 1.25 to 3.00 |"
    assert f"| image encoder, times as fast {ratios} at least 1.35 | 2.1 | **no** |" in text
    assert "| image encoder, added memory | float32 | 0.250 | - | 0.250 | at most 0.17 | 0.1 | **no** |" in text
    assert (
        "| image encoder, share of the best matrix product | float32 | 22% (15% to 30%) | - | 15% to 30% | - | - | - |"
        in text
    )
    assert "| segment-anything (Meta) | not measured: ImportError: a/b |" in text
    assert "](cpu.png)" in text


@pytest.mark.parametrize(
    ("figure", "values", "met"),
    [
        ("faster", [1.4, 2.0], "yes"),
        ("faster", [1.3, 9.9], "**no**"),
        ("faster", [3.0, 3.1], "stretch"),
        ("added", [1.4, 9.9], "**no**"),
        ("added", [0.1, 1.3], "yes"),
        ("added", [0.1], "stretch"),
    ],
)
def test_the_least_favourable_round_decides(figure, values, met):
    limit, stretch = (1.35, 2.1) if figure == "faster" else (1.35, 0.5)
    assert Target("", "", figure, limit, stretch).met(values) == met


def test_stop_in_the_middle_keeps_figures(tmp_path):
    """Every figure is on disk at once; a case that was not finished is measured again, in full."""
    synthetic(tmp_path / "cpu.json")
    results = Results.open(tmp_path / "cpu.json", ABOUT)
    (found,) = results.run.cases.values()
    assert found["figures"]["ours"]["seconds"] == [1.0, 2.0]
    assert found["done"] == 0
    assert not results.run.has(ENCODER, 1)


def test_the_models_files_are_known_by_all_that_travel():
    assert {path.name for path in rounds.MODEL_FILES} == set(CODE_FILES)


def test_stored_runs_are_whole():
    """What is committed can be read and added to, and the report is the one of these figures."""
    folder = ROOT / "benchmarks/results"
    results = Results.read(folder / "cpu.json")
    assert report.markdown(results, "cpu.png") == (folder / "cpu.md").read_text(encoding="utf-8")
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d( [b-z])?", label) for label in results.labels())
    assert all(run.cases or run.told for run in results.runs)


def test_pages_quote_the_rows_of_their_titles(tmp_path, monkeypatch):
    """Each row in the place of the one with its title; other tables and text stay."""
    results, page = Results.read(ROOT / "benchmarks/results/cpu.json"), tmp_path / "page.md"
    head, _, row, *_ = report.summary(results).splitlines()
    text = f"# Page\n\n{head}\n|---|---|---|\n{row}\n\n| another | table |\n|---|---|\n| 1 | 2 |\n"
    page.write_text(text.replace(row, f"|{row.split('|')[1]}| 9.99 | - |"))
    monkeypatch.setattr(command, "QUOTING", [page])
    command.quote(results)
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float16"], "'float16' is none of float32, bfloat16"),
        (["--rounds", "0"], "'0' is no positive number"),
        (["--only", "("], "no regular expression"),
        (["--model", "tiny"], "'tiny' is none of vit_b, vit_l, vit_h"),
        (["--peers", "us"], "'us' is none of ours, "),
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
    for option in "quick only peers rounds device dtype batch model compile again report out threads profile".split():
        assert f"--{option}" in text
    assert "examples:" in text


@pytest.mark.slow
def test_plot(tmp_path):
    """Drawn when all parts are there, and left out of the report when they are not."""
    from benchmarks.plot import draw

    results = synthetic(tmp_path / "cpu.json")
    assert not draw(results, tmp_path / "none.png")
    (found,) = results.run.cases.values()
    for case in TINY.values():
        results.run.cases[case.name] = {**asdict(case), "done": 1, "figures": found["figures"]}
    assert draw(results, tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 10_000
    assert isinstance(TINY["load"], Case)
    assert set(MODELS) == {"vit_b", "vit_l", "vit_h", "tiny"}
