"""Configuration of SamSplit: Segment Anything with separate `q`, `k` and `v` layers in its image encoder.

The fields, their names and their defaults (ViT-B) are those of transformers' SAM configuration, so a stock
`config.json` becomes a SamSplit one by changing `model_type` and adding the `auto_map`. Every value is checked when a
config is built.

This file is copied into each saved model folder. It imports transformers and `typing`, and reads no file, network or
environment.
"""

from typing import Any

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

AUTO_MAP = {
    "AutoConfig": "configuration_sam_split.SamSplitConfig",
    "AutoModel": "modeling_sam_split.SamSplitModel",
    "AutoModelForMaskGeneration": "modeling_sam_split.SamSplitModel",
}


# The class that `pipeline("mask-generation", model=folder, trust_remote_code=True)` makes.
CUSTOM_PIPELINES = {
    "mask-generation": {
        "impl": "mask_generation_sam_split.SamSplitMaskGenerationPipeline",
        "pt": ["AutoModelForMaskGeneration"],
        "type": "multimodal",
    }
}


def _check_positive_integers(config, *names):
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _check_activation(config):
    if config.hidden_act not in ACT2FN:
        raise ValueError(
            f"hidden_act must be one of transformers' activations ('gelu', 'relu', …), got {config.hidden_act!r}"
        )


def _check_divides(config, divisor, dividend, reason):
    given, expected = getattr(config, dividend), getattr(config, divisor)
    if given % expected:
        raise ValueError(f"{dividend}={given} must be a multiple of {divisor}={expected}: {reason}")


def _normal_image_size(image_size, patch_size):
    """An int for a square input and [height, width] otherwise, in pixels, checked against the patch."""
    sides = list(image_size) if isinstance(image_size, (list, tuple)) else [image_size, image_size]
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError(f"image_size must be an int or (height, width) in pixels, got {image_size!r}")
    if any(side % patch_size for side in sides):
        raise ValueError(f"image_size={image_size!r} must be a multiple of patch_size={patch_size}")
    return sides[0] if sides[0] == sides[1] else sides


def _grid(image_size, patch_size):
    """(rows, columns) of the token grid."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height // patch_size, width // patch_size


# How tensor parallelism cuts the layers of the image encoder: by heads, and by the width of the MLP.
TENSOR_PARALLEL_PLAN = {
    "vision_encoder.layers.*.attn.q": "colwise",
    "vision_encoder.layers.*.attn.k": "colwise",
    "vision_encoder.layers.*.attn.v": "colwise",
    "vision_encoder.layers.*.attn.proj": "rowwise",
    "vision_encoder.layers.*.mlp.lin1": "colwise",
    "vision_encoder.layers.*.mlp.lin2": "rowwise",
}


class SamSplitVisionConfig(PretrainedConfig):
    """The image encoder: a ViT with windowed attention in all layers but a few.

    Args:
        hidden_size: channels of a token.
        output_channels: channels of the image embedding, shared with prompt encoder and mask decoder.
        num_hidden_layers: attention blocks.
        num_attention_heads: must divide `hidden_size`.
        num_channels: channels of `pixel_values`.
        image_size: input in pixels, an int or (height, width), a multiple of `patch_size`.
        patch_size: side of a patch in pixels.
        hidden_act: activation of the MLPs, by transformers' name.
        layer_norm_eps: epsilon of the blocks' layer norms.
        attention_dropout: dropout of attention weights in training, with `attn_implementation="eager"` only.
        initializer_range: standard deviation of new weights in a `SamSplitVisionModel` that is not loaded.
        qkv_bias: whether `q`, `k` and `v` have biases.
        mlp_ratio: `mlp_dim` in units of `hidden_size`, used when `mlp_dim` is None.
        use_abs_pos: whether tokens get an absolute position.
        use_rel_pos: whether attention scores get decomposed relative positions.
        window_size: side of an attention window in tokens; 0 makes every layer global.
        global_attn_indexes: layers that attend to the whole image; indexes past the last layer are ignored.
        num_pos_feats: frequencies of the prompts' positional embedding, half of `output_channels`.
        mlp_dim: width of the MLPs.

    Raises:
        ValueError: if a value is out of range or two of them contradict each other.
    """

    model_type = "sam_split_vision_model"
    base_model_tp_plan = TENSOR_PARALLEL_PLAN
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 768,
        output_channels: int = 256,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_channels: int = 3,
        image_size: int | tuple[int, int] = 1024,
        patch_size: int = 16,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        use_abs_pos: bool = True,
        use_rel_pos: bool = True,
        window_size: int = 14,
        global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11),
        num_pos_feats: int = 128,
        mlp_dim: int | None = None,
        **kwargs: Any,
    ):
        kwargs.pop("model_type", None)  # a stock config.json says "sam_vision_model"
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.output_channels = output_channels
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.qkv_bias = qkv_bias
        self.mlp_ratio = mlp_ratio
        self.use_abs_pos = use_abs_pos
        self.use_rel_pos = use_rel_pos
        self.window_size = window_size
        self.global_attn_indexes = list(global_attn_indexes)
        self.num_pos_feats = num_pos_feats

        _check_positive_integers(self, "hidden_size", "output_channels", "num_hidden_layers", "num_attention_heads")
        _check_positive_integers(self, "num_channels", "patch_size", "num_pos_feats")
        self.image_size = _normal_image_size(image_size, patch_size)
        self.mlp_dim = int(hidden_size * mlp_ratio) if mlp_dim is None else mlp_dim
        _check_positive_integers(self, "mlp_dim")
        _check_activation(self)
        _check_divides(self, "num_attention_heads", "hidden_size", "each head gets an equal share of the channels")
        if not isinstance(window_size, int) or window_size < 0:
            raise ValueError(f"window_size must be a number of tokens, or 0 for global attention, got {window_size!r}")
        if any(not isinstance(index, int) or index < 0 for index in self.global_attn_indexes):
            raise ValueError(f"global_attn_indexes must be layer numbers from 0, got {global_attn_indexes!r}")
        if not 0.0 <= attention_dropout < 1.0:
            raise ValueError(f"attention_dropout must be in [0, 1), got {attention_dropout!r}")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the token grid."""
        return _grid(self.image_size, self.patch_size)


