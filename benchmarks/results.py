"""The figures of a run: a JSON file that is whole after every measurement."""

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .cases import REFERENCE, Case


class UnlikeError(Exception):
    """Figures on disk were measured elsewhere or with other code."""


@dataclass
class Results:
    """Figures by case and peer.

    Args:
        path: of the JSON file.
        machine: what `rounds.machine` says.
        gemm_peak: FLOP/s by dtype.
        cases: by name: the fields of `Case`, `done` (rounds, 0 while it is being measured), and `figures` by peer:
            `seconds` and `wall` of each round, `added` and `peak` in MB of each,
            `flops`, `profile`, `sample` of the output and `failure`, where they exist.
    """

    path: Path
    machine: dict
    gemm_peak: dict[str, float] = field(default_factory=dict)
    cases: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Results":
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}; run without --report to measure")
        return cls(path, **json.loads(path.read_text()))

    @classmethod
    def open(cls, path: Path, machine: dict, fresh: bool) -> "Results":
        """The figures on disk, to be added to, or none."""
        if fresh or not path.exists():
            return cls(path, machine)
        results = cls.read(path)
        for name in machine.keys() - {"date"}:
            if results.machine.get(name) != machine[name]:
                raise UnlikeError(
                    f"{path} has another {name!r}: {results.machine.get(name)!r} there, {machine[name]!r} here; give "
                    "--fresh to drop it or --out to write elsewhere"
                )
        return results

    def save(self):
        """Replace the file at once: a stop in the middle leaves the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fields = {"machine": self.machine, "gemm_peak": self.gemm_peak, "cases": self.cases}
        beside = self.path.with_suffix(".json.part")
        beside.write_text(json.dumps(fields, indent=1) + "\n")
        os.replace(beside, self.path)

    def has(self, case: Case, rounds: int) -> bool:
        """Whether all peers had their turns. A peer that is asked for and absent makes the case a new one."""
        found = self.cases.get(case.name)
        return found is not None and found["done"] >= rounds and set(case.peers) <= found["figures"].keys()

    def start(self, case: Case):
        self.cases[case.name] = {**asdict(case), "peers": list(case.peers), "done": 0, "figures": {}}

    def add(self, case: Case, peer: str, measured: dict):
        """One turn of one peer."""
        figures = self.cases[case.name]["figures"].setdefault(peer, {"seconds": [], "wall": []})
        figures["seconds"].append(measured["seconds"])
        figures["wall"].append(measured["wall"])
        for name in ("added", "peak"):
            if measured.get(name) is not None:
                figures.setdefault(name, []).append(measured[name])
        if "sample" in measured:
            figures["sample"] = measured["sample"]
        self.save()

    def note(self, case: Case, peer: str, found: dict):
        self.cases[case.name]["figures"][peer].update(found)
        self.save()

    def failed(self, case: Case, peer: str, why: str):
        self.cases[case.name]["figures"][peer] = {"failure": why}
        self.save()

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
        self.save()

    def median(self, case: str, peer: str, figure: str) -> float | None:
        """The median of what a peer showed in its rounds."""
        values = self.cases[case]["figures"].get(peer, {}).get(figure)
        return statistics.median(values) if values else None

    def ratios(
        self, case: str, peer: str, figure: str, ratio: Callable[[float, float], float], against: str = REFERENCE
    ) -> list[float]:
        """`ratio(peer's, the other peer's)` in each round; empty where one of the two has no figure."""
        found = self.cases[case]["figures"]
        ours, theirs = (found.get(name, {}).get(figure) for name in (peer, against))
        if ours is None or theirs is None:
            return []
        return [ratio(a, b) for a, b in zip(ours, theirs, strict=False)]
