"""Seeded models for the tests: stock transformers' `SamModel`, Meta's `Sam` and ours, holding the same weights.

Stock initialisation draws weights at 1e-10 and zeroes the relative-position tables, so a freshly built tiny model
agrees with anything. `redraw` gives every tensor a value that the outputs depend on. The numbers come from numpy,
whose generators give the same stream on every machine and every version.
"""

import json

import numpy as np
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn
from transformers import SamConfig, SamModel

from conversion import split_state_dict
from sam_split import SamSplitConfig, SamSplitModel

# Grid 6 x 6 and window 4, so the windowed layer pads by 2; layer 0 is windowed and layer 1 is global.
TINY = {
    "vision_config": {
        "hidden_size": 32,
        "output_channels": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 96,
        "patch_size": 16,
        "window_size": 4,
        "global_attn_indexes": [1],
        "num_pos_feats": 16,
        "mlp_dim": 64,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 96, "patch_size": 16, "mask_input_channels": 16},
    "mask_decoder_config": {
        "hidden_size": 32,
        "mlp_dim": 64,
        "num_attention_heads": 8,
        "iou_head_hidden_dim": 32,
    },
}
IMAGE_SIZE, GRID, CHANNELS = 96, 6, 32
BATCH, PROMPTS, POINTS = 2, 3, 4
SEED = 1


def tiny_config(**vision) -> SamConfig:
    """Stock's config of the tiny model; keywords replace fields of its vision config."""
    return SamConfig(**{**TINY, "vision_config": {**TINY["vision_config"], **vision}})


def split_config(stock: SamConfig, **decoder) -> SamSplitConfig:
    """Ours from what stock writes into `config.json`; keywords replace fields of the mask decoder's config."""
    fields = json.loads(stock.to_json_string())
    del fields["model_type"]
    fields["mask_decoder_config"] = {**fields["mask_decoder_config"], **decoder}
    return SamSplitConfig(**fields)


@torch.no_grad()
def redraw(model: nn.Module, seed: int = SEED) -> nn.Module:
    """Draw every parameter and buffer from a seeded normal, scaled so that activations stay near 1."""
    rng = np.random.default_rng(seed)
    modules, state = dict(model.named_modules()), model.state_dict()
    for key in sorted(state):
        if key == "prompt_encoder.shared_embedding.positional_embedding":  # stock's second name of one tensor
            continue
        path, _, leaf = key.rpartition(".")
        tensor = state[key]
        mean, std = 0.0, tensor[0].numel() ** -0.5  # one over the root of the fan-in
        if isinstance(modules[path], nn.Embedding) or leaf == "pos_embed" or "positional" in leaf:
            std = 1.0
        elif tensor.ndim == 1:  # a bias, or the gain of a layer norm
            mean, std = (1.0, 0.2) if leaf == "weight" else (0.0, 0.2)
        tensor.copy_(torch.from_numpy(mean + std * rng.standard_normal(tuple(tensor.shape))))
    if isinstance(model, SamModel):
        positional = model.shared_image_embedding.positional_embedding
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(positional)
    return model


def stock_model(config: SamConfig | None = None, attn_implementation: str = "sdpa", seed: int = SEED) -> SamModel:
    """Transformers' own model, the first oracle."""
    config = config or tiny_config()
    config._attn_implementation = attn_implementation
    return redraw(SamModel(config), seed).eval()


def split_model(theirs: SamModel, attn_implementation: str = "sdpa") -> SamSplitModel:
    """Ours with the weights of a stock model, which pass through our converter."""
    config = split_config(theirs.config)
    config._attn_implementation = attn_implementation
    ours = SamSplitModel(config)
    ours.load_state_dict(split_state_dict(theirs.state_dict()))
    return ours.eval()


