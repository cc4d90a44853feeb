"""The figures of all runs: a JSON file that is whole after every measurement, and that later runs are added to."""

import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .cases import REFERENCE, Case


@dataclass
class Run:
    """What was measured on one machine, in one state of the code, on one day.

    Args:
        about: what `rounds.about` says: date, device, threads, system, versions, and the hash of the model's files.
        gemm_peak: FLOP/s by dtype.
        cases: by name: the fields of `Case`, `done` (rounds, 0 while it is being measured), and `figures` by peer:
            `seconds`, `wall`, `user` and `system` of each round, `added` and `peak` in MB of each, `flops`, `profile`,
            `sample` of the output and `failure`, where they exist. Runs before 2026-11-24 lack `user` and `system`.
        told: of a run whose figures were not kept, the ratios that are known: by case, peer and figure, [least, most].
        remark: what a reader should know beside the figures.
    """

    about: dict
    gemm_peak: dict[str, float] = field(default_factory=dict)
    cases: dict[str, dict] = field(default_factory=dict)
    told: dict[str, dict] = field(default_factory=dict)
    remark: str = ""

    def has(self, case: Case, rounds: int) -> bool:
        """Whether all peers had their turns. A peer that is asked for and absent makes the case a new one."""
        found = self.cases.get(case.name)
        return found is not None and found["done"] >= rounds and set(case.peers) <= found["figures"].keys()

    def start(self, case: Case):
        self.cases[case.name] = {**asdict(case), "peers": list(case.peers), "done": 0, "figures": {}}

    def add(self, case: Case, peer: str, measured: dict):
        """One turn of one peer."""
        figures = self.cases[case.name]["figures"].setdefault(peer, {})
        for name in ("seconds", "wall", "user", "system", "added", "peak"):
            if measured.get(name) is not None:
                figures.setdefault(name, []).append(measured[name])
        if "sample" in measured:
            figures["sample"] = measured["sample"]

    def note(self, case: Case, peer: str, found: dict):
        self.cases[case.name]["figures"][peer].update(found)

    def failed(self, case: Case, peer: str, why: str):
        self.cases[case.name]["figures"][peer] = {"failure": why}

    def finish(self, case: Case, rounds: int):
        """Close a case. Of the outputs, only how far they lie from the reference is kept."""
        found = self.cases[case.name]
        samples = {peer: figures.pop("sample", None) for peer, figures in found["figures"].items()}
        reference = samples.get(REFERENCE)
        for peer, sample in samples.items():
            if reference and sample and peer != REFERENCE:
                scale = max(map(abs, reference)) or 1.0
                apart = max(abs(a - b) for a, b in zip(sample, reference, strict=True)) / scale
                found["figures"][peer]["difference"] = apart
        found["done"] = rounds

    def median(self, case: str, peer: str, figure: str) -> float | None:
        """The median of what a peer showed in its rounds."""
        values = self.cases[case]["figures"].get(peer, {}).get(figure)
        return statistics.median(values) if values else None

    def ratios(self, case: str, peer: str, figure: str, against: str = REFERENCE) -> list[float]:
        """Ratios of one peer to another in each round, empty where one of the two has no figure.

        `faster` is the other's time over this peer's, `share` this peer's part of the best matrix product; any other
        figure is this peer's over the other's.
        """
        if case in self.told and against == REFERENCE:
            return self.told[case].get(peer, {}).get(figure, [])
        found = self.cases.get(case, {"done": 0})
        if not found["done"]:
            return []
        ours, theirs = (found["figures"].get(name, {}) for name in (peer, against))
        if figure == "share":
            best = self.gemm_peak.get(found["dtype"])
            flops = ours.get("flops")
            return [flops / seconds / best for seconds in ours["seconds"]] if flops and best else []
        if figure == "faster":
            ours, theirs, figure = theirs, ours, "seconds"
        return [a / b for a, b in zip(ours.get(figure, []), theirs.get(figure, []), strict=False)]


@dataclass
class Results:
    """Runs by date, the last one open for more figures."""

    path: Path
    runs: list[Run]

    @classmethod
    def read(cls, path: Path) -> "Results":
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}; run without --report to measure")
        return cls(path, [Run(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))])

    @classmethod
    def open(cls, path: Path, about: dict, again: bool = False) -> "Results":
        """The runs on disk. The last goes on if it is of this day, machine and code; otherwise a new one is added."""
        results = cls.read(path) if path.exists() else cls(path, [])
        if again or not results.runs or results.run.about != about:
            results.runs.append(Run(about))
        return results

    @property
    def run(self) -> Run:
        return self.runs[-1]

    def save(self):
        """Replace the file at once: a stop in the middle leaves the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".json.part")
        kept = [{name: value for name, value in asdict(run).items() if value} for run in self.runs]
        beside.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.path)

    def labels(self) -> Iterator[str]:
        """A name for each run: its date, and a letter from the second of a day on."""
        dates = [run.about["date"] for run in self.runs]
        for index, date in enumerate(dates):
            earlier = dates[:index].count(date)
            yield date + (f" {chr(ord('a') + earlier)}" if earlier else "")

    def case_names(self) -> list[str]:
        """All cases that any run has finished, in the order of the first."""
        return list(dict.fromkeys(name for run in self.runs for name, case in run.cases.items() if case["done"]))
