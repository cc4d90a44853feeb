"""Exporting ViT-B and ViT-H in each precision: seconds, peak memory, and what lies on the disk.

    python -m benchmarks.onnx_export [--models vit_b vit_h] [--precisions float32 float16 int8]

Weights are random, so masks are noise, and the bars of float16 and int8 are not asked for. Each row is a process of
its own with one thread; seconds are of the processor, with the comparison and without the imports. Peak memory is that
of the process, with weights and libraries. ViT-H needs 12 GB of memory and 8 GB of disk.
"""

import argparse
import tempfile
import time
from pathlib import Path

from conversion import onnx_check
from conversion.onnx_export import export
from sam_split import SamSplitConfig, SamSplitModel

from .convert_peak import vit_h
from .onnx_encoder import in_process, with_weights

MODELS = {"vit_b": SamSplitConfig, "vit_h": lambda: vit_h(depth=32)}
PRECISIONS = {"float32": {}, "float16": {"dtype": "float16"}, "int8": {"quantize": "int8"}}


def write(model, folder):
    with_weights(SamSplitModel(MODELS[model]())).save_pretrained(folder)


def exported(source, out, precision):
    """Seconds, and MB of the image encoder and of the decoder."""
    onnx_check.LEAST_IOU[precision] = 0
    started = time.process_time()
    export(source, out, progress=False, **PRECISIONS[precision])
    seconds = time.process_time() - started
    sizes = [sum(path.stat().st_size for path in Path(out).glob(f"onnx/{name}*")) for name in ("vision", "prompt")]
    return [seconds, *(size / 1e6 for size in sizes)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    args = parser.parse_args()
    print("| | | seconds | peak memory, GB | image encoder, MB | decoder, MB |\n|---|---|---|---|---|---|", flush=True)
    for model in args.models:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            in_process(write, model, folder / "model")
            for precision in args.precisions:
                (seconds, *sizes), peak = in_process(exported, folder / "model", folder / precision, precision)
                figures = f"{seconds:.0f} | {peak:.1f} | {sizes[0]:,.0f} | {sizes[1]:,.0f}"
                print(f"| {model} | {precision} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