def meta_model(config: SamConfig | None = None, seed: int = SEED) -> Sam:
    """Meta's own model, the second oracle, of the sizes that a stock config names."""
    config = config or tiny_config()
    vision, prompt, decoder = config.vision_config, config.prompt_encoder_config, config.mask_decoder_config
    grid = vision.image_size // vision.patch_size
    sam = Sam(
        ImageEncoderViT(
            img_size=vision.image_size,
            patch_size=vision.patch_size,
            embed_dim=vision.hidden_size,
            depth=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            mlp_ratio=vision.mlp_dim / vision.hidden_size,
            out_chans=vision.output_channels,
            norm_layer=lambda size: nn.LayerNorm(size, eps=vision.layer_norm_eps),
            use_rel_pos=True,
            window_size=vision.window_size,
            global_attn_indexes=tuple(vision.global_attn_indexes),
        ),
        PromptEncoder(
            embed_dim=prompt.hidden_size,
            image_embedding_size=(grid, grid),
            input_image_size=(vision.image_size, vision.image_size),
            mask_in_chans=prompt.mask_input_channels,
        ),
        MaskDecoder(
            transformer_dim=decoder.hidden_size,
            transformer=TwoWayTransformer(
                depth=decoder.num_hidden_layers,
                embedding_dim=decoder.hidden_size,
                num_heads=decoder.num_attention_heads,
                mlp_dim=decoder.mlp_dim,
            ),
            iou_head_depth=decoder.iou_head_depth,
            iou_head_hidden_dim=decoder.iou_head_hidden_dim,
        ),
    )
    return redraw(sam, seed).eval()


def draw(*shape: int, seed: int, low: float | None = None, high: float = IMAGE_SIZE) -> torch.Tensor:
    """A seeded float32 tensor: normal, or uniform in [low, high) when `low` is given."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) if low is None else rng.uniform(low, high, shape)
    return torch.from_numpy(values).float()


def pixels(batch: int = BATCH) -> torch.Tensor:
    """(batch, 3, 96, 96), already normalised: mean 0 and deviation 1."""
    return draw(batch, 3, IMAGE_SIZE, IMAGE_SIZE, seed=1)


def points(*labels: int) -> dict[str, torch.Tensor]:
    """Points (2, 3, 4, 2) whose labels (2, 3, 4) run through the given ones, each prompt starting at another."""
    cycle = [[[labels[(p + n) % len(labels)] for n in range(POINTS)] for p in range(PROMPTS)] for _ in range(BATCH)]
    return {"input_points": draw(BATCH, PROMPTS, POINTS, 2, seed=2, low=0.0), "input_labels": torch.tensor(cycle)}


def boxes() -> dict[str, torch.Tensor]:
    """Boxes (2, 3, 4), top left corner before bottom right."""
    corners = draw(BATCH, PROMPTS, 2, 2, seed=3, low=0.0).sort(dim=2).values
    return {"input_boxes": corners.flatten(2)}


def masks(*prompts: int) -> dict[str, torch.Tensor]:
    """Mask prompts of four pixels a token: (2, 1, 24, 24), one an image, or (2, P, 1, 24, 24), one a prompt."""
    return {"input_masks": draw(BATCH, *prompts, 1, 4 * GRID, 4 * GRID, seed=4)}


def personalisation() -> dict[str, torch.Tensor]:
    """PerSAM's two inputs: a score for each image token, and an embedding that is added to every prompt token."""
    return {
        "attention_similarity": draw(BATCH * PROMPTS, 1, 1, GRID * GRID, seed=5),
        "target_embedding": draw(BATCH, 1, 1, CHANNELS, seed=6),
    }


# Every kind of prompt that stock accepts. Labels: 1 foreground, 0 background, -1 not a point, -10 padding.
PROMPT_KINDS = {
    "none": {},
    "points": points(1, 0, -1, -10),
    "foreground": points(1),
    "background": points(0),
    "no_point": points(-1),
    "padding": points(1, -10),
    "unlabelled": {"input_points": points(1)["input_points"]},
    "one_prompt": {name: value[:, :1] for name, value in points(1, 0).items()},
    "boxes": boxes(),
    "points_and_boxes": {**points(1, 0, -1, -10), **boxes()},
    "masks": masks(),
    "masks_and_points": {**masks(), **points(1, 0, -1, -10)},
    "masks_and_boxes": {**masks(), **boxes()},
    "attention_similarity": {
        **points(1, 0),
        "attention_similarity": personalisation()["attention_similarity"],
    },
    "target_embedding": {**points(1, 0), "target_embedding": personalisation()["target_embedding"]},
    "personalised": {**points(1, 0), **boxes(), **masks(), **personalisation()},
}


def targets(side: int = 4 * GRID) -> torch.Tensor:
    """Labels (2, 3, side, side): a half plane for each prompt."""
    x = torch.arange(side).expand(BATCH, PROMPTS, side, side)
    border = side * torch.arange(1, BATCH * PROMPTS + 1).view(BATCH, PROMPTS, 1, 1) // (BATCH * PROMPTS + 1)
    return (x < border).long()
