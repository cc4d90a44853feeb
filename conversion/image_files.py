"""The image files that arguments name: files, folders and patterns."""

import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import ConversionError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # of the files to take from a folder


@dataclass(frozen=True)
class Found:
    """An image to segment.

    Args:
        path: of the file.
        name: its path below the folder that holds all images, with slashes.
        part: name of its part.
    """

    path: Path
    name: str
    part: str


def find_images(arguments: Iterable[str], out: Path) -> tuple[Path, list[Found]]:
    """The folder that holds all images, and the images, sorted by name.

    Args:
        arguments: files, folders (with all below them, but nothing hidden) and glob patterns.
        out: a folder to take no image from.

    Raises:
        ConversionError: if an argument names nothing.
    """
    paths, roots = set(), []
    for argument in arguments:
        if not str(argument):
            raise ConversionError("the name of an image is empty; name a file, a folder or a pattern")
        path = Path(argument).expanduser()
        matches = [path] if path.exists() else [Path(match) for match in glob.glob(str(path), recursive=True)]
        found = [Path(os.path.abspath(file)) for match in matches for file in _files(match)]
        found = [file for file in found if not file.resolve().is_relative_to(out.resolve())]
        if not found and "://" in str(argument):
            raise ConversionError(f"{argument!r} is an address; download the image, and name its file or folder")
        if not found:
            raise ConversionError(
                f"{argument!r} names no image; expected a file, a folder with {', '.join(SUFFIXES)}, or a pattern "
                "such as 'photos/*.jpg'"
            )
        paths |= set(found)
        roots.append(path if path.is_dir() else _fixed(path))
    root = Path(os.path.commonpath([os.path.abspath(folder) for folder in roots]))
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    return root, [Found(path, name, _part(path, name)) for name, path in named]


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for folder, below, files in os.walk(path):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(folder, name)


def _fixed(pattern: Path) -> Path:
    """The folder of a file, or the one that a pattern starts from."""
    while not pattern.parent.is_dir():
        pattern = pattern.parent
    return pattern.parent


def _part(path: Path, name: str) -> str:
    state = path.stat()
    return hashlib.sha256(os.fsencode(f"{name}\0{state.st_size}\0{state.st_mtime_ns}")).hexdigest()[:32] + ".json"
