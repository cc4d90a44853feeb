"""The two sections of a card that must stay true: what the weights are, and which code runs.

Each stands between two HTML comments. At a push the section on code is always written again. The section on weights
names the digest of the weights that it describes and is written again where the folder holds others; the comment also
marks our own lines, so that those of an author stay.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from .weight_files import is_adapter, tensor_shapes, weights_digest

# Stands for the repository id until the push knows it; a valid id, so the card of an unpublished folder reads well.
REPO_PLACEHOLDER = "your-name/your-sam-split"

# "unknown": the values changed, and nothing in the folder says how.
Change = Literal["split", "finetune", "merge", "unknown"]

_CODE = re.compile(r"<!-- sam-split: code -->.*?<!-- /sam-split: code -->", re.DOTALL)
_WEIGHTS = re.compile(
    r"<!-- sam-split: weights (?P<digest>\w+), our lines (?P<ours>[\w ]+) -->"
    r"(?P<text>.*?)<!-- /sam-split: weights -->",
    re.DOTALL,
)


@dataclass(frozen=True)
class Base:
    """The model on the Hub that an adapter belongs to, or that weights were made from."""

    repo_id: str
    revision: str | None = None


@dataclass(frozen=True)
class Evidence:
    """One comparison that was run on these weights.

    Args:
        compared: what with what, as a phrase: "masks of one click, with those of transformers' SamModel".
        max_difference: the largest absolute difference, in the unit of what was compared; None if every bit was
            compared and is equal.
        dtype: "float32", "bfloat16", ...
        device: "cpu", or the name of the accelerator.
        versions: package -> version it was measured with; this process's torch and transformers by default.
    """

    compared: str
    max_difference: float | None
    dtype: str
    device: str
    versions: dict[str, str] = field(
        default_factory=lambda: {name: version(name) for name in ("torch", "transformers")}
    )


# Weights


def weights_section(
    folder: str | Path,
    *,
    origin: str,
    change: Change,
    resized_from: int | tuple[int, int] | None = None,
    evidence: Sequence[Evidence] = (),
) -> str:
    """What was done to the weights, how large they are, and what was measured on them.

    `origin` is what they were made from, in Markdown; the other arguments are those of `model_card`.
    """
    folder = Path(folder)
    lines = _adapter_lines(folder) if is_adapter(folder) else _model_lines(folder, origin, change, resized_from)
    text = "\n".join(["## Weights", "", *lines, *_evidence_lines(evidence)])
    ours = " ".join(dict.fromkeys(_mark(line) for line in text.splitlines() if line.strip()))
    start = f"<!-- sam-split: weights {weights_digest(folder)}, our lines {ours} -->"
    return f"{start}\n{text}\n<!-- /sam-split: weights -->"


def refresh_weights_section(text: str, folder: str | Path, origin: str, change: Change) -> str:
    """`text` (a whole README.md) with its section on weights replaced if they are not those that it describes.

    Our own lines go, with the evidence; the lines that an author put between them stay, below the new ones.
    """
    found = _WEIGHTS.search(text)
    if found is None or found["digest"] == weights_digest(folder):
        return text
    ours = found["ours"].split()
    theirs = "\n".join(line for line in found["text"].splitlines() if not line.strip() or _mark(line) not in ours)
    section = weights_section(folder, origin=origin, change=change)
    if theirs.strip():
        added = re.sub(r"\n{3,}", "\n\n", theirs).strip()
        section = section.replace("\n<!-- /", f"\n\n{added}\n<!-- /")
    return text[: found.start()] + section + text[found.end() :]


def _mark(line: str) -> str:
    return hashlib.sha256(line.strip().encode()).hexdigest()[:8]


def _model_lines(folder: Path, origin: str, change: Change, resized_from) -> list[str]:
    shapes, vision = tensor_shapes(folder), model_config(folder)["vision_config"]
    height, width = pair(vision["image_size"])
    rows, columns = 4 * height // vision["patch_size"], 4 * width // vision["patch_size"]
    split = [name for name in shapes if re.search(r"\.attn\.[qkv]\.(weight|bias)$", name)]
    kept = "no value changed"
    if resized_from is not None:
        before = "{} x {}".format(*pair(resized_from))
        kept = f"position tables were resampled from {before} to {height} x {width} pixels, no other value changed"
    sentence = {
        "split": f"Changed against the base: the fused `qkv` layers of {origin} were cut into `q`, `k` and `v`, so "
        f"{len(split) // 3} tensors became {len(split)}, beside {len(shapes) - len(split)} others; {kept}.",
        "finetune": f"Changed against the base: {origin} was fine-tuned.",
        "merge": f"Changed against the base: an adapter was merged into {origin}.",
        "unknown": f"Made from {origin}. Its values were changed (fine-tuned, merged, ...); how is not recorded.",
    }[change]
    rank, targets = _example()
    adapted = [shape for name, shape in shapes.items() if name.split(".")[-2:] in [[t, "weight"] for t in targets]]
    parameters = sum(rank * (outputs + inputs) for outputs, inputs in adapted)  # LoRA's B (outputs, r), A (r, inputs)
    return [
        sentence,
        "",
        f"- {len(shapes)} tensors, {count_values(shapes):,} values.",
        f"- Images are resized to fit {height} x {width} pixels; masks leave the decoder at {rows} x {columns}.",
        f"- `target_modules={json.dumps(targets)}` adapts {len(adapted)} linear layers, all in the vision encoder: "
        f"{parameters:,} trainable parameters at `r={rank}`.",
    ]


def _example() -> tuple[int, list[str]]:
    """`r` and `target_modules` of the LoRA example in the card."""
    card = (Path(__file__).parent / "card_model.md").read_text(encoding="utf-8")
    rank, targets = re.search(r"LoraConfig\(r=(\d+),.*target_modules=(\[.*?\])", card).groups()
    return int(rank), json.loads(targets)


def _adapter_lines(folder: Path) -> list[str]:
    shapes, config = tensor_shapes(folder), read_json(folder / "adapter_config.json")
    targets = config.get("target_modules") or []
    options = {
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "modules_to_save": config.get("modules_to_save"),
    }
    settings = ", ".join(f"`{name}={json.dumps(value)}`" for name, value in options.items() if value)
    size = f"{len(shapes)} tensors ({count_values(shapes):,} values)"
    return [f"The weights of the base stay as they are; {size} come on top, made with {settings}."]


def _evidence_lines(evidence: Sequence[Evidence]) -> list[str]:
    if not evidence:
        return []
    lines = ["", "### Evidence", "", "Measured on exactly these weights when the folder was made:", ""]
    lines += ["| compared | largest absolute difference | dtype | device | versions |", "|---|---|---|---|---|"]
    for row in evidence:
        difference = "equal, bit for bit" if row.max_difference is None else f"{row.max_difference:.3g}"
        versions = ", ".join(f"{name} {number}" for name, number in row.versions.items())
        lines.append(f"| {row.compared} | {difference} | {row.dtype} | {row.device} | {versions} |")
    return lines


# Code


def code_section(folder: str | Path, repo_id: str = REPO_PLACEHOLDER) -> str:
    """What `trust_remote_code=True` runs: the code files, their sha256, how to pin them. Of an adapter: its base."""
    folder = Path(folder)
    if is_adapter(folder):
        base = read_base(folder)
        pinned = "at no fixed revision: look one up, read the files, and put it in the call"
        if base.revision:
            pinned = f"at revision `{base.revision}`: keep the revision in the call"
        return f"""<!-- sam-split: code -->
