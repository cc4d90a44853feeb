"""The parent's side of a run: a process for each peer of a case, and whose turn it is."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from .cases import REFERENCE, Case
from .results import Results

ROOT = Path(__file__).parents[1]
# sam_split.CODE_FILES, by their names: that import would bring torch into this process, which only waits.
MODEL_FILES = sorted((ROOT / "sam_split").glob("*_sam_split.py"))
# What the machine keeps for itself: a peer that needs more fails alone, and takes nobody else with it.
SPARE_BYTES = 2**30


@dataclass(frozen=True)
class Setting:
    """How a run measures, the same for all cases; `scale` shortens rounds."""

    device: str
    threads: int
    rounds: int
    profile: bool
    scale: float


class PeerError(Exception):
    """A peer could not be measured; the message is what the report says."""


class Peer:
    """A process that measures one peer in one case, see `benchmarks.worker`."""

    def __init__(self, case: Case, peer: str, setting: Setting, folder: str = ""):
        job = {"case": asdict(case), "peer": peer, "folder": folder, "memory_limit": _memory_limit()}
        job |= {"device": setting.device, "threads": setting.threads, "scale": setting.scale}
        threads = str(setting.threads)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            bufsize=1,
            cwd=ROOT,
            env=environment,
        )
        try:
            self._answer()
        except PeerError:
            self.close()
            raise

    def ask(self, question: str) -> dict:
        try:
            self._process.stdin.write(question + "\n")
        except BrokenPipeError:
            pass  # the answer says why
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            words = self._errors.read().strip().splitlines()
            raise PeerError(f"died with code {code}" + (f": {words[-1]}" if words else ", probably out of memory"))
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def close(self):
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def _memory_limit() -> int | None:
    path = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", path.read_text(), re.M) if path.exists() else None
    return int(found[1]) * 1024 - SPARE_BYTES if found else None


def run_case(case: Case, setting: Setting, rounds: int, folder: str, results: Results):
    """Start all peers, give each `rounds` turns, and write every figure down at once."""
    peers: dict[str, Peer] = {}
    run = results.run
    run.start(case)

    def give_up(name: str, error: PeerError):
        print(f"    {name}: {error}", flush=True)
        run.failed(case, name, str(error))
        results.save()
        if name in peers:
            peers.pop(name).close()

    try:
        for name in case.peers:
            try:
                peers[name] = Peer(case, name, setting, folder)
            except PeerError as error:
                give_up(name, error)
        for _ in range(rounds):
            for name in list(peers):
                try:
                    measured = peers[name].ask("call")
                except PeerError as error:
                    give_up(name, error)
                    continue
                run.add(case, name, measured)
                results.save()
                print(f"    {name}: {measured['seconds']:.3g} s{_memory(measured)}", flush=True)
        for name, peer in peers.items():
            profiled = setting.profile and (name == REFERENCE or name.startswith("ours"))
            for question in ["profile"] * profiled + ["flops"]:
                try:
                    run.note(case, name, peer.ask(question))
                    results.save()
                except PeerError as error:  # the figures that are there stay
                    print(f"    {name}: no {question}: {error}", flush=True)
        run.finish(case, rounds)
        results.save()
    finally:
        for peer in peers.values():
            peer.close()


def _memory(measured: dict) -> str:
    return "" if measured["peak"] is None else f", {measured['added']:.0f} MB added"


def gemm_peak(setting: Setting, dtype: str) -> float:
    """FLOP/s of this machine's own best matrix product."""
    peer = None
    try:
        peer = Peer(Case("gemm", "gemm", "", (), "tiny", dtype), "gemm", setting)
        peak = peer.ask("gemm")["peak"]
    except PeerError as error:
        raise RuntimeError(f"cannot multiply matrices on {setting.device!r}: {error}") from error
    finally:
        if peer:
            peer.close()
    print(f"GEMM peak, {dtype}: {peak / 1e9:.0f} GFLOP/s", flush=True)
    return peak


def about(setting: Setting) -> dict:
    """What the figures depend on. Figures with the same answer are of one run."""
    versions = {}
    for package in ("torch", "transformers", "peft", "segment-anything", "timm"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.date.today().isoformat(),
        "device": _device_name(setting.device),
        "threads": setting.threads if setting.device == "cpu" else None,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions,
        "sam_split": model_code(),
    }


def model_code() -> str:
    """A hash of the code files that travel with the model."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in MODEL_FILES)).hexdigest()[:12]


def _device_name(device: str) -> str:
    if device == "cuda":
        asked = "import torch; print(torch.cuda.get_device_name())"
        found = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
        if found.returncode:
            raise RuntimeError(f"--device cuda: {found.stderr.strip().splitlines()[-1]}")
        return found.stdout.strip()
    path = Path("/proc/cpuinfo")
    fields = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", path.read_text(), re.M)) if path.exists() else {}
    name = fields.get("model name", platform.processor() or "CPU")
    if "cpu family" in fields:  # virtual machines name their processors vaguely
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return f"{name}, {os.cpu_count()} cores"
