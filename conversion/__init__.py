"""Checkpoints in, checkpoints out: SamSplit <-> stock transformers <-> Meta's .pth."""

import importlib

# Name -> the module that has it. Imported on first use, so that `sam-split --help` need not wait for torch.
_PUBLIC = {
    "ConversionError": "errors",
    "UnknownKeyError": "errors",
    "MissingKeyError": "errors",
    "ShapeError": "errors",
    "CheckFailed": "errors",
    "KEY_MAP": "key_map",
    "split_state_dict": "key_map",
    "fuse_state_dict": "key_map",
    "from_meta": "key_map",
    "to_meta": "key_map",
    "config_from_state_dict": "config_from_shapes",
    "convert": "checkpoints",
    "fuse": "checkpoints",
    "verify": "verification",
    "fuse_adapter": "adapters.transport",
    "split_adapter": "adapters.transport",
    "import_adapter": "adapters.transport",
    "merge": "adapters.merge",
}

__all__ = list(_PUBLIC)


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'conversion' has no attribute {name!r}; it has {', '.join(sorted(_PUBLIC))}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
