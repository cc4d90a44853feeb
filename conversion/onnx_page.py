"""An exported model with a page on which one clicks and sees its masks; with an adapter, beside the base's."""

import filecmp
import shutil
from pathlib import Path
from typing import Any

from hub_card.card import short_name
from hub_card.onnx_card import describe_page

from .atomic import check_out, new_folder
from .folder import write_json
from .onnx_export import export
from .verification import Row

# Beside conversion/, in a checkout and in the wheel.
PAGE = Path(__file__).parents[1] / "hub_card" / "page"


def export_page(source, out, *, adapter=None, **options) -> list[Row]:
    """Write what `export` writes, and a page that shows it in a browser.

    Args:
        source: a checkpoint in any format.
        out: the folder to make; it appears whole and checked, or not at all.
        adapter: a PEFT adapter of it to merge. The base is exported as well then, into `base`, less the files that
            the adapter did not change.
        options: those of `export`.

    Returns:
        What was compared with torch, and how far it differs; with an adapter, the base's rows at the end.
    """
    out = check_out(out, source, adapter)
    with new_folder(out) as folder:
        seen: dict[str, Path] = {}
        rows = export(source, folder / "adapted", adapter=adapter, seen=seen, **options)
        page: dict[str, Any] = {"adapter": short_name(adapter) if adapter else None, "base_files": []}
        if adapter:
            base = export(source, folder / "base", seen=seen, **options)
            rows += [Row(f"base: {row.compared}", row.result, row.passed) for row in base]
            page["base_files"] = _keep_what_differs(folder / "base", folder / "adapted")
        for path in (folder / "adapted").iterdir():
            path.rename(folder / path.name)
        (folder / "adapted").rmdir()
        for path in PAGE.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())  # a failing copy would name the source
        write_json(folder / "page.json", page)
        describe_page(folder)
    return rows


def _keep_what_differs(base: Path, other: Path) -> list[str]:
    """Remove the graphs of `base` that `other` has as well, and all but graphs: the names of those left."""
    kept = []
    for path in [path for path in base.rglob("*") if path.is_file()]:
        name = path.relative_to(base)
        if name.parts[0] == "onnx" and not filecmp.cmp(path, other / name, shallow=False):
            kept.append(name.as_posix())
        else:
            path.unlink()
    if not kept:
        shutil.rmtree(base)
    return sorted(kept)
