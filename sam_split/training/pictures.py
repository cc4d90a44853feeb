"""Evaluations to look at: a page of masks, the worst images first, and each image's gain."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .collator import rgb_pixels
from .evaluation import MEASURES, Evaluation, signed
from .overlays import distinct_colours, overlay

LARGEST_SIDE = 1600  # pixels of a picture
IMAGES = 12  # on a page
BARS = 60  # of a plot of gains
PROMPTED = ("iou_box", "iou_1_click", "iou_3_clicks")
SHOWN = (*PROMPTED, "recall_50", "masks")  # beside an image
GAIN, LOSS = "#0072b2", "#d55e00"

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 100%/1.5 system-ui, sans-serif; }}
body {{ margin: 0 auto; padding: 1rem; max-width: 110rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .1rem .7rem; text-align: right; border-bottom: 1px solid #8886; }}
th:first-child {{ padding-left: 0; text-align: left; font-weight: normal; }}
section {{ margin-top: 2.5rem; }}
h2 {{ margin-bottom: .3rem; font-size: 1.2rem; overflow-wrap: anywhere; }}
.masks {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .7rem; margin-top: .7rem; }}
figure {{ margin: 0; max-width: 40rem; }}
img {{ max-width: 100%; height: auto; }}
figure img {{ width: 100%; }}
</style>
</head>
<body>
<h1>{title}</h1>
{means}
{gains}
<p>{shown} A mask from a box has the colour of its object. Select a picture to enlarge it.</p>
{images}
</body>
</html>
"""


def overlay_page(
    folder: str | Path,
    examples: Sequence[Mapping[str, Any]],
    evaluations: Mapping[str, Evaluation],
    number: int = IMAGES,
    title: str = "Evaluation",
) -> None:
    """Write `index.html` and its pictures into a folder: the masks of the worst images, the worst first.

    Args:
        folder: an existing folder.
        examples: those that were evaluated.
        evaluations: name -> `Evaluation`, one or more, of the same examples; the last one's IoU says which are worst.
            Of two or more, the gain from the first to the last is plotted, see `plot_gains`.
        number: of images, at most.
        title: of the page.
    """
    folder = Path(folder)
    (before, _), (name, last) = _ends(evaluations)
    pictures = folder / "pictures"
    pictures.mkdir()
    gains = ""
    if len(evaluations) > 1:
        plot_gains(folder / "gains.png", evaluations)
        alt = f"Each image's gain from {before} to {name} as bars, the smallest gain first"
        gains = f'<p><img src="gains.png" alt="{_text(alt)}"></p>'
    worst = sorted(range(len(last.images)), key=lambda index: _prompted(last.images[index]))[:number]
    sections = []
    for rank, index in enumerate(worst, start=1):
        rows = {model: evaluation.images[index] for model, evaluation in evaluations.items()}
        figures = "\n".join(_figures(pictures, f"{rank:03}", examples[index], evaluations, index))
        heading = _text(last.images[index]["name"])
        table = _table(_count(last.images[index]["objects"], "object"), rows, SHOWN)
        sections.append(f'<section>\n<h2>{heading}</h2>\n{table}\n<div class="masks">\n{figures}\n</div>\n</section>')
    total, objects = len(last.images), sum(image["objects"] for image in last.images)
    shown = f"The {len(worst)} worst of {total} images" if len(worst) < total else "All images, the worst first"
    page = PAGE.format(
        title=_text(title),
        means=_table(
            f"{_count(total, 'image')}, {_count(objects, 'object')}",
            {model: evaluation.means for model, evaluation in evaluations.items()},
            MEASURES,
        ),
        gains=gains,
        shown=f"{shown}, by the IoU of {_text(name)} from box and clicks.",
        images="\n".join(sections),
    )
    (folder / "index.html").write_text(page, encoding="utf-8")


