"""A model's sizes, read off the shapes of its tensors, and the check that config and tensors agree."""

import inspect
import re
import warnings
from collections.abc import Mapping

from .errors import ConversionError, ConversionWarning, MissingKeyError, ShapeError, UnknownKeyError
from .key_map import format_of, split_plan

# Meta's code fixes what leaves no trace in the tensors.
DECODER_HEADS = 8
META_LAYER_NORM_EPS = {"vision_config": 1e-6, "prompt_encoder_config": 1e-6, "mask_decoder_config": 1e-5}

DECODER_EPSILON = "mask_decoder_config.layer_norm_eps"
# Training's, or spelt out by mlp_dim and by the windows of the layers.
IDLE_FIELDS = ("initializer_range", "attention_dropout", "mlp_ratio", "window_size", "global_attn_indexes")


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """The fields of SamSplitConfig that give a model of these shapes, as Meta's code builds it.

    Args:
        shapes: SamSplit key -> shape.

    Raises:
        ShapeError: if the shapes contradict each other.
        ConversionError: if there are no relative-position tables, from which heads and window size are read.
    """
    layers = _count(shapes, "vision_encoder.layers.")
    hidden_size, num_channels, patch_size, _ = _sizes(shapes, "vision_encoder.patch_embed.projection.weight", 4)
    use_abs_pos = "vision_encoder.pos_embed" in shapes
    if "vision_encoder.layers.0.attn.rel_pos_h" not in shapes:
        raise ConversionError(
            "without the rel_pos tables neither the number of heads nor window_size can be read off the shapes; "
            "convert a transformers folder, whose config.json says them"
        )
    tables = [_table_size(shapes, layer) for layer in range(layers)]
    grid = _sizes(shapes, "vision_encoder.pos_embed", 4)[1:3] if use_abs_pos else max(tables)
    windows = {table for table in tables if table != grid}
    if len(windows) > 1 or any(height != width for height, width in windows):
        raise ShapeError(
            f"rel_pos tables are made for {sorted({*windows, grid})} tokens, expected the grid {grid} and one window"
        )
    head_dim = _sizes(shapes, "vision_encoder.layers.0.attn.rel_pos_h", 2)[1]
    if hidden_size % head_dim:
        raise ShapeError(
            f"{hidden_size} channels cannot be heads of {head_dim}, as wide as rel_pos; expected SAM's encoder"
        )
    height, width = (side * patch_size for side in grid)
    image_size = height if height == width else [height, width]
    decoder_size = _sizes(shapes, "mask_decoder.iou_token.weight", 2)[1]
    inner_size = _sizes(shapes, "mask_decoder.transformer.layers.0.cross_attn_token_to_image.q_proj.weight", 2)[0]
    config = {
        "vision_config": {
            "hidden_size": hidden_size,
            "output_channels": _sizes(shapes, "vision_encoder.neck.conv1.weight", 4)[0],
            "num_hidden_layers": layers,
            "num_attention_heads": hidden_size // head_dim,
            "num_channels": num_channels,
            "image_size": image_size,
            "patch_size": patch_size,
            "qkv_bias": "vision_encoder.layers.0.attn.q.bias" in shapes,
            "use_abs_pos": use_abs_pos,
            "use_rel_pos": True,
            "window_size": next(iter(windows))[0] if windows else 0,
            "global_attn_indexes": [layer for layer, table in enumerate(tables) if table == grid],
            "num_pos_feats": _sizes(shapes, "shared_image_embedding.positional_embedding", 2)[1],
            "mlp_dim": _sizes(shapes, "vision_encoder.layers.0.mlp.lin1.weight", 2)[0],
        },
        "prompt_encoder_config": {
            "hidden_size": decoder_size,
            "image_size": image_size,
            "patch_size": patch_size,
            "mask_input_channels": _sizes(shapes, "prompt_encoder.mask_embed.conv2.weight", 4)[0],
            "num_point_embeddings": _count(shapes, "prompt_encoder.point_embed."),
        },
        "mask_decoder_config": {
            "hidden_size": decoder_size,
            "mlp_dim": _sizes(shapes, "mask_decoder.transformer.layers.0.mlp.lin1.weight", 2)[0],
            "num_hidden_layers": _count(shapes, "mask_decoder.transformer.layers."),
            "num_attention_heads": DECODER_HEADS,
            "attention_downsample_rate": max(1, decoder_size // inner_size),
            "num_multimask_outputs": _sizes(shapes, "mask_decoder.mask_tokens.weight", 2)[0] - 1,
            "iou_head_depth": 3,
            "iou_head_hidden_dim": _sizes(shapes, "mask_decoder.iou_prediction_head.proj_in.weight", 2)[0],
        },
    }
    for part, epsilon in META_LAYER_NORM_EPS.items():
        config[part]["layer_norm_eps"] = epsilon
    return config


def config_from_state_dict(state_dict: Mapping) -> dict:
    """The same for a whole state dict with Meta's, stock's or SamSplit's keys."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    origins = split_plan(shapes, format_of(shapes, "the state dict"))
    return config_from_shapes({name: origin.shape(shapes) for name, origin in origins.items()})


def check_shapes(config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless the tensors are exactly those of the model that `config` describes.

    Args:
        config: a SamSplitConfig.
        shapes: SamSplit key -> shape.
    """
    for part, field, prefix in (
        ("vision_config", "num_hidden_layers", "vision_encoder.layers."),
        ("mask_decoder_config", "num_hidden_layers", "mask_decoder.transformer.layers."),
    ):
        # Before the model is built: a mistyped number of layers would take for ever.
        given, found = getattr(getattr(config, part), field), _count(shapes, prefix)
        if given != found:
            raise ShapeError(
                f"{part}.{field} is {given}, but the checkpoint has {found} layers {prefix}*; take its own config"
            )
    expected = model_shapes(config)
    for name in shapes:
        if name not in expected:
            raise UnknownKeyError(
                f"{name!r} has no place in the model that the config describes; take the config.json of these weights"
            )
    for name, shape in expected.items():
        if name not in shapes:
            raise MissingKeyError(
                f"{name!r} is not in the checkpoint, and the config asks for it; is the checkpoint whole?"
            )
        if tuple(shapes[name]) != shape:
            raise ShapeError(f"{name!r} has the shape {tuple(shapes[name])}, expected {shape} from the config")


def check_stock_can_hold(config) -> None:
    """Raise unless stock transformers has a model like this one."""
    if not isinstance(config.vision_config.image_size, int):
        raise ConversionError(
            f"stock SamModel takes square images only, this model takes {config.vision_config.image_size}; "
            "convert the source again without --image-size"
        )


def check_meta_can_hold(config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless Meta's code builds this very model: a .pth has no config, so all must follow from the shapes."""
    from sam_split import SamSplitConfig

    for field, (given, taken) in differences(config, SamSplitConfig(**config_from_shapes(shapes))).items():
        if field != DECODER_EPSILON:
            raise ConversionError(f"a .pth cannot say that {field} is {given}; Meta's code would take {taken}")
        warnings.warn(f"{epsilon_note(given, taken)}; the weights are the same bits", ConversionWarning, stacklevel=2)


def epsilon_note(ours: float, theirs: float) -> str:
    """What transformers' default in the mask decoder, where Meta's code has another, does to outputs."""
    return f"{DECODER_EPSILON} is {ours:g}, and {theirs:g} in Meta's code: outputs differ by some 1e-5 of their size"


def differences(ours, theirs) -> dict[str, tuple]:
    """Field -> both values, for all fields of two configs that change what the model computes and are not equal."""
    ours, theirs = _effective(ours), _effective(theirs)
    return {field: (ours[field], theirs[field]) for field in ours if ours[field] != theirs[field]}


def _effective(config) -> dict:
    """The fields that inference depends on; window_size and global_attn_indexes become one window for each layer."""
    parts = {part: getattr(config, part) for part in config.sub_configs}
    fields = {
        f"{name}.{field}": value
        for name, part in parts.items()
        for field, value in part.to_dict().items()
        if field in inspect.signature(type(part).__init__).parameters and field not in IDLE_FIELDS
    }
    vision = config.vision_config
    side = (
        0 if vision.grid == (vision.window_size, vision.window_size) else vision.window_size
    )  # one window is no window
    layers = range(vision.num_hidden_layers)
    fields["windows of the layers"] = [0 if layer in vision.global_attn_indexes else side for layer in layers]
    return fields


def model_shapes(config) -> dict[str, tuple[int, ...]]:
    import torch

    from sam_split import SamSplitModel

    try:
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in SamSplitModel(config).state_dict().items()}
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ConversionError(
            f"no model can be built from the config: {str(error).splitlines()[0]}; correct config.json"
        ) from error


def _count(shapes, prefix: str) -> int:
    """How many consecutive numbers follow the prefix."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for name in shapes if (match := pattern.match(name))})


def _sizes(shapes, name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(shapes[name])
    if len(shape) != dimensions or 0 in shape:
        raise ShapeError(f"{name!r} has the shape {shape}, expected {dimensions} dimensions")
    return shape


def _table_size(shapes, layer: int) -> tuple[int, int]:
    """(height, width) in tokens of the area that a layer's relative-position tables are made for."""
    sides = []
    for axis in "hw":
        name = f"vision_encoder.layers.{layer}.attn.rel_pos_{axis}"
        rows = _sizes(shapes, name, 2)[0]
        if rows % 2 == 0:
            raise ShapeError(f"{name!r} has {rows} rows, expected an odd number: 2 * tokens - 1")
        sides.append((rows + 1) // 2)
    return sides[0], sides[1]
