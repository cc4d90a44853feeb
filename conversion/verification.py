"""Whether two checkpoints, in any two formats, hold the same model: bit for bit, then by what they compute."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from .checkpoints import describe
from .config_from_shapes import DECODER_EPSILON, differences, epsilon_note
from .errors import CheckFailed
from .folder import config_fields
from .key_map import DROPPED, STOCK_MAP, plan
from .sources import Checkpoint, open_checkpoint
from .tensors import Renamed, Tensors, same_bits

# Of the largest output. The float32 noise floor is about 4e-7; another epsilon in the decoder shifts outputs by 1e-5.
LIMIT, LIMIT_OTHER_EPSILON = 1e-5, 1e-4


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    compared: str
    result: str
    passed: bool


def verify(a, b, *, outputs: bool = True) -> list[Row]:
    """Compare two checkpoints, each a split folder, a transformers folder, a .pth or a Hub id.

    Args:
        a, b: the checkpoints.
        outputs: whether to run both on a fixed image as well, in float32.

    Returns:
        The report. Outputs are computed with stock SamModel for a transformers folder, else with SamSplitModel.

    Raises:
        CheckFailed: at the first difference, with the rows so far as `rows`.
        ConversionError: if one of them is no SAM checkpoint.
    """
    rows: list[Row] = []
    checkpoints = open_checkpoint(a), open_checkpoint(b)
    (config_a, ours), (config_b, theirs) = (describe(checkpoint) for checkpoint in checkpoints)
    fields = differences(config_a, config_b)
    epsilons = fields.pop(DECODER_EPSILON, None)
    for field, (left, right) in fields.items():
        _record(rows, Row(f"config: {field}", f"{left} and {right}", False))
    note = epsilon_note(min(epsilons), max(epsilons)) if epsilons else "equal"
    _record(rows, Row("configs", note, True))
    _compare_tensors(rows, ours, theirs)
    if outputs:
        limit = LIMIT_OTHER_EPSILON if epsilons else LIMIT
        left, right = (_run(c, config) for c, config in zip(checkpoints, (config_a, config_b), strict=True))
        _compare_outputs(rows, left, right, limit)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The report, aligned."""
    width = max(len(row.compared) for row in rows)
    return "\n".join(f"{'ok  ' if row.passed else 'FAIL'}  {row.compared:<{width}}  {row.result}" for row in rows)


def as_json(rows: Sequence[Row], *, same: bool) -> str:
    """The report for a program to read."""
    return json.dumps({"same": same, "rows": [asdict(row) for row in rows]}, indent=2)


def _record(rows: list[Row], row: Row) -> None:
    rows.append(row)
    if not row.passed:
        raise CheckFailed(f"not the same model: {row.compared}: {row.result}", rows)


def _compare_tensors(rows, ours: Tensors, theirs: Tensors) -> None:
    for name in sorted(ours.specs.keys() | theirs.specs.keys()):
        specs = ours.specs.get(name), theirs.specs.get(name)
        if specs[0] != specs[1]:
            shown = [f"{spec.dtype} {spec.shape}" if spec else "absent" for spec in specs]
            _record(rows, Row(name, f"{shown[0]} and {shown[1]}", False))
        left, right = ours[name], theirs[name]
        if not same_bits(left, right):
            differing = left != right
            gap = (left.double() - right.double()).abs().max().item()
            _record(
                rows, Row(name, f"{int(differing.sum())} of {left.numel()} values differ, by {gap:.3g} at most", False)
            )
    _record(rows, Row(f"{len(ours)} tensors", f"{ours.nbytes:,} bytes, every bit equal", True))


def _compare_outputs(rows, ours: dict, theirs: dict, limit: float) -> None:
    for name, left in ours.items():
        right = theirs[name]
        gap, size = (left - right).abs().max().item(), right.abs().max().item()
        result = f"differ by {gap:.2e} at most, of {size:.2e}; the limit is {limit:g} of that"
        _record(rows, Row(name, result, gap <= limit * size))  # NaN fails


@torch.no_grad()
def _run(checkpoint: Checkpoint, config) -> dict[str, torch.Tensor]:
    """Image embedding, masks and scores for a fixed image and a point in its middle, in float32."""
    build = stock_model if checkpoint.format == "transformers" else split_model
    model = build(config, checkpoint.split_tensors()).float()
    pixels = fixed_image(config)
    height, width = pixels.shape[2:]
    point = torch.tensor([[[[width / 2, height / 2]]]])
    embeddings = model.get_image_embeddings(pixels)
    outputs = model(image_embeddings=embeddings, input_points=point)
    return {"image embedding": embeddings, "masks": outputs.pred_masks, "scores": outputs.iou_scores}


def fixed_image(config) -> torch.Tensor:
    """The same smooth noise (1, channels, height, width) in every run, for outputs that are compared."""
    vision = config.vision_config
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, vision.num_channels, *vision.grid, generator=generator)
    return torch.nn.functional.interpolate(coarse, scale_factor=vision.patch_size, mode="bicubic")


def split_model(config, tensors: Tensors) -> torch.nn.Module:
    """SamSplitModel in float32 or wider, from a SamSplitConfig and tensors under SamSplit's names."""
    from sam_split import SamSplitModel

    return _filled(SamSplitModel(config), tensors)


def stock_model(config, tensors: Tensors) -> torch.nn.Module:
    """The same as stock SamModel."""
    from transformers import SamConfig, SamModel

    fields = config_fields(config, "transformers")
    parts = {part: fields[part] for part in config.sub_configs}
    return _filled(SamModel(SamConfig(**parts)), Renamed(tensors, plan(tensors, STOCK_MAP, inverse=True)), DROPPED)


def _filled(model: torch.nn.Module, tensors: Tensors, twins: dict[str, str] | None = None) -> torch.nn.Module:
    state = {name: tensors[name].to(torch.promote_types(tensors.specs[name].dtype, torch.float32)) for name in tensors}
    state |= {twin: state[name] for twin, name in (twins or {}).items()}
    model.load_state_dict(state, assign=True)
    return model.eval()