def _figures(pictures, stem, example, evaluations, index):
    """Draw the masks of an example; yields the figures of a page."""
    pixels = rgb_pixels(example["image"])
    first = next(iter(evaluations.values()))
    objects = first.masks[index]["objects"]
    colours = distinct_colours(objects)
    drawn: list[tuple[str, Any, list[int] | None, str]] = [
        ("truth", objects, colours, f"{_count(len(objects), 'object')} as marked in the data")
    ]
    for number, (name, evaluation) in enumerate(evaluations.items(), start=1):
        row, masks = evaluation.images[index], evaluation.masks[index]
        drawn.append((f"box-{number}", masks["box"], colours, f"{name}, from boxes: IoU {row['iou_box']:.3f}"))
    for number, (name, evaluation) in enumerate(evaluations.items(), start=1):
        if "everything" in evaluation.masks[index]:
            row, masks = evaluation.images[index], evaluation.masks[index]["everything"]
            found = round(row["recall_50"] * row["objects"])
            caption = (
                f"{name}, everything-mode: {_count(len(masks), 'mask')}, {found} of {row['objects']} objects found"
            )
            drawn.append((f"everything-{number}", masks, None, caption))
    for kind, masks, chosen, caption in drawn:
        name = f"{stem}-{kind}.jpg"
        _save(pictures / name, overlay(pixels, masks, chosen))
        source, caption = f"{pictures.name}/{name}", _text(caption)
        alt = f"{_text(first.images[index]['name'])}: {caption}"
        picture = f'<a href="{source}"><img src="{source}" alt="{alt}" loading="lazy"></a>'
        yield f"<figure>\n{picture}\n<figcaption>{caption}</figcaption>\n</figure>"


def _save(path, pixels):
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    picture.save(path, quality=88)


def _table(corner, columns, measures):
    """A table of measures in HTML, from name -> measure -> value."""
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in columns)
    lines = [f'<tr><th scope="col">{_text(corner)}</th>{head}</tr>']
    for measure in measures:
        values = [column[measure] for column in columns.values() if measure in column]
        if values:
            digits = 1 if measure == "masks" else 3
            cells = "".join(f"<td>{value:.{digits}f}</td>" for value in values)
            lines.append(f'<tr><th scope="row">{MEASURES[measure]}</th>{cells}</tr>')
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def plot_gains(path: str | Path, evaluations: Mapping[str, Evaluation]) -> None:
    """Draw each image's gain from the first to the last of evaluations, as bars for each measure, the worst first.

    Args:
        path: of the picture.
        evaluations: name -> `Evaluation`, two or more, of the same examples.
    """
    from matplotlib.figure import Figure

    (before, first), (after, last) = _ends(evaluations)
    measures = [name for name in (*PROMPTED, "recall_50") if name in first.images[0]]
    gains = np.array(
        [[b[name] - a[name] for name in measures] for a, b in zip(first.images, last.images, strict=True)]
    )
    order = gains[:, : len(PROMPTED)].mean(1).argsort(kind="stable")[:BARS]
    figure = Figure(figsize=(2 + 2.4 * len(measures), 1.5 + 0.22 * len(order)), layout="constrained")
    axes = figure.subplots(1, len(measures), sharey=True)
    for axis, measure, gain in zip(axes, measures, gains.T, strict=True):
        alike = gains[:, : len(PROMPTED)] if measure in PROMPTED else gain  # one scale for all that can be compared
        limit = max(0.05, 1.05 * np.abs(alike[order]).max())
        axis.barh(range(len(order)), gain[order], color=np.where(gain[order] < 0, LOSS, GAIN))
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlim=(-limit, limit), ylim=(len(order) - 0.4, -0.6))
        mean = last.means[measure] - first.means[measure]
        axis.set_title(MEASURES[measure].replace(": ", ":\n") + f"\nmean {signed(mean)}", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(labelsize=8, left=False)
    names = [last.images[index]["name"] for index in order]
    axes[0].set_yticks(range(len(order)), [name if len(name) < 30 else f"…{name[-28:]}" for name in names])
    some = f"; the {len(order)} worst of {len(gains)} images" if len(order) < len(gains) else ""
    figure.suptitle(f"gain per image, from {before} to {after}{some}", fontsize=10)
    figure.savefig(path, dpi=110)


def _ends(evaluations):
    """The first and the last name and evaluation, of the same images."""
    names = [[image["name"] for image in evaluation.images] for evaluation in evaluations.values()]
    if any(own != names[0] for own in names):
        raise ValueError("the evaluations are of different images; evaluate all models on the same examples")
    pairs = list(evaluations.items())
    return pairs[0], pairs[-1]


def _prompted(image):
    return sum(image[measure] for measure in PROMPTED)


def _count(number, noun):
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _text(text):
    return html.escape(str(text))
