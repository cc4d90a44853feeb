"""Opening a checkpoint: a Hub id, a transformers folder or a file of Meta's, recognised by what it holds."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import ConversionError
from .key_map import Origin, check_dropped, format_of, split_plan
from .pickles import check_dense, read_pickles, with_own_storage
from .tensors import InMemory, Renamed, SafetensorsFiles, Tensors
from .trainers import bare_names, without_pixel_buffers

MODEL_TYPES = {"sam": "transformers", "sam_split": "split"}

# In transformers' own order of preference.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
HUB_SAFETENSORS = [
    "config.json",
    "p*processor_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
]
HUB_BINS = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


@dataclass
class Checkpoint:
    """One model on disk.

    Attributes:
        source: what the user named.
        format: whose names and shapes the tensors have: "meta", "transformers" or "split".
        tensors: under the format's own keys.
        config: the content of config.json, or None for Meta's files.
        processor: the image processor's settings, or None if there are none.
        revision: the Hub commit, or None.
    """

    source: str
    format: str
    tensors: Tensors
    config: dict | None = None
    processor: dict | None = None
    revision: str | None = None

    def split_tensors(self) -> Tensors:
        """The tensors as SamSplit's.

        Raises:
            UnknownKeyError, MissingKeyError, ShapeError: if they are not those of a SAM.
        """
        if self.format == "transformers":
            check_dropped(self.tensors)
        return Renamed(self.tensors, split_plan(self.tensors, self.format))


def open_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Find out what `source` is; no tensor is read yet.

    Args:
        source: a folder with config.json and weights, a file of Meta's, or a Hub id.
        revision: branch, tag or commit, for a Hub id only.

    Raises:
        ConversionError: if it is none of these, or damaged, or another model.
    """
    if not str(source):
        raise ConversionError("a checkpoint's name is empty; name a folder, a .pth file or a Hub id")
    path = Path(source).expanduser()
    if path.is_file():
        _check_no_revision(source, revision)
        return _open_file(path, str(source))
    folder = fetch(source, revision, HUB_SAFETENSORS)
    if folder != path and not any((folder / name).exists() for name in WEIGHT_FILES[:2]):
        folder = fetch(source, revision, HUB_SAFETENSORS + HUB_BINS)
    checkpoint = _open_folder(folder, str(source))
    if folder != path and re.fullmatch(r"[0-9a-f]{40}", folder.name):
        checkpoint.revision = folder.name
    return checkpoint


def fetch(source: str | Path, revision: str | None, patterns: list[str]) -> Path:
    """The folder that `source` is, or the download of the files that match, if it is a Hub id.

    Raises:
        ConversionError: if it is neither.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if not str(source):
        raise ConversionError("an adapter's name is empty; name its folder or its Hub id")
    path = Path(source).expanduser()
    if path.is_dir():
        _check_no_revision(source, revision)
        return path
    if path.is_file():
        raise ConversionError(f"{source} is a file; expected a folder or a Hub id")
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", str(source))
    if not is_id or path.exists() or path.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        raise ConversionError(
            f"{source} does not exist; expected a folder, a .pth file or a Hub id such as facebook/sam-vit-base"
        )
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError) as error:
        at = f" at revision {revision!r}" if revision else ""
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            raise ConversionError(
                f"{str(source)!r} is not a path here, not in the Hub's cache{at}, and the Hub was not reached; "
                "correct the name, see to the network, or unset HF_HUB_OFFLINE"
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise ConversionError(
            f"{str(source)!r} is not a path here and could not be fetched from the Hub{at}: {reason}; correct "
            "the name, or see to the network and `hf auth login`"
        ) from error


def _check_no_revision(source, revision: str | None) -> None:
    if revision is not None:
        raise ConversionError(f"--revision is for Hub ids, and {source} is here on disk; leave it out")


def read_json(path: Path) -> dict:
    """The JSON object in a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not JSON ({error}); copy or write it again") from error
    if not isinstance(content, dict):
        raise ConversionError(
            f"{path} holds a {type(content).__name__}, expected a JSON object; copy or write it again"
        )
    return content


