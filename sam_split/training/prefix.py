"""The image encoder's frozen first layers, computed once."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging

from ..modeling_sam_split import VOID_LABEL
from .checks import check_layers
from .collator import SamSplitCollator


@torch.no_grad()
def prefix_hidden_states(model: nn.Module, pixel_values: torch.Tensor, layers: int) -> torch.Tensor:
    """Tokens (B, H, W, C) after the first `layers` layers of the image encoder, to be kept for `drop_prefix`."""
    encoder = model.vision_encoder
    check_layers(encoder, layers)
    hidden_states = encoder.patch_embed(pixel_values)
    if encoder.pos_embed is not None:
        hidden_states = hidden_states + encoder.pos_embed
    for layer in encoder.layers[:layers]:
        hidden_states, _ = layer(hidden_states)
    return hidden_states


class PassThrough(nn.Module):
    """Stands where a dropped layer was, so that the others keep their names."""

    def forward(self, hidden_states, output_attentions=False):
        return hidden_states, None


def drop_prefix(model: nn.Module, layers: int) -> nn.Module:
    """Take away, in place, what `prefix_hidden_states` computed: its tokens become the model's `pixel_values`.

    The layers that stay keep their numbers, so an adapter trained this way fits the whole model.
    """
    encoder = model.vision_encoder
    check_layers(encoder, layers)
    encoder.patch_embed, encoder.pos_embed = nn.Identity(), None
    for index in range(layers):
        encoder.layers[index] = PassThrough()
    return model


class CachedImages(torch.utils.data.Dataset):
    """Images as the frozen first layers left them, one file each, computed once and found again by later runs.

    A file is named by the hash of the layers' weights, the image and its masks, so a change of any makes a new one.

    Args:
        examples: as `collate` takes them.
        collate: a `SamSplitCollator`.
        model: the whole one; `drop_prefix` then fits it to what is here.
        layers: how many are frozen.
        folder: for the files; made where it is missing.
        progress: whether to show a progress bar, once it takes longer than some seconds.
    """

    def __init__(
        self,
        examples: Iterable[Mapping[str, Any]],
        collate: SamSplitCollator,
        model: nn.Module,
        layers: int,
        folder: str | Path,
        progress: bool = False,
    ):
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = hashlib.sha256()
        for name, tensor in sorted(model.vision_encoder.state_dict().items()):
            if not name.startswith("layers.") or int(name.split(".")[1]) < layers:
                weights.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
        self.layers = layers
        self.names: list[str | None] = []
        self.files: list[Path] = []
        for example in logging.tqdm(examples, desc="encode", unit="image", delay=3, disable=not progress):
            batch = collate([example])
            key = weights.copy()
            key.update(
                str(layers).encode() + batch["pixel_values"].numpy().tobytes() + batch["labels"].numpy().tobytes()
            )
            file = Path(folder) / f"{key.hexdigest()[:32]}.safetensors"
            if not file.exists():
                tokens = prefix_hidden_states(model, batch["pixel_values"].to(model.device), layers)
                partial = file.with_suffix(".partial")
                save_file({"pixel_values": tokens[0].cpu().contiguous(), "labels": batch["labels"][0]}, partial)
                partial.rename(file)
            self.files.append(file)
            self.names.append(example.get("name"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"name": self.names[index], **load_file(self.files[index])}

    @staticmethod
    def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch: `pixel_values`, which are tokens (B, H, W, C), and `labels`."""
        prompts = max(len(example["labels"]) for example in examples)
        labels = torch.full((len(examples), prompts, *examples[0]["labels"].shape[1:]), VOID_LABEL, dtype=torch.int8)
        for row, example in zip(labels, examples, strict=True):
            row[: len(example["labels"])] = example["labels"]
        return {"pixel_values": torch.stack([e["pixel_values"] for e in examples]), "labels": labels}