class SamSplitPromptEncoderConfig(PretrainedConfig):
    """The prompt encoder: points and boxes to sparse embeddings, masks to dense ones.

    Args:
        hidden_size: channels of an embedding.
        image_size: the input's size in pixels, an int or (height, width), as in the vision config.
        patch_size: side of a patch in pixels, as in the vision config.
        mask_input_channels: channels inside the mask's convolutions, a multiple of 4.
        num_point_embeddings: 4, for background point, foreground point and the two corners of a box.
        hidden_act: activation of the mask's convolutions.
        layer_norm_eps: epsilon of the mask's layer norms.

    Raises:
        ValueError: if a value is out of range.
    """

    model_type = "sam_split_prompt_encoder"
    base_config_key = "prompt_encoder_config"

    def __init__(
        self,
        hidden_size: int = 256,
        image_size: int | tuple[int, int] = 1024,
        patch_size: int = 16,
        mask_input_channels: int = 16,
        num_point_embeddings: int = 4,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-6,
        **kwargs: Any,
    ):
        kwargs.pop("model_type", None)
        kwargs.pop("image_embedding_size", None)  # stock stores it; it follows from image_size and patch_size
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.patch_size = patch_size
        self.mask_input_channels = mask_input_channels
        self.num_point_embeddings = num_point_embeddings
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps

        _check_positive_integers(self, "hidden_size", "patch_size", "mask_input_channels")
        _check_activation(self)
        self.image_size = _normal_image_size(image_size, patch_size)
        rows, columns = _grid(self.image_size, patch_size)
        self.image_embedding_size = rows if rows == columns else [rows, columns]
        if mask_input_channels % 4:
            raise ValueError(f"mask_input_channels must be a multiple of 4, got {mask_input_channels}")
        if num_point_embeddings != 4:
            raise ValueError(
                f"num_point_embeddings must be 4 (two labels, two box corners), got {num_point_embeddings!r}"
            )


class SamSplitMaskDecoderConfig(PretrainedConfig):
    """The mask decoder: a two-way transformer between prompt tokens and image tokens.

    Args:
        hidden_size: channels of a token, a multiple of 8.
        hidden_act: activation of the MLPs.
        mlp_dim: width of the MLPs.
        num_hidden_layers: two-way attention blocks.
        num_attention_heads: heads of every attention.
        attention_downsample_rate: how much narrower than `hidden_size` the cross-attentions are inside.
        num_multimask_outputs: masks for an ambiguous prompt, beside the one for an unambiguous prompt.
        iou_head_depth: layers of the head that predicts each mask's IoU, at least 2.
        iou_head_hidden_dim: width of that head.
        layer_norm_eps: epsilon of the blocks' layer norms.

    Raises:
        ValueError: if a value is out of range or two of them contradict each other.
    """

    model_type = "sam_split_mask_decoder"
    base_config_key = "mask_decoder_config"

    def __init__(
        self,
        hidden_size: int = 256,
        hidden_act: str = "relu",
        mlp_dim: int = 2048,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 8,
        attention_downsample_rate: int = 2,
        num_multimask_outputs: int = 3,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
        layer_norm_eps: float = 1e-6,
        **kwargs: Any,
    ):
        kwargs.pop("model_type", None)
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.hidden_act = hidden_act
        self.mlp_dim = mlp_dim
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.attention_downsample_rate = attention_downsample_rate
        self.num_multimask_outputs = num_multimask_outputs
        self.iou_head_depth = iou_head_depth
        self.iou_head_hidden_dim = iou_head_hidden_dim
        self.layer_norm_eps = layer_norm_eps

        _check_positive_integers(self, "hidden_size", "mlp_dim", "num_hidden_layers", "num_attention_heads")
        _check_positive_integers(self, "attention_downsample_rate", "num_multimask_outputs", "iou_head_hidden_dim")
        _check_activation(self)
        if hidden_size % 8:
            raise ValueError(f"hidden_size of the mask decoder must be a multiple of 8, got {hidden_size}")
        if hidden_size % (attention_downsample_rate * num_attention_heads):
            raise ValueError(
                f"hidden_size={hidden_size} of the mask decoder must be a multiple of attention_downsample_rate * "
                f"num_attention_heads = {attention_downsample_rate * num_attention_heads}"
            )
        if not isinstance(iou_head_depth, int) or iou_head_depth < 2:
            raise ValueError(f"iou_head_depth must be at least 2, got {iou_head_depth!r}")


