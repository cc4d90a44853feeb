"""From stock transformers or Meta to a complete SamSplit folder."""

import contextlib
from pathlib import Path

from .errors import ConversionError
from .folder import split_config, write_split_files
from .geometry import check_shapes, config_from_shapes
from .sources import open_checkpoint
from .staging import check_new, new_folder
from .writing import MAX_SHARD_BYTES, write_weights


def convert(source, out, *, revision: str | None = None, image_size=None, progress: bool = True) -> None:
    """Write the model in `source` as a SamSplit folder that loads with AutoModel.

    Args:
        source: a Hub id, a stock transformers folder (safetensors or .bin, sharded or not) or a .pth of Meta's.
        out: the folder to make; it appears whole or not at all.
        revision: branch, tag or commit of a Hub id.
        image_size: None to keep the input size, else an int or (height, width) in pixels.
        progress: whether to show a progress bar.

    Raises:
        ConversionError: if `source` is no SAM checkpoint, or damaged, or `out` exists.
    """
    out = Path(out).absolute()
    check_new(out)
    checkpoint = open_checkpoint(source, revision=revision)
    if checkpoint.layout == "split":
        raise ConversionError(f"{source} is split already; load it as it is, or turn it back with `sam-split fuse`")
    tensors = checkpoint.split_tensors()
    config = split_config(checkpoint.config or config_from_shapes(tensors.shapes), tensors)
    check_shapes(config, tensors.shapes)
    with new_folder(out) as folder, progress_bar(2 * tensors.nbytes, progress) as advance:
        write_weights(folder, tensors, advance, MAX_SHARD_BYTES)
        write_split_files(folder, config, checkpoint)


@contextlib.contextmanager
def progress_bar(total: int, show: bool):
    """A function to be called with the bytes done."""
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="write and check", disable=not show) as bar:
        yield bar.update