def _open_folder(folder: Path, source: str) -> Checkpoint:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ConversionError(f"{source} holds no config.json, it is an adapter; name its base here")
        raise ConversionError(
            f"{source} holds no config.json; expected a transformers folder, or name the .pth file itself"
        )
    config = read_json(folder / "config.json")
    given = config.get("model_type")
    format = MODEL_TYPES.get(given) if isinstance(given, str) else None
    if format is None:
        known = {"sam2": "SAM 2", "sam2_video": "SAM 2", "sam_hq": "HQ-SAM", "sam3": "SAM 3", "edgetam": "EdgeTAM"}
        name = (
            f"{known[given]} (model_type {given!r})"
            if isinstance(given, str) and given in known
            else f"model_type {given!r}"
        )
        raise ConversionError(f"{source} is {name}, expected a Segment Anything model ('sam' or 'sam_split')")
    tensors = _bare(_folder_tensors(folder, source), source)
    found = format_of(tensors, source)
    if found != format:
        raise ConversionError(
            f"{source}: config.json is for the format {format!r}, but the weights have the keys of {found!r}; "
            "put the config.json beside them that belongs to them"
        )
    return Checkpoint(source, format, tensors, config, _processor(folder))


def _open_file(path: Path, source: str) -> Checkpoint:
    tensors = _bare(SafetensorsFiles([path]) if path.suffix == ".safetensors" else read_pickles([path]), source)
    format = format_of(tensors, source)
    if format != "meta":
        raise ConversionError(
            f"{source} has the keys of the format {format!r}, which needs a config.json: put it into a folder as "
            f"{'model.safetensors' if path.suffix == '.safetensors' else 'pytorch_model.bin'}, its base's config.json "
            "beside it, and name the folder"
        )
    return Checkpoint(source, format, tensors)


def _bare(tensors: Tensors, source: str) -> Tensors:
    """The model's own tensors, without what its trainer has put around them."""
    names = without_pixel_buffers(bare_names(tensors, source), tensors, source)
    if isinstance(tensors, InMemory):
        state = {name: tensors[key] for name, key in names.items()}
        check_dense(state, source)
        return with_own_storage(state)
    if all(name == key for name, key in names.items()) and len(names) == len(tensors):
        return tensors
    return Renamed(tensors, {name: Origin((key,)) for name, key in names.items()})


def _folder_tensors(folder: Path, source: str) -> Tensors:
    name = next((name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if name is None:
        raise ConversionError(f"{source} holds no weights; expected one of {', '.join(WEIGHT_FILES)}")
    reader = SafetensorsFiles if "safetensors" in name else read_pickles
    if not name.endswith(".index.json"):
        return reader([folder / name])
    weight_map = read_json(folder / name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{source}: {name} has no weight_map from tensors to files; copy the folder again")
    suffix = ".safetensors" if reader is SafetensorsFiles else ".bin"
    shards = {shard: _shard(folder, shard, suffix, name) for shard in dict.fromkeys(map(str, weight_map.values()))}
    tensors = reader(list(shards.values()))
    for tensor in [*weight_map, *tensors]:
        if tensor not in tensors:
            raise ConversionError(
                f"{source}: {name} places {tensor!r} in {weight_map[tensor]}, which lacks it; copy the folder again"
            )
        if tensor not in weight_map:
            raise ConversionError(
                f"{source}: a shard holds {tensor!r}, which {name} does not list; copy the folder again"
            )
    return tensors


def _shard(folder: Path, shard: str, suffix: str, index: str) -> Path:
    """The path of a shard that an index names: a plain file name, and not a way out of the folder."""
    if shard in ("", ".", "..") or re.search(r"[/\\\0]", shard) or not shard.endswith(suffix):
        raise ConversionError(
            f"{index} names the file {shard!r}, expected a plain name *{suffix}; it may not leave the folder"
        )
    path = folder / shard
    if not path.is_file():
        raise ConversionError(f"{index} names {shard}, which is not in {folder}; fetch it")
    # A snapshot in the Hub's cache consists of links to the blobs beside it.
    root = folder.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise ConversionError(f"{path} is a link to {path.resolve()}, out of the folder; put the file itself there")
    return path


def _processor(folder: Path) -> dict | None:
    """The image processor's settings: a file of its own, or a part of processor_config.json since transformers 5."""
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").is_file():
        processor = read_json(folder / "processor_config.json").get("image_processor")
        return processor if isinstance(processor, dict) else None
    return None
