"""`sam-split env`: what a bug report needs to say about the machine."""

import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path

from .parser import add_command, version

ENV = """\
Print what a bug report needs: versions, devices, and the digests of the code that travels with a model. No path, no
token and no name of a machine or a person is printed.
"""
# What a model's numbers or a command's behaviour may depend on; those of the extras as well.
PACKAGES = "torch torchvision transformers peft huggingface_hub safetensors accelerate datasets numpy pillow".split()
PACKAGES += "onnx onnxruntime torchao bitsandbytes ray".split()


def add_parser(subparsers) -> None:
    add_command(
        subparsers,
        "env",
        run,
        help="versions, devices and digests, for a bug report",
        description=ENV,
        example="sam-split env",
        positionals={},
    )


def run(args) -> None:
    lines = {
        "sam-split": version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _installed(name) for name in PACKAGES},
        **_devices(),
        **_digests(),
    }
    width = max(map(len, lines))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in lines.items()))


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    """The CPU's instructions and cores, then each accelerator with its name, where torch knows one."""
    try:
        import torch
    except (ImportError, OSError) as error:  # a broken torch may be what the report is about
        return {"cpu": f"torch cannot be imported: {type(error).__name__}"}
    instructions = torch.backends.cpu.get_cpu_capability()
    found = {"cpu": f"{instructions}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"}
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        name_of = getattr(torch.get_device_module(kind), "get_device_name", lambda _: "available")
        found |= {f"{kind}:{number}": name_of(number) for number in range(torch.accelerator.device_count())}
    return found


def _digests() -> dict[str, str]:
    """Code file -> the first digits of its SHA-256. The files are read, not imported: that would need all to work."""
    folder = Path(__file__).parents[2] / "sam_split"
    return {
        path.name: f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
        for path in sorted(folder.glob("*_sam_split.py"))
    }