class SamSplitConfig(PretrainedConfig):
    """The whole model: image encoder, prompt encoder and mask decoder.

    Args:
        vision_config: a `SamSplitVisionConfig`, a dict of its fields, or None for ViT-B.
        prompt_encoder_config: a `SamSplitPromptEncoderConfig`, a dict of its fields, or None. Left out, its sizes
            follow the vision config.
        mask_decoder_config: a `SamSplitMaskDecoderConfig`, a dict of its fields, or None.
        initializer_range: standard deviation of new weights.

    Raises:
        ValueError: if a value is out of range or the three parts do not fit together.

    >>> config = SamSplitConfig(vision_config={"image_size": 512, "num_hidden_layers": 6})
    >>> config.vision_config.grid, config.prompt_encoder_config.image_size
    ((32, 32), 512)
    """

    model_type = "sam_split"
    base_model_tp_plan = TENSOR_PARALLEL_PLAN
    sub_configs = {  # noqa: RUF012  (transformers reads it from the class)
        "vision_config": SamSplitVisionConfig,
        "prompt_encoder_config": SamSplitPromptEncoderConfig,
        "mask_decoder_config": SamSplitMaskDecoderConfig,
    }

    def __init__(
        self,
        vision_config: SamSplitVisionConfig | dict[str, Any] | None = None,
        prompt_encoder_config: SamSplitPromptEncoderConfig | dict[str, Any] | None = None,
        mask_decoder_config: SamSplitMaskDecoderConfig | dict[str, Any] | None = None,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        kwargs.pop("model_type", None)
        if "auto_map" not in kwargs:  # a folder that has a map, and no pipeline, has no file for one either
            kwargs.setdefault("custom_pipelines", CUSTOM_PIPELINES)
        # A map that lives in the config itself reaches every saved copy, whichever way the model was built.
        kwargs["auto_map"] = {**AUTO_MAP, **(kwargs.get("auto_map") or {})}
        vision = _sub_config(SamSplitVisionConfig, vision_config)
        if prompt_encoder_config is None:
            prompt_encoder_config = {
                "hidden_size": vision.output_channels,
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
            }
        if mask_decoder_config is None:
            mask_decoder_config = {"hidden_size": vision.output_channels}
        self.vision_config = vision
        self.prompt_encoder_config = _sub_config(SamSplitPromptEncoderConfig, prompt_encoder_config)
        self.mask_decoder_config = _sub_config(SamSplitMaskDecoderConfig, mask_decoder_config)
        self.initializer_range = initializer_range
        self._check_parts_fit()
        super().__init__(**kwargs)

    def _check_parts_fit(self):
        vision, prompt, decoder = self.vision_config, self.prompt_encoder_config, self.mask_decoder_config
        if not vision.output_channels == prompt.hidden_size == decoder.hidden_size == 2 * vision.num_pos_feats:
            raise ValueError(
                "the image embedding's channels must agree: vision_config.output_channels="
                f"{vision.output_channels}, 2 * vision_config.num_pos_feats={2 * vision.num_pos_feats}, "
                f"prompt_encoder_config.hidden_size={prompt.hidden_size}, "
                f"mask_decoder_config.hidden_size={decoder.hidden_size}"
            )
        if (vision.image_size, vision.patch_size) != (prompt.image_size, prompt.patch_size):
            raise ValueError(
                "the input's geometry must agree: vision_config has "
                f"image_size={vision.image_size}, patch_size={vision.patch_size}; prompt_encoder_config has "
                f"image_size={prompt.image_size}, patch_size={prompt.patch_size}"
            )


def _sub_config(config_class, value):
    """`value` as a `config_class`, be it one already, a dict of fields, None or stock transformers' counterpart.

    Classes are told apart by `model_type`: transformers may import this file twice, and then one class has two faces.
    """
    if value is None:
        return config_class()
    if isinstance(value, dict):
        return config_class(**value)
    return value if value.model_type == config_class.model_type else config_class(**value.to_diff_dict())


SamSplitConfig.register_for_auto_class()
SamSplitVisionConfig.register_for_auto_class()