## What `trust_remote_code=True` runs

This repository holds no code. The code that runs is that of its base, `{base.repo_id}`, {pinned}.
<!-- /sam-split: code -->"""
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in code_files(folder)}
    modified = [f"`{name}`" for name in modified_code(folder)]
    if modified:
        verb = "differ" if len(modified) > 1 else "differs"
        origin = f"**Modified code.** {' and '.join(modified)} {verb} from {_package()}: read before you run."
    else:
        origin = f"They are byte for byte those of {_package()}."
    rows = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in digests.items())
    expected = "\n".join(f'    "{name}": "{digest}",' for name, digest in digests.items())
    return f"""<!-- sam-split: code -->
## What `trust_remote_code=True` runs

These {len(digests)} Python files of this repository, on your machine, and nothing else. {origin}

| file | sha256 |
|---|---|
{rows}

Without a revision you run whatever the repository holds at that moment. Read the files once, then pin the commit:

```python
import hashlib
from pathlib import Path

from huggingface_hub import hf_hub_download, model_info
from transformers import AutoModel

repo = "{repo_id}"
sha = model_info(repo).sha  # write the value you have read into your code in place of this call
expected = {{
{expected}
}}
for name, digest in expected.items():
    data = Path(hf_hub_download(repo, name, revision=sha)).read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest, name
model = AutoModel.from_pretrained(repo, revision=sha, code_revision=sha, trust_remote_code=True)
```
<!-- /sam-split: code -->"""


def refresh_code_section(text: str, folder: str | Path, repo_id: str) -> str:
    """`text` (a whole README.md) with its section on code made true of `folder`; appended if it has none."""
    section = code_section(folder, repo_id)
    renewed, found = _CODE.subn(lambda _: section, text)
    return renewed if found else f"{text.rstrip()}\n\n{section}\n"


def code_files(folder: str | Path) -> list[str]:
    """The code files of a folder; a version before or after the installed one may have fewer or more."""
    return sorted(path.name for path in Path(folder).glob("*_sam_split.py"))


def modified_code(folder: str | Path) -> list[str]:
    """The code files of `folder` that are not byte for byte those of the installed `sam_split`, or missing."""
    import sam_split

    package = Path(sam_split.__file__).parent
    theirs = {name: Path(folder, name).read_bytes() for name in code_files(folder)}
    ours = {name: (package / name).read_bytes() for name in sam_split.CODE_FILES}
    return sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))


def _package() -> str:
    try:
        return f"sam-split {version('sam-split')}"
    except PackageNotFoundError:  # run from a checkout
        return "the sam-split package"


# What both sections read


def read_base(folder: str | Path, given: Base | None = None) -> Base:
    """What the adapter in `folder` belongs to: `given`, or else what its config names.

    Raises:
        ValueError: if that is not a Hub id.
    """
    config = read_json(Path(folder) / "adapter_config.json")
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    if given is not None:
        return Base(given.repo_id, given.revision or (revision if given.repo_id == named else None))
    base = hub_id(named)
    if base is None:
        raise ValueError(
            f"adapter_config.json in {folder} names the base {named!r}, expected a Hub id: nobody else could load it; "
            "push the base first, then name it with --base-model NAME/REPOSITORY"
        )
    return Base(base, revision)


def model_config(folder: Path) -> dict:
    """The config of the split model in `folder`.

    Raises:
        ValueError: if it is of another kind of model, or none.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != "sam_split":
        raise ValueError(
            f"config.json in {folder} says model_type {config.get('model_type')!r}, expected 'sam_split'; "
            f"`sam-split convert {folder} OUT` makes such a folder"
        )
    return config


def hub_id(source) -> str | None:
    """`source` if it reads as `name/repository` and is not a file or folder here."""
    if not isinstance(source, str) or Path(source).exists():
        return None
    return source if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) else None


def pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def count_values(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: if there is no such file, or something else in it.
    """
    if not path.is_file():
        raise ValueError(
            f"{path.parent} holds no {path.name}; give a folder that `sam-split convert` or save_pretrained wrote"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
