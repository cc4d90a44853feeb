"""The images and the figure of `sam-split demo`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConversionError

if TYPE_CHECKING:
    import torch

LIMIT = 1e-5  # of the largest output, as in `sam-split verify`


@dataclass(frozen=True)
class Scene:
    """An image of skimage.data and its prompts.

    Args:
        name: of the function there.
        point: (x, y) in pixels of the crop.
        box: (x0, y0, x1, y1) in pixels of the crop.
        crop: rows and columns to take; everything-mode gets the whole photograph.
        everything: options of everything-mode there.
    """

    name: str
    point: tuple[int, int]
    box: tuple[int, int, int, int]
    crop: tuple[slice, slice] = (slice(None), slice(None))
    everything: dict[str, int] = field(default_factory=dict)

    def image(self):
        """The crop, (height, width, 3) bytes."""
        return self.photograph()[self.crop]

    def photograph(self):
        """(height, width, 3) bytes."""
        try:
            import matplotlib  # noqa: F401
            from skimage import color, data
        except ImportError as error:
            raise ConversionError(
                f'the demo needs {error.name}, which is not installed: pip install "sam-split[demo]"'
            ) from error
        image = getattr(data, self.name)()
        return color.gray2rgb(image) if image.ndim == 2 else image


# A coffee cup: the point is on the cup, the box holds the saucer too. CC0, Rachel Michetti.
COFFEE = Scene("coffee", point=(290, 180), box=(78, 5, 482, 388))
# One of the Greek coins from Pompeii, cropped to the scale of the tiny SAM's training shapes; everything-mode tries
# crops of that scale, too. Public domain, Brooklyn Museum.
COINS = Scene(
    "coins",
    point=(62, 62),
    box=(39, 40, 85, 85),
    crop=(slice(133, 261), slice(40, 168)),
    everything={"crops_n_layers": 2, "crop_n_points_downscale_factor": 2},
)


@dataclass(frozen=True)
class View:
    """The mask that both models give for one prompt.

    Args:
        prompt: "point" or "box".
        mask: index of the mask.
        score: IoU that stock predicts for it.
        theirs, ours: (height, width) of the image, the mask's logits.
    """

    prompt: str
    mask: int
    score: float
    theirs: "torch.Tensor"
    ours: "torch.Tensor"


def plot(path: Path, image, scene: Scene, views: list[View], everything: list[dict], name: str) -> None:
    """What both models make of prompts, and what ours finds without any.

    Args:
        path: of the picture.
        image: the scene's.
        scene: where it is from.
        views: a row for each: the image with the prompt, the mask of each model, the difference of their logits.
        everything: annotations of the photograph, which stands below, without and with them.
        name: of the model.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    height, width = image.shape[:2]
    photograph = scene.photograph()
    panel = 3.6  # inches
    heights = [len(views) * (panel * height / width + 0.3) + 0.4]
    heights.append(2 * panel * photograph.shape[0] / photograph.shape[1] + 0.3)
    figure = plt.figure(figsize=(4 * panel + 0.9, sum(heights)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.04, wspace=0.01, hspace=0.02)
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    upper.suptitle(f"SamSplit and transformers' SamModel — {name}", x=0.008, ha="left", fontsize=14)
    _plot_views(upper, image, scene, views)
    _plot_everything(lower, photograph, everything)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_views(figure, image, scene: Scene, views: list[View]) -> None:
    largest = max(view.theirs.abs().max().item() for view in views)
    axes = figure.subplots(len(views), 4, squeeze=False)
    for row, view in zip(axes, views, strict=True):
        row[0].imshow(image)
        _plot_prompt(row[0], scene, view.prompt)
        row[0].set_title(f"{view.prompt}: mask {view.mask}, IoU score {view.score:.3f}", loc="left", fontsize=11)
        for axis, label, logits in ((row[1], "SamModel", view.theirs), (row[2], "SamSplitModel", view.ours)):
            inside = (logits > 0).numpy()
            _plot_mask(axis, image, inside)
            _plot_prompt(axis, scene, view.prompt)
            axis.set_title(f"{label}: {inside.mean():.1%} of the image", loc="left", fontsize=11)
        difference = (view.ours - view.theirs).abs()
        shown = row[3].imshow(difference, vmin=0, vmax=LIMIT * largest, cmap="magma")
        row[3].set_title(f"difference of logits, largest {difference.max():.1e}", loc="left", fontsize=11)
    for axis in axes.flat:
        axis.set_axis_off()
    bar = figure.colorbar(shown, ax=axes[:, 3], aspect=40, pad=0.02, ticks=[0, LIMIT * largest])
    bar.ax.set_yticklabels(["0", f"{LIMIT * largest:.1e}"], fontsize=10)
    bar.set_label(f"up to {LIMIT:g} of the largest logit", fontsize=10, labelpad=-28)


def _plot_everything(figure, photograph, annotations: list[dict]) -> None:
    """The photograph, and beside it its masks as `sam-split segment --overlay` draws them."""
    from sam_split.training.overlays import overlay

    count = f"{len(annotations)} mask{'' if len(annotations) == 1 else 's'}"
    panels = {
        "the whole photograph, without a prompt": photograph,
        f"SamSplitModel, everything-mode: {count} at its default thresholds": overlay(photograph, annotations),
    }
    for axis, (title, shown) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        axis.imshow(shown)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_axis_off()


def _plot_mask(axis, image, inside) -> None:
    """The image, tinted inside the mask and pale grey outside, with the mask's contour."""
    grey = image.mean(-1, keepdims=True)
    tinted = 0.75 * image + [0, 50, 60]
    axis.imshow((inside[..., None] * tinted + ~inside[..., None] * (0.35 * grey + 160)).clip(0, 255).astype("uint8"))
    if inside.any() and not inside.all():
        axis.contour(inside, levels=[0.5], colors="#0050d0", linewidths=0.7)


def _plot_prompt(axis, scene: Scene, prompt: str) -> None:
    from matplotlib.patches import Rectangle

    if prompt == "point":
        axis.plot(*scene.point, marker="*", markersize=16, color="#30e060", markeredgecolor="black")
    else:
        x0, y0, x1, y1 = scene.box
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, linewidth=2, edgecolor="#30e060"))
