"""What `sam-split export` wrote: which of its files belong on the Hub, and whether the graphs load.

Loading a graph runs no code of the folder's, so no fresh process is needed.
"""

import importlib.util
import re
from pathlib import Path

from .errors import PushRefused
from .folder import code_files, read_json

NAMES = "vision_encoder|prompt_encoder_mask_decoder|mask_prompt_encoder"
GRAPH = re.compile(rf"(base/)?onnx/({NAMES})(_fp16|_int8)?\.onnx(_data)?")
# How transformers.js names a precision -> the end of a file's name by which it finds it.
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8"}
PAGE = Path(__file__).with_name("page")


def is_export(folder: str | Path) -> bool:
    """Whether the folder holds ONNX graphs and not a split model."""
    return Path(folder, "onnx").is_dir() and not code_files(folder)


def export_paths(folder: Path, space: bool) -> list[str]:
    """The files of an exported folder that belong into a repository of transformers.js, or into a Space: all there.

    Raises:
        ValueError: if one is missing, the config is none for transformers.js, or there is no page for a Space.
    """
    config = read_json(folder / "config.json")
    client = config.get("transformers.js_config")
    if config.get("model_type") != "sam" or not isinstance(client, dict):
        raise ValueError(
            f"config.json in {folder} must say model_type 'sam' and hold a transformers.js_config, which names the "
            "graphs; `sam-split export MODEL OUT` writes such a folder"
        )
    data = client.get("use_external_data_format", {})
    precisions = {**client.get("dtype", {})}
    precisions.pop("model", None)  # another name of the image encoder, under which transformers.js looks up its size
    graphs = [f"{name}{SUFFIXES.get(precision)}.onnx" for name, precision in precisions.items()]
    paths = [f"onnx/{name}" for name in graphs] + [f"onnx/{name}_data" for name in graphs if name in data]
    others = ["config.json", "preprocessor_config.json", "README.md"]
    if space:
        if not (folder / "page.json").is_file():
            raise ValueError(f"{folder} holds no page for a Space; `sam-split export MODEL OUT --page` writes one")
        others += ["page.json", *sorted(path.relative_to(PAGE).as_posix() for path in PAGE.rglob("*.*"))]
        paths += [f"base/{name}" for name in read_json(folder / "page.json").get("base_files", [])]
    absent = [path for path in [*others, *paths] if not (folder / path).is_file()]
    absent += [path for path in paths if not GRAPH.fullmatch(path)]
    if absent or not graphs:
        raise ValueError(f"{folder} is not complete, {absent[0] if absent else 'a graph'} is missing; export it again")
    return others + paths


def load_graphs(folder: Path, names: list[str]) -> str:
    """Load the graphs among the files `names` in onnxruntime, and say so in a sentence; or that it is not installed.

    Raises:
        PushRefused: one does not load.
    """
    graphs = [name for name in names if name.endswith(".onnx")]
    if importlib.util.find_spec("onnxruntime") is None:
        return 'Not loaded, because onnxruntime is not installed: pip install "sam-split[onnx]" to have them tried.'
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # nothing is computed here
    options.log_severity_level = 4  # an error is raised, and said once
    for name in graphs:
        try:
            onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of many classes, which have no base of their own
            raise PushRefused(f"{name} does not load in onnxruntime: {' '.join(str(error).split())}") from None
    return f"They load: {len(graphs)} graphs (onnxruntime {onnxruntime.__version__})."
