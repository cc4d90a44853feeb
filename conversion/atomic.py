"""Outputs that appear whole or not at all: written beside their place, flushed to the disk, then renamed into it."""

import contextlib
import glob
import os
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import ConversionError, ConversionWarning

FILE_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


def check_out(out, *sources, is_file: bool = False) -> Path:
    """The absolute path of what is to be made, or raise.

    Args:
        out: its parent must be a folder, and it must not exist.
        sources: what it is made from; where one is a folder, `out` may not be inside it.
        is_file: whether a file is to be made, else a folder.
    """
    if not str(out):
        raise ConversionError("OUT is empty; name what to make")
    out = Path(out).absolute()
    if len(os.fsencode(out.name)) > 255:
        raise ConversionError(
            f"{out.name} is too long for a name: {len(os.fsencode(out.name))} bytes, 255 at most; shorten it"
        )
    check_new(out)
    if not is_file and out.suffix in FILE_SUFFIXES:
        raise ConversionError(
            f"{out} would be a folder, and is named like a file; name a folder, or add --format meta"
        )
    for source in filter(None, sources):
        folder = Path(source).expanduser()
        if folder.is_dir() and out.parent.resolve().is_relative_to(folder.resolve()):
            raise ConversionError(f"{out} is inside {source}, which it is made from; name a place outside it")
    return out


def check_new(out: Path) -> None:
    """Raise unless `out` can be made: it must not exist, and its parent must be a folder."""
    if os.path.lexists(out):
        raise ConversionError(f"{out} exists already; nothing is overwritten: remove it, or name another place")
    if not out.parent.is_dir():
        raise ConversionError(f"{out.parent} is not a folder; make it first")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`: renamed to `out` when the block ends well, removed when it does not.

    A process that is killed leaves the temporary folder and no `out`; the next run says so and is not hindered.

    Raises:
        ConversionError: if `out` exists, before the block or after it.
    """
    check_new(out)
    _tell_of_leftovers(out)
    partial = _partial(out)
    try:
        with _naming(out):
            partial.mkdir()
            yield partial
            _flush(partial)
            check_new(out)
            try:
                os.rename(partial, out)  # fails if another process has just put its files there
            except OSError as error:
                check_new(out)
                raise error
            _flush_entry(out.parent)
    except BaseException:  # Ctrl-C as well
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """The same for a single file: a temporary path, which becomes `out` when the block ends well."""
    check_new(out)
    _tell_of_leftovers(out)
    partial = _partial(out)
    try:
        with _naming(out):
            yield partial
            _flush_entry(partial)
            try:
                os.link(partial, out)  # unlike a rename, never replaces a file
            except FileExistsError:
                check_new(out)
                raise
            _flush_entry(out.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(out: Path, beside: Path) -> Iterator[Path]:
    """A temporary path, for a file or a folder, which takes the place of `out` when the block ends well.

    Args:
        out: what to make or to replace; its folders are made where they are missing.
        beside: a folder on the same disk for temporary paths; what a process that is killed leaves there is rubbish.
    """
    beside.mkdir(exist_ok=True)
    partial = beside / f"{secrets.token_hex(8)}.partial"
    with _naming(out):
        yield partial
        if partial.is_dir():
            _flush(partial)
            shutil.rmtree(out, ignore_errors=True)  # a rename replaces files only
        else:
            _flush_entry(partial)
        out.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, out)
        _flush_entry(out.parent)


@contextlib.contextmanager
def flushing(paths: Iterable[Path]) -> Iterator[None]:
    """Flush files to the disk while the block runs: reading them back need not wait for that."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        flushed = [thread.submit(_flush_entry, path) for path in paths]
        yield
    for file in flushed:
        file.result()  # raises what the disk had to say


def _stem(out: Path) -> str:
    """The start of the temporary name, short enough for the rest of it: names have 255 bytes at most."""
    return "." + os.fsdecode(os.fsencode(out.name)[:200])


def _partial(out: Path) -> Path:
    return out.parent / f"{_stem(out)}.{secrets.token_hex(4)}.partial"


@contextlib.contextmanager
def _naming(out: Path) -> Iterator[None]:
    """Add `out` to what the system says of a full disk or a folder that is read-only."""
    try:
        yield
    except OSError as error:
        ours = error.filename is None or ".partial" in str(error.filename)
        if error.errno is None or not ours:
            raise
        raise OSError(error.errno, error.strerror, str(out)) from error


def _tell_of_leftovers(out: Path) -> None:
    for path in out.parent.glob(f"{glob.escape(_stem(out))}.*.partial"):
        warnings.warn(
            f"{path} is left from a conversion that was killed, unless one is running; remove it to free its space",
            ConversionWarning,
            stacklevel=2,
        )


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
