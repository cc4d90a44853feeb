"""Checkpoints as running models: SamSplitModel, or transformers' own SamModel."""

import torch

from .folder import config_fields
from .key_map import DROPPED, STOCK_MAP, plan
from .tensors import Renamed, Tensors


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
