"""What a run leaves beside its adapter: a card, a table, overlays."""

import numpy as np
import torch

from .prompts import boxes_around

COLUMNS = ["preset", "IoU before", "IoU after", "trainable", "peak GiB", "s/step"]


def save_adapter(model, folder, row):
    """The adapter and PEFT's card of it, with the results."""
    from huggingface_hub import ModelCard

    model.save_pretrained(folder)
    card = ModelCard.load(folder / "README.md")
    card.text = f"# SamSplit adapter\n\nMade by `sam-split finetune`, on held-out images:\n\n{table([row])}\n"
    card.save(folder / "README.md")


def table(rows):
    def shown(value):
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [COLUMNS, ["---"] * len(COLUMNS), *([shown(row[column]) for column in COLUMNS] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@torch.no_grad()
def draw_overlays(model, images, examples, collate_images, collate_examples, path, number=4):
    """A row per held-out image: masks before, after, and the truth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    number = min(number, len(images))
    figure, axes = plt.subplots(number, 3, figsize=(9, 3 * number), squeeze=False)
    processor = collate_images.image_processor
    mean, deviation = (torch.tensor(value) for value in (processor.image_mean, processor.image_std))
    for row, index in zip(axes, range(number), strict=True):
        pixels = collate_images([images[index]])["pixel_values"][0].permute(1, 2, 0) * deviation + mean
        batch = collate_examples([examples[index]])
        batch = {name: batch[name].to(model.device) for name in ("pixel_values", "labels")}
        labels = batch["labels"]
        inputs = {"pixel_values": batch["pixel_values"], "input_boxes": boxes_around(labels)}
        after = model(**inputs, multimask_output=False).pred_masks[0, :, 0]
        with model.disable_adapter():
            before = model(**inputs, multimask_output=False).pred_masks[0, :, 0]
        for axis, name, masks in zip(
            row, ("before", "after", "truth"), (before > 0, after > 0, labels[0] == 1), strict=True
        ):
            masks = torch.nn.functional.interpolate(masks[None].float(), pixels.shape[:2])[0].cpu()
            axis.imshow(pixels.clamp(0, 1))
            for i, mask in enumerate(masks):
                shade = np.zeros((*mask.shape, 4))
                shade[mask > 0.5] = (*matplotlib.colormaps["tab10"](i % 10)[:3], 0.55)
                axis.imshow(shade)
            axis.set_title(name)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
