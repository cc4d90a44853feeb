"""ViT-B's image encoder as a graph in onnxruntime, beside stock's graph and torch, on one thread.

    python -m benchmarks.onnx_encoder [--runs 3]

Weights are random. Stock's graph is transformers' encoder through torch.onnx, traced as optimum does. Each run is a
process of its own; seconds are of the processor, so that other work on the machine counts little. Peak memory is that
of the process, with weights and libraries. It needs 6 GB and some minutes.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
import warnings
from pathlib import Path

import torch

from conversion.onnx_export import OPSET, _save, _trace
from conversion.onnx_graphs import graphs
from sam_split import SamSplitConfig, SamSplitModel

INPUT, OUTPUTS = (1, 3, 1024, 1024), ("image_embeddings", "image_positional_embeddings")


@torch.no_grad()
def with_weights(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return model.eval()


class StockEncoder(torch.nn.Module):
    """Both outputs that a client expects, from stock's model."""

    def __init__(self):
        from transformers import SamConfig, SamModel

        super().__init__()
        self.model = with_weights(SamModel(SamConfig()))

    def forward(self, pixel_values):
        positions = self.model.get_image_wide_positional_embeddings()
        embeddings = self.model.vision_encoder(pixel_values)[0]
        return embeddings, positions.expand(len(embeddings), -1, -1, -1)


def write_ours(path):
    encoder, *_ = graphs(with_weights(SamSplitModel(SamSplitConfig())))
    _save(_trace(encoder, OPSET).model, path)


def write_stock(path):
    options = {"input_names": ["pixel_values"], "output_names": list(OUTPUTS), "opset_version": OPSET}
    axes = {"dynamic_axes": {"pixel_values": {0: "batch_size"}}}
    with torch.no_grad():
        torch.onnx.export(StockEncoder().eval(), (torch.zeros(INPUT),), path, dynamo=False, **options, **axes)


def run_graph(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"pixel_values": torch.randn(INPUT).numpy()}
    return lambda: session.run(None, feed)


def run_torch(path):
    model, pixels = with_weights(SamSplitModel(SamSplitConfig())), torch.randn(INPUT)
    return torch.no_grad()(lambda: model.get_image_embeddings(pixels))


CASES = {
    "SamSplit in torch": (None, run_torch),
    "SamSplit's graph": (write_ours, run_graph),
    "stock's graph": (write_stock, run_graph),
}


def in_process(function, *arguments):
    """The result of a function in a fresh process, with its peak memory in GB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (function, *arguments))


def _measured(function, *arguments):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result = function(*arguments)
    return result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def seconds(make, path):
    run = make(path)
    started = time.process_time()
    run()
    return time.process_time() - started


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args(words)
    print("| | seconds | peak memory, GB |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (write, make)) in enumerate(CASES.items()):
            path = Path(folder) / f"{number}.onnx"
            if write is not None:
                in_process(write, path)
            taken, peaks = zip(*(in_process(seconds, make, path) for _ in range(args.runs)), strict=True)
            print(f"| {name} | {_range(taken)} | {_range(peaks)} |", flush=True)


def _range(values) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    main()
