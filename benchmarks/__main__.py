"""`python -m benchmarks`: run the cases, write the figures down after each round, and report them."""

import argparse
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from . import report
from .cases import MODELS, REFERENCE, TITLES, Case, cases
from .results import Results
from .rounds import Setting, about, gemm_peak, model_code, run_case

RESULTS = Path(__file__).parent / "results"
QUOTING = [Path(__file__).parents[1] / name for name in ("README.md", "docs/speed.md")]

DESCRIPTION = """\
Measure SamSplit beside stock transformers (eager, sdpa), Meta's segment-anything, timm's samvit and stock with LoRA on
its fused qkv: image encoder, LoRA step, mask decoder, loading, converting. Weights are random; nothing is downloaded.

Each peer runs in its own process. The peers take turns, so that other work on the machine affects all of them alike.
Each ratio is taken within a round; the report gives its median, minimum and maximum.
  on a CPU   time is CPU seconds of one thread, user and system apart; memory is the peak resident size (VmHWM, Linux).
  on a GPU   time is between CUDA events; memory is torch's max_memory_allocated.
"""

EPILOG = """\
examples:
  python -m benchmarks                       everything in float32 on the CPU; about half an hour
  python -m benchmarks --only encoder        the image encoder only
  python -m benchmarks --peers ours,stock_sdpa --only 'encoder-b1|decoder-64' --rounds 2
  python -m benchmarks --dtype bfloat16 --rounds 1
  python -m benchmarks --device cuda         float32 and bfloat16, batch 1 and 8, all paddings, kernels named
  python -m benchmarks --device cuda --compile --only 'encoder|lora'
  python -m benchmarks --model vit_h --only encoder
  python -m benchmarks --quick               a tiny model, to see that all of this works; its figures mean nothing
  python -m benchmarks.convert_peak          converting at ViT-H's size, beside a plain copy of the file
  python -m benchmarks --report              write the report again from the figures on disk

Runs are added to the file of results, and the report shows the range over all of them. A run that was stopped goes on
on the same day: cases that are done are not measured again. Another day, machine, library version or model file starts
a new run, so figures are never mixed.
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose name matches; --list shows the names")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", type=listed("float32", "bfloat16"), help="default: float32; on a GPU both")
    parser.add_argument("--batch", type=numbers, help="images at once, such as 1,8; default: 1; on a GPU 1,8")
    models = listed(*(model for model in MODELS if model != "tiny"))
    parser.add_argument(
        "--model", type=models, default=["vit_b"], help="vit_b, vit_l, vit_h or several; default: vit_b"
    )
    parser.add_argument(
        "--peers", type=listed(*TITLES), help=f"measure only these, and {REFERENCE} beside them; default: all"
    )
    parser.add_argument("--rounds", type=positive, default=3, help="timed rounds of each case; default: 3")
    parser.add_argument("--threads", type=positive, default=1, help="on a CPU; with more than one, time is wall-clock")
    parser.add_argument("--compile", action="store_true", help="ours and stock sdpa under torch.compile as well")
    parser.add_argument(
        "--profile", action="store_true", help="also where the time of ours and of stock sdpa goes (a GPU: always)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report; default: %(default)s")
    parser.add_argument("--again", action="store_true", help="start a new run, though this day has one")
    parser.add_argument("--quick", action="store_true", help="a tiny model; the report is called quick")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the report again")
    arguments = parser.parse_args(argv)
    on_gpu = arguments.device == "cuda"
    arguments.dtype = arguments.dtype or ["float32", "bfloat16"][: 1 + on_gpu]
    arguments.batch = arguments.batch or [1, 8][: 1 + on_gpu]
    if arguments.quick:
        arguments.model = ["tiny"]
    try:
        arguments.only = re.compile(arguments.only)
    except re.error as error:
        parser.error(f"--only {arguments.only!r} is no regular expression: {error}")
    return arguments


def listed(*allowed: str):
    """A parser of names parted by commas."""

    def names(text: str) -> list[str]:
        given = text.split(",")
        for name in given:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
        return given

    return names


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def numbers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    on_gpu = arguments.device == "cuda"
    chosen = cases(arguments.model, arguments.dtype, arguments.batch, arguments.compile, paddings=on_gpu)
    chosen = [case for case in chosen if arguments.only.search(case.name)]
    if arguments.peers:
        kept = [(case, tuple(p for p in case.peers if p in {*arguments.peers, REFERENCE})) for case in chosen]
        chosen = [replace(case, peers=peers) for case, peers in kept if set(peers) - {REFERENCE}]
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if not chosen:
        return fail(f"--only {arguments.only.pattern!r} leaves no case for these peers; --list alone shows all names")
    name = f"quick-{arguments.device}" if arguments.quick else arguments.device
    try:
        if arguments.report:
            results = Results.read(arguments.out / f"{name}.json")
        else:
            setting = Setting(
                device=arguments.device,
                threads=arguments.threads,
                rounds=arguments.rounds,
                profile=arguments.profile or arguments.device == "cuda",
                scale=0.02 if arguments.quick else 1.0,
            )
            results = Results.open(arguments.out / f"{name}.json", about(setting), arguments.again)
            measure(chosen, setting, results)
    except (FileNotFoundError, RuntimeError) as error:
        return fail(str(error))
    written = report.write(results, arguments.out, name)
    if arguments.out == RESULTS and name == "cpu":
        quote(results)
        written += QUOTING
    print("\n".join(str(path) for path in written))
    return 0


def quote(results: Results) -> None:
    """Put the ranges over all runs into the tables of the pages: each row in the place of the one with its title."""
    rows = {row.split("|")[1]: row for row in report.summary(results).splitlines()}
    for page in QUOTING:
        lines = page.read_text(encoding="utf-8").split("\n")
        lines = [rows.get(line.split("|")[1], line) if line.startswith("| ") else line for line in lines]
        page.write_text("\n".join(lines), encoding="utf-8")


def measure(chosen: list[Case], setting: Setting, results: Results):
    """All cases that the last run lacks; the figures so far are on disk whenever this stops."""
    run = results.run
    for dtype in dict.fromkeys(case.dtype for case in chosen):
        if dtype not in run.gemm_peak:
            run.gemm_peak[dtype] = gemm_peak(setting, dtype)
            results.save()
    for index, case in enumerate(chosen, 1):
        if model_code() != run.about["sam_split"]:
            raise RuntimeError("the model's files were changed during the run; run again, which starts a new one")
        rounds = 1 if case.memory_only else setting.rounds
        if run.has(case, rounds):
            print(f"[{index}/{len(chosen)}] {case.name}: there already", flush=True)
            continue
        print(f"[{index}/{len(chosen)}] {case.title}", flush=True)
        with tempfile.TemporaryDirectory(prefix="sam-split-benchmarks-") as folder:
            run_case(case, setting, rounds, folder, results)
        ours, reference = (run.median(case.name, peer, "seconds") for peer in (case.peers[0], REFERENCE))
        if ours and reference:
            print(f"    {reference / ours:.2f} x as fast as transformers' sdpa", flush=True)


def fail(message: str) -> int:
    print(f"benchmarks: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
