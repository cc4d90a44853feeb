"""What a folder holds: a split model or an adapter, with its config, its code files, and its weights."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Base:
    """The model on the Hub that an adapter belongs to, or that weights were made from."""

    repo_id: str
    revision: str | None = None


def is_adapter(folder: str | Path) -> bool:
    """Whether the folder holds a PEFT adapter and not a model."""
    return (Path(folder) / "adapter_config.json").is_file()


def read_base(folder: str | Path, given: Base | None = None) -> Base:
    """What the adapter in `folder` belongs to: `given`, or else what its config names.

    Raises:
        ValueError: if that is not a Hub id.
    """
    config = read_json(Path(folder) / "adapter_config.json")
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    if given is not None:
        return Base(given.repo_id, given.revision or (revision if given.repo_id == named else None))
    base = hub_id(named)
    if base is None:
        raise ValueError(
            f"adapter_config.json in {folder} names the base {named!r}, expected a Hub id: nobody else could load it; "
            "push the base first, then name it with --base-model NAME/REPOSITORY"
        )
    return Base(base, revision)


def model_config(folder: Path) -> dict:
    """The config of the split model in `folder`.

    Raises:
        ValueError: if it is of another kind of model, or none.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != "sam_split":
        raise ValueError(
            f"config.json in {folder} says model_type {config.get('model_type')!r}, expected 'sam_split'; "
            f"`sam-split convert {folder} OUT` makes such a folder"
        )
    return config


def hub_id(source) -> str | None:
    """`source` if it reads as `name/repository` and is not a file or folder here."""
    if not isinstance(source, str) or Path(source).exists():
        return None
    return source if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) else None


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: if there is no such file, or something else in it.
    """
    if not path.is_file():
        raise ValueError(
            f"{path.parent} holds no {path.name}; give a folder that `sam-split convert` or save_pretrained wrote"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


# Code


def code_files(folder: str | Path) -> list[str]:
    """The code files of a folder; a version before or after the installed one may have fewer or more."""
    return sorted(path.name for path in Path(folder).glob("*_sam_split.py"))


def modified_code(folder: str | Path) -> list[str]:
    """The code files of `folder` that are not byte for byte those of the installed `sam_split`, or missing."""
    import sam_split

    package = Path(sam_split.__file__).parent
    theirs = {name: Path(folder, name).read_bytes() for name in code_files(folder)}
    ours = {name: (package / name).read_bytes() for name in sam_split.CODE_FILES}
    return sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))


# Weights


def tensor_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor; only the headers of the files are read.

    Raises:
        ValueError: if a file is cut short or is not safetensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as weights:
                shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); write it again") from None
    return shapes


def weights_digest(folder: str | Path) -> str:
    """A sha256 over the name, dtype, shape and bytes of every tensor, the same however they are spread over files.

    The bytes are read in small pieces: a mapped file would count as this process's memory.
    """
    tensors = []
    for path in _weight_files(folder):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, tensor in header.items():
                start, end = tensor["data_offsets"]
                file.seek(8 + length + start)
                content = hashlib.sha256()
                for done in range(start, end, READ_BYTES):
                    content.update(file.read(min(READ_BYTES, end - done)))
                tensors.append([name, tensor["dtype"], tensor["shape"], content.hexdigest()])
    return hashlib.sha256(json.dumps(sorted(tensors)).encode()).hexdigest()


def _weight_files(folder: str | Path) -> list[Path]:
    pattern = "adapter_model*.safetensors" if is_adapter(folder) else "model*.safetensors"
    return sorted(Path(folder).glob(pattern))
