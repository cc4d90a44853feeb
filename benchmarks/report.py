"""The figures as Markdown and as a plot."""

import statistics
from collections.abc import Iterator
from pathlib import Path

from .cases import REFERENCE, TARGETS, TITLES, Target
from .results import Results, Run


def write(results: Results, folder: Path, name: str) -> list[Path]:
    """Write `name`.md, and `name`.png if matplotlib is there; returns the paths of all that is written."""
    picture = folder / f"{name}.png"
    written = [results.path, folder / f"{name}.md"]
    try:
        from .plot import draw
    except ModuleNotFoundError as error:
        picture = None
        print(f"no plot: {error}")
    else:
        if draw(results, picture):
            written.append(picture)
        else:
            picture = None
    written[1].write_text(markdown(results, picture.name if picture else None), encoding="utf-8")
    return written


def markdown(results: Results, picture: str | None) -> str:
    """The whole report."""
    blocks = [_header(results), _over_runs(results)]
    if picture:
        blocks.append(f"![time and memory of every peer]({picture})")
    blocks += [_case(results, name) for name in results.case_names()]
    blocks.append(_profiles(results))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _header(results: Results) -> str:
    threads = results.runs[0].about["threads"]
    time, memory = "the time between CUDA events", "torch's `max_memory_allocated`"
    if threads is not None:
        memory = "the peak resident size of the process, with the interpreter, the libraries and the weights"
        time = "CPU seconds of one thread" if threads == 1 else "wall-clock seconds"
    lines = [
        f"# SamSplit and its peers on {'a GPU' if threads is None else 'a CPU'}",
        "",
        "Written by `python -m benchmarks`.",
        "",
        _row(["run", "device", "system", "libraries", "model files", "best matrix product, GFLOP/s", "remark"]),
        "|---" * 7 + "|",
    ]
    for label, run in zip(results.labels(), results.runs, strict=True):
        versions = ", ".join(f"{package} {version}" for package, version in run.about["versions"].items())
        peaks = ", ".join(f"{peak / 1e9:,.0f} in {dtype}" for dtype, peak in run.gemm_peak.items())
        about = run.about
        cells = [label, about["device"], about["system"], versions, about["sam_split"], peaks, run.remark]
        lines.append(_row([cell or "-" for cell in cells]))
    lines += [
        "",
        f"Time is {time}; memory is {memory}. All peers hold the same random weights. Each runs in its own process, "
        "they take turns, and each call that is timed follows one that is not. Ratios are taken within a round, "
        "beside transformers' sdpa: median (minimum to maximum). GFLOP counts what a peer computes; the share of the "
        "peak is GFLOP over time, as part of the machine's best matrix product. Difference is the largest one from "
        "transformers' sdpa, as part of the largest output.",
    ]
    return "\n".join(lines)


def summary(results: Results) -> str:
    """The ranges over all runs, a row for each figure beside transformers' sdpa: docs/speed.md's table."""
    rows: dict[str, dict[str, str]] = {}
    for target, name, found in _followed(results):
        if target.against == REFERENCE:
            ratios = [ratio for ratios in found for ratio in ratios]
            rows.setdefault(target.title, {})[name.split()[2]] = _range(ratios, _form(target))
    dtypes = sorted({dtype for row in rows.values() for dtype in row}, reverse=True)
    lines = [_row([title, *(row.get(dtype, "-") for dtype in dtypes)]) for title, row in rows.items()]
    return "\n".join([_row(["ViT-B, beside transformers' `sdpa`", *dtypes]), "|---" * (1 + len(dtypes)) + "|", *lines])


def _followed(results: Results) -> Iterator[tuple[Target, str, list[list[float]]]]:
    """Each target and case that some run has figures for, and their ratios run by run."""
    device = "cuda" if results.runs[0].about["threads"] is None else "cpu"
    names = list(dict.fromkeys([*results.case_names(), *(name for run in results.runs for name in run.told)]))
    for target in TARGETS:
        for name in names:
            found = [run.ratios(name, target.peer, target.figure, target.against) for run in results.runs]
            if target.applies(name, device) and any(found):
                yield target, name, found


