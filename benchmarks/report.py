"""The figures as Markdown and as a plot."""

import statistics
from pathlib import Path

from .cases import REFERENCE, TARGETS, TITLES
from .results import Results


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
    written[1].write_text(markdown(results, picture.name if picture else None))
    return written


def markdown(results: Results, picture: str | None) -> str:
    """The whole report."""
    cases = {name: case for name, case in results.cases.items() if case["done"]}
    blocks = [_header(results), _targets(results, cases)]
    if picture:
        blocks.append(f"![time and memory of every peer]({picture})")
    blocks += [_case(results, name, case) for name, case in cases.items()]
    blocks.append(_profiles(cases))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _header(results: Results) -> str:
    machine = results.machine
    on_cpu = machine["threads"] is not None
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    peaks = ", ".join(f"{peak / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, peak in results.gemm_peak.items())
    time = "between CUDA events"
    memory = "torch's `max_memory_allocated`"
    if on_cpu:
        memory = "the resident high-water mark of the process; interpreter, libraries and weights are part of the peak"
        one = machine["threads"] == 1
        time = "process CPU seconds on one thread" if one else f"wall-clock seconds on {machine['threads']} threads"
    return "\n".join(
        [
            f"# SamSplit and its peers on {machine['device']}",
            "",
            f"Written by `python -m benchmarks` on {machine['date']}. {machine['system']}; {versions}; SamSplit's two "
            f"files {machine['sam_split']}. Best matrix product of this machine: {peaks}.",
            "",
            f"Time is {time}; memory is {memory}. Peers hold the same random weights, run in processes of their own "
            "and take turns, each after a call that is not timed and fetches the memory; ratios are those of a "
            "round, median (minimum to maximum), beside transformers' sdpa. GFLOP counts what a peer computes; the "
            "share of the peak is that over time, as part of the machine's best matrix product. Difference is the "
            "largest from transformers' sdpa, as part of the largest output.",
        ]
    )


def _targets(results: Results, cases: dict) -> str:
    device = "cuda" if results.machine["threads"] is None else "cpu"
    lines = []
    for target in TARGETS:
        for name, case in cases.items():
            if not target.applies(case, device):
                continue
            found = _ratios(results, name, target.peer, target.figure, target.against)
            if not found:
                continue
            value, more = statistics.median(found), target.figure == "faster"
            met = "stretch" if (value >= target.stretch if more else value <= target.stretch) else "yes"
            if value < target.limit if more else value > target.limit:
                met = "**no**"
            sign, form = ("at least", ".2f") if more else ("at most", ".3f")
            dtype = case["dtype"] + (f", batch {case['batch']}" if device == "cuda" else "")
            limits = f"{sign} {target.limit} | {target.stretch}"
            lines.append(f"| {target.title} | {dtype} | {_spread(found, form)} | {limits} | {met} |")
    if not lines:
        return ""
    head = [
        "## Targets",
        "",
        "| ViT-B, beside transformers' sdpa where nothing else is said | | ratio | target | stretch | met |",
    ]
    return "\n".join([*head, "|---|---|---|---|---|---|", *lines])


def _ratios(results: Results, case: str, peer: str, figure: str, against: str = REFERENCE) -> list[float]:
    if figure == "faster":
        return results.ratios(case, peer, "seconds", lambda ours, theirs: theirs / ours, against)
    return results.ratios(case, peer, figure, lambda ours, theirs: ours / theirs, against)


def _spread(values: list[float], form: str = ".2f") -> str:
    if not values:
        return "-"
    middle, least, most = (format(f(values), form) for f in (statistics.median, min, max))
    return middle if least == most else f"{middle} ({least} to {most})"


def _case(results: Results, name: str, case: dict) -> str:
    compared = REFERENCE in case["figures"]
    counted = any(figures.get("flops") for figures in case["figures"].values())
    head = ["", "seconds"] + ["times as fast"] * compared + ["added MB"] + ["of sdpa's"] * compared
    head += ["peak MB"] + ["of sdpa's"] * compared + ["GFLOP", "of peak"] * counted + ["difference"] * compared
    lines = [f"## {case['title']}", "", _row(head), "|---" + "|---:" * (len(head) - 1) + "|"]
    for peer, figures in case["figures"].items():
        if "failure" in figures:
            lines.append(
                _row([TITLES[peer], f"not measured: {figures['failure'].replace('|', '/')}"] + [""] * (len(head) - 2))
            )
            continue
        seconds = results.median(name, peer, "seconds")
        cells = [TITLES[peer], _spread(figures["seconds"], ".3g")]
        if compared:
            cells.append(_spread(_ratios(results, name, peer, "faster")))
        for figure in ("added", "peak"):
            cells.append(_spread(figures.get(figure, []), ",.0f"))
            if compared:
                cells.append(_spread(_ratios(results, name, peer, figure)))
        if counted:
            flops, best = figures.get("flops"), results.gemm_peak.get(case["dtype"])
            cells += [f"{flops / 1e9:,.0f}", f"{flops / seconds / best:.0%}"] if flops and best else ["-", "-"]
        if compared:
            cells.append(f"{figures['difference']:.0e}" if "difference" in figures else "-")
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _profiles(cases: dict) -> str:
    """Where the time goes, by operator or kernel: five of each, and attention's."""
    lines = []
    for case in cases.values():
        for peer, figures in case["figures"].items():
            if figures.get("profile"):
                ranked = list(figures["profile"].items())
                kept = ranked[:6] + [(n, share) for n, share in ranked[6:] if "attention" in n.lower() or "fmha" in n]
                names = "; ".join(f"`{n}` {share:.0%}" for n, share in kept)
                lines.append(_row([case["title"], TITLES[peer], names]))
    if not lines:
        return ""
    return "\n".join(["## Where the time goes", "", "| | | operators or kernels |", "|---|---|---|", *lines])
