"""Segment everything in many images, one after the other, so that a run that was stopped can go on.

    image ──> parts/….json, whole or not there ──> annotations.json
                    └──> masks/, labels/, overlays/

A part is named after its image's name, size and time of change. An image whose part is there is not segmented again;
what is drawn from it is drawn when it is asked for. No result depends on where a run was stopped.
"""

import json
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sam_split.images_sam_split import pixels_of

from .atomic import check_out, replacing
from .errors import ConversionError, ConversionWarning
from .folder import write_json
from .image_files import Found, find_images
from .loading import load_model, on_device, statistics_of
from .mask_images import draw_labels, draw_masks, draw_overlay
from .sources import read_json

FORMATS = ("coco", "png", "labels")
# How an option of `generate_masks` is called on the command line.
FLAGS = {
    "points_per_crop": "--points",
    "crops_n_layers": "--crop-layers",
    "pred_iou_thresh": "--min-iou",
    "stability_score_thresh": "--min-stability",
    "max_hole_area": "--min-region",
    "max_sprinkle_area": "--min-region",
}
SETTINGS, PARTS, PARTIAL = "segment.json", "parts", ".partial"


@dataclass
class Report:
    """What a run has done.

    Args:
        root: the folder that names of images start from.
        images, masks: how many `annotations.json` holds.
        segmented: how many images were segmented in this run.
        drawn: how many images something was drawn for in this run.
        skipped: names of those that cannot be read.
    """

    root: Path
    images: int = 0
    masks: int = 0
    segmented: int = 0
    drawn: int = 0
    skipped: list[str] = field(default_factory=list)


def segment(
    source,
    images: Iterable[str],
    out,
    *,
    adapter=None,
    format: str = "coco",
    overlay: bool = False,
    skip_bad: bool = False,
    device: str | None = None,
    progress: bool = True,
    **options,
) -> Report:
    """Segment everything in images, and write all masks as one COCO json.

    Args:
        source: a checkpoint in any format.
        images: files, folders and glob patterns.
        out: a folder to make, or one that an earlier run with the same source, adapter and options has begun.
        adapter: a PEFT adapter of it, or None.
        format: one of FORMATS.
        overlay: whether to draw an overlay for each image.
        skip_bad: whether to go on after an image that cannot be read.
        device: None for CUDA where there is one, else the CPU.
        progress: whether to show a progress bar.
        options: of `generate_masks`.

    Raises:
        ConversionError: for an image that cannot be read, and for arguments that do not fit `out` or each other.
    """
    if format not in FORMATS:
        raise ConversionError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    _check_pillow()
    out = _check_folder(out, source, adapter)
    root, found = find_images(images, out)
    model, processor, digest = load_model(source, adapter)
    model, statistics = on_device(device, model), statistics_of(processor)
    is_new = not out.exists()
    names = {"images": str(root), "source": str(source), "adapter": adapter and str(adapter)}
    _begin(out, {**names, "weights": digest, **options})
    try:
        return _run(model, root, found, out, format, overlay, skip_bad, progress, {**statistics, **options})
    finally:
        _clear(out)
        if is_new and not (out / PARTS).exists():  # no image was finished
            shutil.rmtree(out)


def _run(model, root, found, out, format, overlay, skip_bad, progress, options) -> Report:
    """Segment and draw what is not there yet, then join."""
    report = Report(root)
    views = {image: _views(out, name, format, overlay) for image, name in _view_names(found).items()}
    todo = [image for image in found if not all(path.exists() for path in [out / PARTS / image.part, *views[image]])]
    with _bar(len(found), len(found) - len(todo), progress) as bar:
        for image in todo:
            try:
                part = out / PARTS / image.part
                pixels = _read(image.path)
                if not part.exists():
                    content = masks_of(model, image.name, pixels, options)
                    report.segmented += 1
                else:
                    content = read_json(part)
                    views[image] = {path: draw for path, draw in views[image].items() if not path.exists()}
                for path, draw in views[image].items():
                    with replacing(path, out / PARTIAL) as partial:
                        draw(partial, content["annotations"], pixels.permute(1, 2, 0).numpy())
                report.drawn += bool(views[image])
                if not part.exists():  # last, because an image with a part is finished
                    _write_json(part, content, out)
            except _Unreadable as error:
                if not skip_bad:
                    raise ConversionError(
                        f"{error}; remove it or add --skip-bad, and run the same command again: it goes on from here"
                    ) from error
                report.skipped.append(image.name)
                bar.clear()
                warnings.warn(f"skipped: {error}", ConversionWarning, stacklevel=2)
            bar.update()
    skipped = set(report.skipped)
    kept = [image for image in found if image.name not in skipped]
    if not kept:
        raise ConversionError(
            f"none of the {len(found)} images can be read; name others, in a format that Pillow knows"
        )
    report.images, report.masks = len(kept), _join(out, kept)
    return report


class _Unreadable(ConversionError):
    """A file that is no image, or is damaged, or too large."""


