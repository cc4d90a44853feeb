"""How time, memory, arithmetic and kernels are measured, on a CPU and on a GPU."""

import contextlib
import ctypes
import gc
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils import flop_counter

from sam_split.products_sam_split import affine

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEGABYTE = 2**20


def resident() -> float | None:
    """Memory of this process in MB, or None where there is no /proc."""
    return _status("VmRSS")


def _status(field: str) -> float | None:
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.M) if STATUS.exists() else None
    return int(found[1]) / 1024 if found else None


def cpu_seconds() -> dict[str, float]:
    """CPU seconds of this process, its own code's and the system's apart; empty where nobody counts them so."""
    try:
        import resource  # not on Windows
    except ModuleNotFoundError:
        return {}
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"user": used.ru_utime, "system": used.ru_stime}


class CPU:
    """Process CPU seconds, which feel the machine's other work little, and the resident memory's high-water mark.

    With more than one thread CPU seconds say nothing about waiting, so wall-clock seconds stand for the time.
    """

    warm_ups = 0

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        self.threads = threads

    def rest(self):
        """Give back what the last call left, so that waiting peers take no memory from the one at work."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    def memory(self) -> float | None:
        return resident()

    def measure(self, call: Callable, at_least: float) -> dict:
        """Time of a call, repeated until it has taken `at_least` seconds in all, and peak memory.

        One call more comes first: `rest` has given the memory back, and to get it again is no part of what is
        measured. In a virtual machine that may take longer than the call.
        """
        with contextlib.suppress(OSError):
            CLEAR_REFS.write_text("5")  # resets VmHWM
        call()
        repeats, wall, start, before = 0, time.perf_counter(), time.process_time(), cpu_seconds()
        while repeats == 0 or time.process_time() - start < at_least:
            call()
            repeats += 1
        cpu, wall = time.process_time() - start, time.perf_counter() - wall
        taken = {"seconds": cpu if self.threads == 1 else wall, "wall": wall}
        taken |= {name: after - before[name] for name, after in cpu_seconds().items()}
        measured = {name: seconds / repeats for name, seconds in taken.items()}
        return {**measured, "peak": _status("VmHWM"), "repeats": repeats}


class CUDA:
    """Seconds between two CUDA events, and the peak of the memory that torch has allocated."""

    warm_ups = 3  # kernels are chosen, compiled and loaded in the first calls

    def rest(self):
        gc.collect()
        torch.cuda.empty_cache()

    def memory(self) -> float:
        return torch.cuda.memory_allocated() / MEGABYTE

    def measure(self, call: Callable, at_least: float) -> dict:
        call()  # `rest` has emptied the allocator
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        wall = time.perf_counter()
        call()
        torch.cuda.synchronize()
        once = time.perf_counter() - wall
        repeats = max(1, math.ceil(at_least / once))
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1000 / repeats
        peak = torch.cuda.max_memory_allocated() / MEGABYTE
        return {"seconds": seconds, "wall": once, "peak": peak, "repeats": repeats}


def meter(device: str, threads: int) -> CPU | CUDA:
    return CUDA() if device == "cuda" else CPU(threads)


def flops(call: Callable) -> int:
    """Floating-point operations of the matrix products and convolutions of one call."""

    def in_place(self_shape, first_shape, second_shape, *args, **kwargs):
        return 2 * math.prod(first_shape) * second_shape[-1]

    aten = torch.ops.aten
    with flop_counter.FlopCounterMode(
        display=False, custom_mapping={aten.baddbmm_: in_place, aten.addmm_: in_place}
    ) as mode:
        call()
    return mode.get_total_flops()


def gemm_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest way to multiply matrices here: torch's for linear layers, that for convolutions, or the
    model's own choice, in the sizes of ViT-B's MLP on a CPU, large and square on a GPU."""
    rows, inner, columns = (4096, 768, 3072) if device == "cpu" else (8192, 8192, 8192)
    x, weight = torch.randn(rows, inner).to(device, dtype), torch.randn(columns, inner).to(device, dtype)
    image = x.view(1, rows // 64, 64, inner).permute(0, 3, 1, 2)
    ways = [lambda: F.linear(x, weight), lambda: affine(x, weight, None)]
    if device == "cpu":
        ways.append(lambda: F.conv2d(image, weight[:, :, None, None]))
    best = 0.0
    this = meter(device, torch.get_num_threads())
    with torch.no_grad():
        for way in ways:
            for _ in range(5):
                best = max(best, 2 * rows * inner * columns / this.measure(way, 0.2)["seconds"])
    return best


def profile(call: Callable, device: str, top: int = 12) -> dict[str, float]:
    """Share of the time of one call by operator, or by kernel on a GPU; attention kernels are always listed."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (device == "cuda")]
    with torch.profiler.profile(activities=activities) as prof:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    if device == "cuda":
        events = [e for e in prof.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        times = {e.key: e.self_device_time_total for e in events}
    else:
        times = {e.key: e.self_cpu_time_total for e in prof.key_averages()}
    total = sum(times.values()) or 1.0
    ranked = sorted(times, key=times.get, reverse=True)
    attention = [name for name in ranked if re.search("attention|fmha|flash|sdpa|cudnn.*prop", name, re.I)]
    return {name[:120]: times[name] / total for name in ranked if name in ranked[:top] or name in attention}