def _over_runs(results: Results) -> str:
    """The figures that targets name, a column for each run and one for the range of all rounds."""
    lines = []
    for target, name, found in _followed(results):
        rounds, form = [ratio for ratios in found for ratio in ratios], _form(target)
        cells = [
            _range(ratios, form) if name in run.told else _spread(ratios, form)
            for run, ratios in zip(results.runs, found, strict=True)
        ]
        side = "at least" if target.more_is_better else "at most"
        limits = ["-", "-"] if target.limit is None else [f"{side} {target.limit}", str(target.stretch)]
        part, _, dtype = name.split()
        label = f"{dtype}, batch {part[-1]}" if results.runs[0].about["threads"] is None else dtype
        lines.append(_row([target.title, label, *cells, _range(rounds, form), *limits, target.met(rounds)]))
    if not lines:
        return ""
    head = ["ViT-B, beside transformers' sdpa where nothing else is said", "", *results.labels()]
    head += ["all rounds", "target", "stretch", "met in every round"]
    return "\n".join(["## Over all runs", "", _row(head), "|---" * len(head) + "|", *lines])


def _form(target: Target) -> str:
    return {"faster": ".2f", "share": ".0%"}.get(target.figure, ".3f")


def _range(values: list[float], form: str) -> str:
    if not values:
        return "-"
    least, most = format(min(values), form), format(max(values), form)
    return least if least == most else f"{least} to {most}"


def _spread(values: list[float], form: str = ".2f") -> str:
    span = _range(values, form)
    return span if " to " not in span else f"{statistics.median(values):{form}} ({span})"


def _case(results: Results, name: str) -> str:
    runs = [(label, run) for label, run in zip(results.labels(), results.runs, strict=True) if _done(run, name)]
    measured = [figures for _, run in runs for figures in run.cases[name]["figures"].values()]
    compared = any(REFERENCE in run.cases[name]["figures"] for _, run in runs)
    counted = any(figures.get("flops") for figures in measured)
    on_cpu = runs[0][1].about["threads"] is not None
    head = ["run", "", "seconds"] + ["of these system"] * on_cpu + ["times as fast"] * compared
    head += ["added MB"] + ["of sdpa's"] * compared + ["peak MB"] + ["of sdpa's"] * compared
    head += ["GFLOP", "of peak"] * counted + ["difference"] * compared
    lines = [f"## {runs[0][1].cases[name]['title']}", "", _row(head), "|---|---" + "|---:" * (len(head) - 2) + "|"]
    for label, run in runs:
        for peer, figures in run.cases[name]["figures"].items():
            if "failure" in figures:
                why = f"not measured: {figures['failure'].replace('|', '/')}"
                lines.append(_row([label, TITLES[peer], why] + [""] * (len(head) - 3)))
                continue
            cells = [label, TITLES[peer], _spread(figures["seconds"], ".3g")]
            if on_cpu:
                cells.append(_spread(figures["system"], ".2g") if "system" in figures else "not known")
            if compared:
                cells.append(_spread(run.ratios(name, peer, "faster")))
            for figure in ("added", "peak"):
                cells.append(_spread(figures.get(figure, []), ",.0f"))
                if compared:
                    cells.append(_spread(run.ratios(name, peer, figure)))
            if counted:
                share = run.ratios(name, peer, "share")
                cells += [f"{figures['flops'] / 1e9:,.0f}", f"{statistics.median(share):.0%}"] if share else ["-", "-"]
            if compared:
                cells.append(f"{figures['difference']:.0e}" if "difference" in figures else "-")
            lines.append(_row(cells))
    return "\n".join(lines)


def _done(run: Run, name: str) -> bool:
    return name in run.cases and run.cases[name]["done"] > 0


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _profiles(results: Results) -> str:
    """Where the time goes, by operator or kernel: six of each, and attention's."""
    lines = []
    for label, run in zip(results.labels(), results.runs, strict=True):
        for case in run.cases.values():
            for peer, figures in case["figures"].items():
                if not case["done"] or not figures.get("profile"):
                    continue
                ranked = list(figures["profile"].items())
                kept = ranked[:6] + [(n, share) for n, share in ranked[6:] if "attention" in n.lower() or "fmha" in n]
                names = "; ".join(f"`{n}` {share:.0%}" for n, share in kept)
                lines.append(_row([label, case["title"], TITLES[peer], names]))
    if not lines:
        return ""
    return "\n".join(["## Where the time goes", "", "| run | | | operators or kernels |", "|---|---|---|---|", *lines])
