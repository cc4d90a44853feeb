"""The models of all peers, holding the same weights, and what each is asked to do. Imports happen where a peer needs
them, so that a missing package costs its own rows and no others."""

import shutil
from pathlib import Path

import torch
from torch import nn

from .cases import MODELS
from .everything import generator, smooth


def _multiple_of_8(width: int) -> int:
    return width + -width % 8


# Channels of keys and of values in CUDA's kernels, where a peer does not leave them to `kernel_widths`.
PADDINGS = {
    "ours_narrow": lambda width, head_dim: (_multiple_of_8(width), _multiple_of_8(head_dim)),
    "ours_equal": lambda width, head_dim: (_multiple_of_8(width),) * 2,
    "ours_cudnn": lambda width, head_dim: (192, 128) if 128 < width <= 192 else (_multiple_of_8(width),) * 2,
}


def stock_config(case: dict):
    """Transformers' config of a case, with the layer norms of the mask decoder as in Meta's model."""
    from transformers import SamConfig

    size = case["size"]
    vision = {**MODELS[case["model"]], "image_size": size}
    prompt = {"image_size": size, "image_embedding_size": size // 16}
    decoder = {"layer_norm_eps": 1e-5}
    if case["model"] == "tiny":
        vision |= {"output_channels": 32, "num_pos_feats": 16, "window_size": 7}
        prompt |= {"hidden_size": 32}
        decoder |= {"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32}
    return SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)


def stock_weights(config) -> dict[str, torch.Tensor]:
    """Seeded weights under stock's keys, scaled so that activations stay near 1: stock draws them at 1e-10."""
    from transformers import SamModel

    with torch.device("meta"):
        shapes = {key: value.shape for key, value in SamModel(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key in sorted(shapes):
        std = shapes[key][1:].numel() ** -0.5 if len(shapes[key]) > 1 else 0.1
        if "embed" in key and "proj" not in key and "conv" not in key:
            std = 1.0
        weights[key] = torch.randn(shapes[key], generator=generator) * std
        if "norm" in key and key.endswith("weight"):
            weights[key] += 1
    shared = "prompt_encoder.shared_embedding.positional_embedding"  # stock's second name of one tensor
    if shared in weights:
        weights[shared] = weights["shared_image_embedding.positional_embedding"]
    return weights


def filled(build, weights: dict[str, torch.Tensor], strict: bool = True) -> nn.Module:
    """A model that holds the given tensors and no others: nothing is drawn twice."""
    with torch.device("meta"):
        model = build()
    model.load_state_dict(weights, assign=True, strict=strict)
    return model


class MetaSam(nn.Module):
    """Meta's three modules behind the same two calls."""

    def __init__(self, config):
        from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer

        super().__init__()
        vision, prompt, decoder = config.vision_config, config.prompt_encoder_config, config.mask_decoder_config
        grid = vision.image_size // vision.patch_size
        self.image_encoder = ImageEncoderViT(
            img_size=vision.image_size,
            embed_dim=vision.hidden_size,
            depth=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            out_chans=vision.output_channels,
            norm_layer=lambda size: nn.LayerNorm(size, eps=1e-6),
            use_rel_pos=True,
            window_size=vision.window_size,
            global_attn_indexes=tuple(vision.global_attn_indexes),
        )
        self.prompt_encoder = PromptEncoder(prompt.hidden_size, (grid, grid), (vision.image_size,) * 2, 16)
        transformer = TwoWayTransformer(2, decoder.hidden_size, decoder.num_attention_heads, decoder.mlp_dim)
        self.mask_decoder = MaskDecoder(
            transformer_dim=decoder.hidden_size,
            transformer=transformer,
            iou_head_depth=decoder.iou_head_depth,
            iou_head_hidden_dim=decoder.iou_head_hidden_dim,
        )

    def decode(self, image_embeddings, points):
        """Masks of one image; the prompt encoder computes in float32, as its coordinates cannot be anything else."""
        labels = torch.ones(points.shape[1:3], device=points.device)
        sparse, dense = self.prompt_encoder((points[0], labels), None, None)
        dtype = image_embeddings.dtype
        return self.mask_decoder(
            image_embeddings=image_embeddings,
            image_pe=self.prompt_encoder.get_dense_pe().to(dtype),
            sparse_prompt_embeddings=sparse.to(dtype),
            dense_prompt_embeddings=dense.to(dtype),
            multimask_output=False,
        )[0]


def build(peer: str, case: dict) -> nn.Module:
    """The model of one peer, on the CPU, in float32."""
    from conversion import split_state_dict, to_meta

    config = stock_config(case)
    weights = stock_weights(config)
    if case["task"] == "everything":
        weights = smooth(weights)
    if peer.startswith("stock"):
        from transformers import SamModel

        implementation = "eager" if "eager" in peer else "sdpa"
        return filled(lambda: SamModel._from_config(config, attn_implementation=implementation), weights)
    if peer.startswith("ours"):
        from sam_split import SamSplitConfig, SamSplitModel, attention_sam_split

        if peer in PADDINGS:  # in a process of its own
            attention_sam_split.kernel_widths = lambda width, head_dim, *_: PADDINGS[peer](width, head_dim)
        fields = config.to_dict()
        del fields["model_type"]
        return filled(lambda: SamSplitModel(SamSplitConfig(**fields)), split_state_dict(weights))
    weights = to_meta(split_state_dict(weights))
    if peer == "meta":
        return filled(lambda: MetaSam(config), weights)
    if peer == "timm":
        import timm
        from timm.models import vision_transformer_sam

        name = {"vit_l": "samvit_large_patch16", "vit_h": "samvit_huge_patch16"}.get(
            case["model"], "samvit_base_patch16"
        )
        options = {"img_size": case["size"], "num_classes": 0}
        if case["model"] == "tiny":
            tiny = config.vision_config
            options |= {"embed_dim": 32, "depth": 2, "num_heads": 2, "global_attn_indexes": (1,), "neck_chans": 32}
            options |= {"window_size": tiny.window_size}
        options["norm_layer"] = lambda size, **kwargs: nn.LayerNorm(size, eps=1e-6)
        weights = vision_transformer_sam.checkpoint_filter_fn(weights, None)
        return filled(lambda: timm.create_model(name, **options), weights)
    raise ValueError(f"{peer!r} is no peer")


class Tasks:
    """One peer's share of one case: `__init__` prepares, `call` does what is measured.

    Args:
        case: a `Case` as a dict.
        peer: a key of `TITLES`.
        device: "cpu" or "cuda".
        folder: scratch space that the peers of a case share.
    """

    def __init__(self, case: dict, peer: str, device: str, folder: Path):
        self.case, self.peer, self.device, self.folder = case, peer, device, folder
        self.dtype = getattr(torch, case["dtype"])
        self.call = getattr(self, case["task"])
        self.model = None
        prepare = getattr(self, f"_prepare_{case['task']}", None)
        if prepare:
            prepare()

    def _build(self):
        self.model = build(self.peer, self.case)
        prompt_encoder = getattr(self.model, "prompt_encoder", None)
        self.model.to(self.device, self.dtype).eval().requires_grad_(False)
        if self.peer == "meta":
            prompt_encoder.float()
        self.make_inputs(self.device)

    def make_inputs(self, device: str):
        """Seeded inputs on a device, the same for every peer."""
        generator = torch.Generator().manual_seed(1)
        batch, size, prompts = self.case["batch"], self.case["size"], self.case["prompts"]
        channels = 32 if self.case["model"] == "tiny" else 256
        self.pixels = torch.randn(batch, 3, size, size, generator=generator).to(device, self.dtype)
        self.embeddings = torch.randn(batch, channels, size // 16, size // 16, generator=generator)
        self.embeddings = self.embeddings.to(device, self.dtype)
        self.points = (torch.rand(batch, prompts, 1, 2, generator=generator) * size).to(device)
        self.boxes = (torch.tensor([0.1, 0.2, 0.6, 0.7]) * size).expand(batch, 1, 4).to(device)

    def _prepare_encoder(self):
        self._build()
        if self.peer.endswith("compiled"):
            self.model.vision_encoder.compile()

    @torch.no_grad()
    def encoder(self):
        """Pixels to the image embedding."""
        if self.peer == "timm":
            return self.model.forward_features(self.pixels)
        if self.peer == "meta":
            return self.model.image_encoder(self.pixels)
        return self.model.vision_encoder(self.pixels).last_hidden_state

    _prepare_decoder = _build

    @torch.no_grad()
    def decoder(self):
        """An image embedding and one point per prompt to one mask per prompt."""
        if self.peer == "meta":
            return self.model.decode(self.embeddings, self.points)[None, :, 0]
        return self.model(
            image_embeddings=self.embeddings, input_points=self.points, multimask_output=False
        ).pred_masks[:, :, 0]

    def _prepare_everything(self):
        self._build()
        self._generate = generator(self.peer, self.model, self.case)

    def everything(self):
        """An image to all its masks, as run lengths."""
        return self._generate()

    def _prepare_lora_step(self):
        from peft import LoraConfig, get_peft_model

        self._build()
        targets = ["q", "v"] if self.peer.startswith("ours") else ["qkv"]
        if "checkpointed" in self.peer:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if "compiled" in self.peer:
            self.model.vision_encoder.compile()
        self.model = get_peft_model(self.model, LoraConfig(r=16, lora_alpha=32, target_modules=targets)).train()

    def lora_step(self):
        """Forward and backward of LoRA on q and v (stock: on the fused qkv), the rest frozen, one box an image."""
        for parameter in self.model.parameters():
            parameter.grad = None
        masks = self.model(pixel_values=self.pixels, input_boxes=self.boxes, multimask_output=False).pred_masks
        masks.float().square().mean().backward()
        return masks.detach()[:, :, 0]

    def _prepare_load(self):
        path = self.folder / self.peer
        if not path.exists():
            build(self.peer, self.case).save_pretrained(path)
        from transformers import SamModel

        from sam_split import SamSplitModel

        self._class = SamSplitModel if self.peer == "ours" else SamModel

    def load(self):
        """`from_pretrained` of a folder on disk."""
        self.model = None
        self.model = self._class.from_pretrained(self.folder / self.peer)
        return self.model.shared_image_embedding.positional_embedding.detach()

    def _prepare_convert(self):
        if self.peer == "from_meta":
            from conversion import split_state_dict, to_meta

            self._source = self.folder / "meta.pth"
            torch.save(to_meta(split_state_dict(stock_weights(stock_config(self.case)))), self._source)
        else:
            self._source = self.folder / "stock"
            build("stock_sdpa", self.case).save_pretrained(self._source)

    def convert(self):
        """One `sam-split convert`, which writes a folder and reads it back."""
        from conversion import convert

        out = self.folder / f"{self.peer}-out"
        shutil.rmtree(out, ignore_errors=True)
        convert(str(self._source), str(out), progress=False)
        return torch.empty(0)
