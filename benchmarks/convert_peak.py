"""Peak memory and time of `convert` and `fuse` at ViT-H's size (2.5 GB), compared with a plain copy of the file.

    python -m benchmarks.convert_peak [--folder DIR] [--depth 32]

Converting holds one shard in memory at a time. Peak memory counts every resident page, mapped files included, above
what the process held before. The limit is three times the largest shard (once read, once held for writing, once read
back) plus 100 MB. A single file is one shard. In the row "convert, shards" each shard of source and result has a fifth
of the checkpoint, so a conversion that holds the whole checkpoint exceeds the limit.
The time limit is four times that of copying the checkpoint to the same disk, flushing it and reading it back. Such a
copy is made and removed right before each measurement: memory that was used a moment ago is cheaper, because a virtual
machine asks its host for other memory first.
DIR needs 16 GB. The exit code is 1 if a limit is exceeded; the row says which.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from conversion import checkpoints
from conversion.checkpoints import convert, fuse
from conversion.config_from_shapes import model_shapes
from conversion.folder import config_fields
from conversion.key_map import KEY_MAP, STOCK_MAP, plan
from conversion.tensors import Renamed, Spec, Tensors
from conversion.writing import write_pth, write_weights
from hub_card.card import model_card  # noqa: F401  (imported before memory is measured)
from sam_split import SamSplitConfig

from .meters import CPU

READ_BYTES = 8 * 2**20
SHARDS = 5


class Sampled(Tensors):
    """Random float32 weights of the given shapes, sampled each time they are read."""

    def __init__(self, shapes):
        self.specs = {name: Spec(shape, torch.float32) for name, shape in shapes.items()}

    def __getitem__(self, name):
        generator = torch.Generator().manual_seed(sum(name.encode()))
        return torch.randn(self.specs[name].shape, generator=generator)


def vit_h(depth: int) -> SamSplitConfig:
    quarter = depth // 4
    vision = {
        "hidden_size": 1280,
        "num_hidden_layers": depth,
        "num_attention_heads": 16,
        "global_attn_indexes": [quarter - 1, 2 * quarter - 1, 3 * quarter - 1, 4 * quarter - 1],
    }
    config = SamSplitConfig(vision_config=vision)
    config.dtype = torch.float32
    return config


def write_sources(folder: Path, config: SamSplitConfig, shard_bytes: int) -> None:
    """The same model as one safetensors file, in shards, and as Meta's .pth."""
    split = Sampled(model_shapes(config))
    fused = Renamed(split, plan(split, STOCK_MAP, inverse=True))
    for name, max_bytes in (("single", split.nbytes), ("sharded", shard_bytes)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config_fields(config, "transformers")))
        write_weights(folder / name, fused, max_bytes=max_bytes)
    write_pth(folder / "meta.pth", Renamed(split, plan(split, KEY_MAP, inverse=True)))


def copy_and_read_back(source: Path, out: Path) -> None:
    """The least work possible: write the bytes, flush them to the disk, read them back."""
    paths = [source] if source.is_file() else sorted(source.iterdir())
    for path in paths:
        shutil.copyfile(path, f"{out}.{path.name}")
    for path in paths:
        with open(f"{out}.{path.name}", "rb") as file:
            os.fsync(file.fileno())
            while file.read(READ_BYTES):
                pass
        os.remove(f"{out}.{path.name}")


def measured(work, *args, **options) -> tuple[float, int]:
    """Seconds, and peak resident bytes less those before, of work(*args, **options) in a process of its own."""

    def child(pipe):
        CPU(threads=1).rest()  # else the work would use pages that the parent has freed, which do not count
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before, started = _status("VmRSS"), time.monotonic()
        work(*args, **options)
        pipe.send((time.monotonic() - started, _status("VmHWM") - before))

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    process.join()
    if not ours.poll():
        raise SystemExit("the measured process failed")
    return ours.recv()


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def convert_to_shards(source: Path, out: Path, shard_bytes: int, **options) -> None:
    """`convert`, with a smaller limit for one shard. For a process of its own: the limit is not put back."""
    checkpoints.MAX_SHARD_BYTES = shard_bytes
    convert(source, out, **options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each, of which the fastest counts")
    parser.add_argument("--depth", type=int, default=32, help="layers of the image encoder, 32 in ViT-H")
    args = parser.parse_args()

    config = vit_h(args.depth)
    whole = Sampled(model_shapes(config)).nbytes
    shard = whole // SHARDS
    failed = False
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_sources(folder, config, shard)
        jobs = [
            ("convert, one safetensors file", "single", "split", whole, convert, {}),
            ("convert, shards", "sharded", "out", shard, convert_to_shards, {"shard_bytes": shard}),
            ("convert, .pth", "meta.pth", "out", whole, convert, {}),
            ("fuse to transformers", "split", "out", whole, fuse, {}),
            ("fuse to .pth", "split", "out", whole, fuse, {"format": "meta"}),
        ]
        print(f"{'':32} {'peak':>9} {'limit':>9} {'time':>7} {'copy':>7} {'ratio':>6}")
        for title, source, out, largest, job, options in jobs:
            limit, runs = 3 * largest + 100 * 10**6, []
            for _ in range(args.repeat):
                remove(folder / out)
                copies = [measured(copy_and_read_back, folder / source, folder / "copy") for _ in range(2)]
                runs.append((copies[1], measured(job, folder / source, folder / out, progress=False, **options)))
            copied, seconds = (min(run[which][0] for run in runs) for which in (0, 1))
            peak = max(run[1][1] for run in runs)
            exceeded = [name for name, over in (("memory", peak > limit), ("time", seconds > 4 * copied)) if over]
            failed |= bool(exceeded)
            print(
                f"{title:32} {peak / 1e6:6.0f} MB {limit / 1e6:6.0f} MB {seconds:5.1f} s {copied:5.1f} s "
                f"{seconds / copied:6.2f}  {'over: ' + ', '.join(exceeded) if exceeded else 'ok'}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