def _read(path: Path) -> torch.Tensor:
    """(3, height, width) bytes, as `generate_masks` itself sees the file."""
    try:
        return pixels_of(path)
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise _Unreadable(f"{path} cannot be read as an image ({' '.join(str(error).split())})") from error


def _check_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ConversionError('reading images needs pillow: pip install "sam-split[demo]"') from error


# The model


def masks_of(model, name: str, pixels: torch.Tensor, options: dict) -> dict:
    """The part of an image: COCO's entries for it and for its masks, best first, but for their numbers."""
    try:
        result = model.generate_masks(
            pixels,
            output_masks=False,
            output_rle_mask="compressed",
            output_bboxes_mask=True,
            output_details=True,
            progress=False,
            **options,
        )
    except torch.OutOfMemoryError as error:
        raise ConversionError(f"{name} does not fit into the device's memory; use --device cpu") from error
    annotations = [
        {
            "category_id": 1,
            "segmentation": rle,
            "bbox": [x0, y0, x1 - x0 + 1, y1 - y0 + 1] if area else [0, 0, 0, 0],
            "area": area,
            "iscrowd": 0,
            "score": score,
        }
        for rle, (x0, y0, x1, y1), area, score in zip(
            result["rle_mask"],
            result["bounding_boxes"].tolist(),
            result["areas"].tolist(),
            result["scores"].tolist(),
            strict=True,
        )
    ]
    return {
        "image": {"file_name": name, "width": pixels.shape[2], "height": pixels.shape[1]},
        "annotations": annotations,
    }


# What is written


def _check_folder(out, source, adapter) -> Path:
    """The absolute path of the folder to write to, or raise."""
    folder = Path(out).absolute()
    if not str(out) or not folder.is_dir():
        return check_out(out, source, adapter)
    if not (folder / SETTINGS).is_file() and any(path.name != PARTIAL for path in folder.iterdir()):
        raise ConversionError(
            f"{out} exists already and was not made by `sam-split segment`; OUT, the last argument, is a folder to "
            "make, or one to go on with"
        )
    return folder


def _begin(out: Path, settings: dict) -> None:
    """Make `out`, or see that it was begun with the same settings."""
    _clear(out)
    if not (out / SETTINGS).is_file():
        out.mkdir(exist_ok=True)
        with replacing(out / SETTINGS, out / PARTIAL) as path:
            write_json(path, settings)
        return
    before = read_json(out / SETTINGS)
    for name in ("weights", "images", *(name for name in settings if name in FLAGS)):
        if before.get(name) == settings[name]:
            continue
        was, given = before.get(name), settings[name]
        if name == "weights":
            was, given = (_model_name(values) for values in (before, settings))
            name = "other weights:" if was == given else "the model"
        name = {"images": "images below", **FLAGS}.get(name, name)
        raise ConversionError(
            f"{out} was begun with {name} {was}, and this is {given}; repeat the command as it was, or name another "
            "folder"
        )


def _clear(out: Path) -> None:
    """Remove what was not finished."""
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


def _model_name(settings: dict) -> str:
    adapter = f" with {settings['adapter']}" if settings.get("adapter") else ""
    return f"{settings.get('source')}{adapter}"


def _view_names(images: list[Found]) -> dict[Found, str]:
    """The name of what is drawn for each image: without its suffix, unless another image has the same."""
    stems = [image.name.removesuffix(Path(image.name).suffix) for image in images]
    return {image: stem if stems.count(stem) == 1 else image.name for image, stem in zip(images, stems, strict=True)}


def _views(out: Path, name: str, format: str, overlay: bool) -> dict:
    """Path -> function that draws it, for all that is wanted of an image beside the json."""
    views = {}
    if format == "png":
        views[out / "masks" / name] = draw_masks
    if format == "labels":
        views[out / "labels" / f"{name}.png"] = draw_labels
    if overlay:
        views[out / "overlays" / f"{name}.jpg"] = draw_overlay
    return views


def _write_json(path: Path, content: dict, out: Path) -> None:
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    with replacing(path, out / PARTIAL) as partial:
        partial.write_text(text, encoding="ascii")


def _join(out: Path, images: list[Found]) -> int:
    """Write annotations.json, a part in memory at a time; returns the number of masks."""
    masks, entries = 0, []
    with replacing(out / "annotations.json", out / PARTIAL) as partial, partial.open("w", encoding="ascii") as file:
        file.write('{"info":{"description":"masks by sam-split segment"},"annotations":[')
        for number, image in enumerate(images, start=1):
            part = read_json(out / PARTS / image.part)
            entries.append({"id": number, **part["image"]})
            for annotation in part["annotations"]:
                file.write(",\n" if masks else "\n")
                masks += 1
                file.write(json.dumps({"id": masks, "image_id": number, **annotation}, separators=(",", ":")))
        file.write('\n],"images":')
        file.write(json.dumps(entries, separators=(",", ":")))
        file.write(',"categories":[{"id":1,"name":"object"}]}\n')
    return masks


def _bar(total: int, done: int, show: bool):
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=done, unit="image", desc="segment", disable=None if show else True)
