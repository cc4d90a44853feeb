"""A model as a repository of transformers.js: ONNX graphs, configs, a card; checked before it appears."""

import contextlib
import hashlib
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from hub_card.onnx_folder import SUFFIXES

from .atomic import check_out, new_folder
from .errors import CheckFailed, ConversionError
from .folder import config_fields, license_text, write_json, write_processor
from .loading import load_model
from .onnx_check import compare, reference
from .onnx_graphs import Graph, graphs
from .verification import Row

OPSET = 18
JS_NAMES = {"float32": "fp32", "float16": "fp16", "int8": "int8"}  # of precisions, in transformers.js
# Weights beyond this are files of their own: a protobuf holds 2 GB, and a browser's buffer may hold less.
MAX_BYTES = 2**31 - 2**20
EXAMPLE = {"batch_size": 2, "point_batch_size": 3, "nb_points_per_image": 4}


def export(
    source,
    out,
    *,
    adapter=None,
    dtype: str = "float32",
    quantize: str | None = None,
    opset: int = OPSET,
    progress: bool = True,
    seen: dict[str, Path] | None = None,
) -> list[Row]:
    """Write a model as ONNX graphs in a folder that transformers.js loads.

    Args:
        source: a checkpoint in any format.
        out: the folder to make; it appears whole and checked, or not at all.
        adapter: a PEFT adapter of it to merge, or None.
        dtype: "float32" or "float16", of the weights; inputs and outputs are float32.
        quantize: "int8" for 8-bit weights and activations in the image encoder's matrix products, or None.
        opset: version of ONNX's operators.
        progress: whether to show a progress bar.
        seen: files of exports before, by their weights, or None. What this model shares with them is copied and not
            made again; what it does not is added.

    Returns:
        What was compared with torch, and how far it differs.

    Raises:
        ConversionError: if `source` cannot be read or exported, or `out` exists.
        CheckFailed: if what was exported computes something else.
    """
    if quantize and dtype != "float32":
        raise ConversionError(f"int8 is made of float32, got dtype {dtype}; leave out one of the two")
    out = check_out(out, source, adapter)
    with _steps(progress) as step:
        step("read")
        model, settings, _ = load_model(source, adapter)
        config = model.config
        if config.vision_config.num_channels != 3:
            raise ConversionError(
                f"{source} takes images of {config.vision_config.num_channels} channels, and clients of the exported "
                "graphs feed 3; it cannot be expressed there"
            )
        step("run in torch")
        pixels, embeddings, cases = reference(model)
        with new_folder(out) as folder:
            (folder / "onnx").mkdir()
            files: dict[str, Path] = {}
            made: dict[str, Path] = {}
            for graph in graphs(model, getattr(torch, dtype)):
                step(f"export {graph.name}")
                precision = "int8" if quantize and graph.name == "vision_encoder" else dtype
                path = files[graph.name] = folder / "onnx" / f"{graph.name}{SUFFIXES[JS_NAMES[precision]]}.onnx"
                weights = f"{path.name} {_digest(graph.module)}"
                made[weights] = out / "onnx" / path.name
                if seen and weights in seen:
                    _copy(seen[weights], path)
                else:
                    _write(graph, path, opset, precision)
            step("run in onnxruntime")
            rows = compare(files, pixels, embeddings, cases, quantize or dtype)
            if failed := [row for row in rows if not row.passed]:
                raise CheckFailed(f"not the same model: {failed[0].compared}: {failed[0].result}", rows)
            _write_rest(folder, files, config, settings, source, adapter, rows)
    if seen is not None:
        seen |= made
    return rows


@contextlib.contextmanager
def _steps(show: bool):
    """A function to be called with the name of each step as it begins. The bar shows on terminals only."""
    from tqdm.auto import tqdm

    with tqdm(total=6, bar_format="{n_fmt} of {total_fmt} [{elapsed}] {desc}", disable=None if show else True) as bar:
        bar.n = -1

        def step(name):
            bar.update()
            bar.set_description_str(name)

        yield step
        bar.update()


