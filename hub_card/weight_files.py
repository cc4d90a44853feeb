"""What the safetensors files of a folder hold: names, shapes, and a digest of all values."""

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

READ_BYTES = 1 << 22


def is_adapter(folder: str | Path) -> bool:
    """Whether the folder holds a PEFT adapter and not a model."""
    return (Path(folder) / "adapter_config.json").is_file()


def tensor_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor; only the headers of the files are read.

    Raises:
        ValueError: if a file is cut short or is not safetensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _files(folder):
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
    for path in _files(folder):
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


def _files(folder: str | Path) -> list[Path]:
    pattern = "adapter_model*.safetensors" if is_adapter(folder) else "model*.safetensors"
    return sorted(Path(folder).glob(pattern))
