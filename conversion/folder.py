"""The files of a model folder beside its weights."""

import inspect
import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .sources import Checkpoint
from .tensors import Tensors


def split_config(fields: dict, tensors: Tensors):
    """A SamSplitConfig from the fields of a stock or split config.json; `dtype` becomes that of the tensors.

    Raises:
        ConversionError: if a value is out of range.
    """
    from sam_split import SamSplitConfig

    try:
        # Only the fields that make the model: old config files carry a page of text-generation settings.
        parts: dict[str, Any] = {
            part: _known(config_class, fields.get(part) or {}) for part, config_class in _parts().items()
        }
        config = SamSplitConfig(**parts)
    except Exception as error:  # whatever a value of the wrong type trips over
        raise ConversionError(
            f"config.json describes no model: {error}; correct it, or take that of these weights"
        ) from error
    config.dtype = main_dtype(tensors)
    return config


def config_fields(config, format: str) -> dict:
    """The content of config.json: what makes the model, for our class ("split") or for stock's ("transformers")."""
    import transformers

    content = {
        "architectures": ["SamSplitModel" if format == "split" else "SamModel"],
        "dtype": str(config.dtype).removeprefix("torch."),
        "model_type": "sam_split" if format == "split" else "sam",
        "transformers_version": transformers.__version__,
    }
    if format == "split":
        content |= {"auto_map": config.auto_map, "custom_pipelines": config.custom_pipelines}
    for part, config_class in _parts().items():
        values = {name: getattr(getattr(config, part), name) for name in _field_names(config_class)}
        model_type = config_class.model_type if format == "split" else config_class.model_type.replace("_split", "")
        content[part] = {**values, "model_type": model_type}
    return content


def _parts() -> dict[str, Any]:
    """Name of each part of the config -> its class."""
    from sam_split import SamSplitConfig

    return SamSplitConfig.sub_configs


def _known(config_class, fields: dict) -> dict:
    return {name: fields[name] for name in _field_names(config_class) if name in fields}


def _field_names(config_class) -> list[str]:
    return [name for name in inspect.signature(config_class.__init__).parameters if name not in ("self", "kwargs")]


def main_dtype(tensors: Tensors):
    """The dtype that most of the weights have."""
    totals: dict[Any, int] = {}
    for spec in tensors.specs.values():
        totals[spec.dtype] = totals.get(spec.dtype, 0) + spec.nbytes // spec.dtype.itemsize
    return max(totals, key=totals.__getitem__)


def write_code_and_card(folder: Path, checkpoint: Checkpoint, **card) -> None:
    """The rest of a SamSplit folder: the code files, LICENSE and README.md, written from what is there already."""
    import sam_split
    from hub_card.card import model_card

    for name in sam_split.CODE_FILES:
        shutil.copyfile(Path(sam_split.__file__).parent / name, folder / name)
    (folder / "LICENSE").write_text(license_text(), encoding="utf-8")
    # write_weights has compared every tensor with what it came from, and raises where a bit differs.
    card |= {"source": checkpoint.source, "equal_to": "what was computed" if card else "that of the source"}
    content = model_card(folder, revision=checkpoint.revision, **card).content
    (folder / "README.md").write_text(content, encoding="utf-8")


def write_processor(folder: Path, settings: dict | None, config) -> None:
    """preprocessor_config.json: the given settings or SAM's, under the names that AutoProcessor looks for."""
    named = {"image_processor_type": "SamImageProcessor", "processor_class": "SamProcessor"}
    write_json(folder / "preprocessor_config.json", {**processor_settings(settings, config), **named})


def processor_settings(settings: dict | None, config) -> dict:
    """An image processor's settings: those given, or SAM's for the model's input size."""
    vision = config.vision_config
    return settings or sized_processor(SAM_PROCESSOR, vision.image_size, vision.patch_size)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# The image processor of Meta's code, but for the sizes: bilinear, to [0, 1], then ImageNet's mean and deviation.
SAM_PROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 2,
    "rescale_factor": 1 / 255,
}


def sized_processor(settings: dict, image_size: int | tuple[int, int], patch_size: int) -> dict:
    """An image processor's settings for an input size: the longest side first, then zeros below and to the right.

    An image's longest side becomes the longest of `image_size`; SamProcessor refuses an image whose other side is then
    too long.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    rows, columns = 4 * height // patch_size, 4 * width // patch_size  # the mask decoder gives four pixels a token
    return {
        **settings,
        "size": {"longest_edge": max(height, width)},
        "pad_size": {"height": height, "width": width},
        "mask_size": {"longest_edge": max(rows, columns)},
        "mask_pad_size": {"height": rows, "width": columns},
    }


def license_text() -> str:
    """Apache-2.0, from the installed distribution, else from the checkout.

    Not from beside the installed packages: a LICENSE there is a stranger's.
    """
    try:
        files = metadata.files("sam-split") or []
    except metadata.PackageNotFoundError:
        files = []
    checkout = Path(__file__).parent.parent
    candidates = [Path(str(file.locate())) for file in files if file.name == "LICENSE" and ".dist-info" in str(file)]
    if (checkout / "pyproject.toml").is_file():
        candidates.append(checkout / "LICENSE")
    for path in candidates:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise ConversionError(
        "this installation of sam-split lacks its LICENSE file, which a converted folder must carry; reinstall it"
    )
