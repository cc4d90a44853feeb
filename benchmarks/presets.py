"""`python -m benchmarks.presets`: what each preset of `sam-split finetune` gains and costs, over several seeds."""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from unittest import mock

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModel, AutoProcessor

from conversion import convert
from conversion.cli.demo import TINY_SAM
from sam_split.training import PRESETS, evaluate, find_examples, finetuning, lora_config
from sam_split.training.finetuning import fit
from sam_split.training.report import MEASURED
from sam_split.training.settings import Settings
from sam_split.training.trainer import PromptTrainer

from . import fused_adapter

EXAMPLES = Path(__file__).parents[1] / "examples"
STARDIST = "stardist==0.9.2"
FUSED, BOX_ONLY = "stock's fused qkv", "box prompts only"
# Row of the table -> what it changes in the settings that all rows share.
ROWS = {
    **{preset: {"preset": preset} for preset in PRESETS},
    FUSED: {"preset": "fused"},
    BOX_ONLY: {"prompts": "box"},
}


class LoraPlus(PromptTrainer):
    """With LoRA+: B learns faster than A."""

    def create_optimizer(self, *given):
        options = {"lr": 2 / 3 * self.args.learning_rate, "loraplus_lr_ratio": 4}
        self.optimizer = create_loraplus_optimizer(self.model, torch.optim.AdamW, **options)
        return self.optimizer


HEADS = r".*(iou_prediction_head|output_hypernetworks_mlps)\..*"
# Row of the table -> what it changes in PEFT's config of the default preset; LoRA+ is an optimizer.
PEFT = {
    "rsLoRA": {"use_rslora": True, "lora_alpha": 16},
    "PiSSA": {"init_lora_weights": "pissa"},
    "LoRA+": {},
    "rank 64 in the heads": {"rank_pattern": {HEADS: 64}, "alpha_pattern": {HEADS: 128}},
}
ROWS |= {row: {} for row in PEFT}
COLUMNS = {**MEASURED, "error of predicted IoU": "error_1_click"}

DESCRIPTION = """\
Train every preset on two domains with the tiny SAM of this repository, and measure each adapter on held-out images.

All take the same steps on the same images. Beside the presets: LoRA on stock SamModel's fused qkv, and the default
preset with boxes as its only prompts, or with one of PEFT's own variants of LoRA. The table gives the mean over the
seeds with the smallest and the largest value. Times are seconds of one CPU thread, those of the evaluation after each
epoch included.

Each finished run is kept under OUT/DOMAIN/ROW/SEED; a command that was stopped goes on where it was. The images of
nuclei are those of stardist's wheel, which pip downloads (or --stardist names): it is read, not installed.
"""
EPILOG = """\
examples:
  python -m benchmarks.presets                                     both domains, three seeds
  python -m benchmarks.presets --domain coins --seeds 0 --only encoder decoder
"""


def parse(words):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.presets",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--domain", nargs="+", choices=DOMAINS, default=list(DOMAINS), help="default: both")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--steps", type=int, default=160, help="of each run; default: %(default)s")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate; default: %(default)s")
    parser.add_argument("--stardist", type=Path, metavar="WHEEL", help="the wheel, if it is here already")
    parser.add_argument("--out", type=Path, default=Path("presets"), help="folder of the runs; default: %(default)s")
    return parser.parse_args(words)


def coins(out, args):
    _run(sys.executable, EXAMPLES / "coins.py", out)


def nuclei(out, args):
    wheel = args.stardist
    if wheel is None:
        _run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", args.out, STARDIST)
        wheel = next(args.out.glob("stardist-*.whl"))
    _run(sys.executable, EXAMPLES / "nuclei.py", wheel, out)


DOMAINS = {"coins": coins, "nuclei": nuclei}


def _run(*command):
    if code := subprocess.run([str(word) for word in command]).returncode:
        sys.exit(code)  # it has said why


@dataclass
class Domain:
    """A base, the images to train and to test on, and the folder of the runs on them."""

    base: Path
    data: Path
    runs: Path

    def settings(self, row, seed, args):
        shared = {"val": str(self.data / "test"), "steps": args.steps, "lr": args.lr, "late_layers": 2, "quiet": True}
        return Settings(seed=seed, **shared, **ROWS[row])

    def measured(self, adapter=None):
        """The means of the evaluation of the base, or of the base with an adapter."""
        model = AutoModel.from_pretrained(self.base)
        if adapter:
            model = PeftModel.from_pretrained(model, adapter)
        examples = find_examples(self.data / "test")
        return evaluate(model, AutoProcessor.from_pretrained(self.base), examples, progress=False).means

    def run(self, row, seed, args):
        """The figures of one run, read if it has finished before."""
        settings, out = self.settings(row, seed, args), self.runs / row.replace(" ", "-") / str(seed)
        words = settings.command(self.base, self.data / "train", out)[2:]
        file = out / "presets.json"
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["settings"] != words:
                sys.exit(f"{out} was made with {shlex.join(found['settings'])}; name another --out")
            return found
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        train = fused_adapter.fit if row == FUSED else fit
        with variant(row):
            results = train(self.base, self.data / "train", out, settings)["results"]
        costs = {name: results[name] for name in ("trainable", "cpu_seconds_per_step", "steps")}
        found = {"settings": words, **costs, **self.measured(out / "adapter")}
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return found


def variant(row):
    """While it lasts, `fit` trains with what a row has of PEFT's."""
    changed = PEFT.get(row, {})
    config = lambda *given: replace(lora_config(*given), **changed)  # noqa: E731
    trainer = LoraPlus if row == "LoRA+" else PromptTrainer
    return mock.patch.multiple(finetuning, lora_config=config, PromptTrainer=trainer)


def table(base, rows):
    """Row -> the figures of its runs, as a table in Markdown; the first line is the base."""
    lines = [["", *COLUMNS, "trained", "s/step"], ["---", *["---:"] * (len(COLUMNS) + 2)]]
    lines.append(["(none)", *(f"{base[name]:.3f}" for name in COLUMNS.values()), "", ""])
    for row, runs in rows.items():
        spread = [_spread([run[name] for run in runs]) for name in COLUMNS.values()]
        seconds = mean(run["cpu_seconds_per_step"] for run in runs)
        lines.append([row, *spread, f"{runs[0]['trainable']:,}", f"{seconds:.2f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _spread(values):
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main(words=None):
    args = parse(words)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out / "tiny"
    if not base.exists():
        convert(TINY_SAM, base, progress=False)
    number, done = len(args.domain) * len(args.only) * len(args.seeds), 0
    for name in args.domain:
        domain = Domain(base, args.out / name / "data", args.out / name)
        if not domain.data.exists():
            DOMAINS[name](domain.data, args)
        before, rows = domain.measured(), {}
        for row in args.only:
            for seed in args.seeds:
                start, done = time.perf_counter(), done + 1
                rows.setdefault(row, []).append(domain.run(row, seed, args))
                took = time.perf_counter() - start
                print(f"{done}/{number} {name}, {row}, seed {seed}: {took:.0f} s", file=sys.stderr)
        found = table(before, rows)
        (domain.runs / "table.md").write_text(found + "\n", encoding="utf-8")
        print(found)


if __name__ == "__main__":
    main()