def _digest(module: torch.nn.Module) -> str:
    """Of the weights' names and bytes."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _copy(graph: Path, to: Path) -> None:
    """Copy a graph, and the file of its weights if it has one."""
    for end in ("", "_data"):
        if (path := graph.with_name(graph.name + end)).exists():
            shutil.copyfile(path, to.with_name(to.name + end))


def _write(graph: Graph, path: Path, opset: int, precision: str) -> None:
    program = _trace(graph, opset)
    if precision != "int8":
        _save(program.model, path)
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    weights = program.model.graph.initializers
    layers = [node.name for node in program.model.graph if node.op_type == "MatMul" and _is_matrix(node, weights)]
    whole = path.with_name("float32.onnx")
    data = _save(program.model, whole)
    del program, weights
    # Weights of 7 bits: sums of 8 bits overflow on processors without VNNI, and masks are as good.
    options = {"per_channel": True, "reduce_range": True, "weight_type": QuantType.QInt8}
    quantize_dynamic(whole, path, nodes_to_quantize=layers, **options)
    for file in (whole, *data):
        file.unlink()


def _is_matrix(node, weights) -> bool:
    """Whether a product is a linear layer's, and not one with the tables of relative positions."""
    weight = weights.get(node.inputs[1].name)
    return weight is not None and len(weight.shape) == 2


@torch.no_grad()
def _trace(graph: Graph, opset: int):
    dimensions = {name: torch.export.Dim(name) for name in EXAMPLE}
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    arguments, dynamic = [], []
    for name, shape in graph.inputs.items():
        dtype = torch.int64 if name == "input_labels" else torch.float32
        arguments.append(torch.zeros([EXAMPLE.get(size, size) for size in shape], dtype=dtype))
        dynamic.append({axis: dimensions[size] for axis, size in enumerate(shape) if isinstance(size, str)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for those who write exporters: names of axes, operators without a kernel
        program = torch.onnx.export(
            graph.module,
            tuple(arguments),
            dynamo=True,
            dynamic_shapes=dynamic,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=opset,
            verbose=False,
        )
    if program.model.opset_imports[""] != opset:
        raise ConversionError(f"the graphs cannot be written with opset {opset}; leave it out for opset {OPSET}")
    ClearMetadataAndDocStringPass()(program.model)  # where each node comes from, with the paths of this machine
    return program


def _save(model, path: Path) -> list[Path]:
    """Write a graph; the files of its weights beside it, if they do not fit into it."""
    import onnx_ir

    total = sum(tensor.const_value.nbytes for tensor in model.graph.initializers.values())
    if total <= MAX_BYTES:
        onnx_ir.save(model, path)
        return []
    data = path.with_name(f"{path.name}_data")  # as transformers.js looks for it
    onnx_ir.save(model, path, external_data=data.name)
    return [data]


def _write_rest(folder: Path, files: dict[str, Path], config, settings, source, adapter, rows: list[Row]) -> None:
    from hub_card.onnx_card import onnx_card

    client: dict[str, Any] = {"dtype": {}, "use_external_data_format": {}}
    for name, path in files.items():
        client["dtype"][name] = next(js for js, suffix in SUFFIXES.items() if path.stem == name + suffix)
        if path.with_name(f"{path.name}_data").exists():
            client["use_external_data_format"][path.name] = 1
    client["dtype"]["model"] = client["dtype"]["vision_encoder"]  # its other name, where sizes are looked up
    write_json(folder / "config.json", {**config_fields(config, "transformers"), "transformers.js_config": client})
    write_processor(folder, settings, config)
    (folder / "LICENSE").write_text(license_text(), encoding="utf-8")
    evidence = [(row.compared, row.result) for row in rows]
    card = onnx_card(folder, source=source, adapter=adapter, evidence=evidence)
    (folder / "README.md").write_text(card, encoding="utf-8")
