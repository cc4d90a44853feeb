"""The model card: what a folder holds, how to use it, what was measured, and what code it runs.

Every number comes from the folder itself or from an `Evidence` row; nothing is typed in by hand. The section on remote
code stands between two HTML comments, so that `refresh_code_section` can renew it at push time and leave the rest of a
card that somebody edited alone.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import Literal

from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open

# Stands for the repository id until the push knows it; a valid id, so the card of an unpublished folder reads well.
REPO_PLACEHOLDER = "your-name/your-sam-split"

PAPER = "https://arxiv.org/abs/2304.02643"
CITATION = """@article{kirillov2023segany,
  title   = {Segment Anything},
  author  = {Kirillov, Alexander and Mintun, Eric and Ravi, Nikhila and Mao, Hanzi and Rolland, Chloe and
             Gustafson, Laura and Xiao, Tete and Whitehead, Spencer and Berg, Alexander C. and Lo, Wan-Yen and
             Doll{\\'a}r, Piotr and Girshick, Ross},
  journal = {arXiv:2304.02643},
  year    = {2023}
}"""
SIZES = {768: "ViT-B", 1024: "ViT-L", 1280: "ViT-H"}  # hidden size of the vision encoder -> the paper's name

Change = Literal["split", "finetune", "merge"]

_CODE_START, _CODE_END = "<!-- sam-split: code -->", "<!-- /sam-split: code -->"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers")}


@dataclass(frozen=True)
class Base:
    """The model on the Hub that an adapter belongs to, or that weights were made from."""

    repo_id: str
    revision: str | None = None


@dataclass(frozen=True)
class Evidence:
    """One comparison that was run on these weights.

    Args:
        compared: what was held against what, as a phrase: "masks of one click, against transformers' SamModel".
        max_difference: the largest absolute difference, in the unit of the thing compared.
        dtype: "float32", "bfloat16", ...
        device: "cpu", or the name of the accelerator.
        versions: package -> version it was measured with; this process's torch and transformers by default.
    """

    compared: str
    max_difference: float
    dtype: str
    device: str
    versions: dict[str, str] = field(default_factory=_versions)


def model_card(
    folder: str | Path,
    *,
    source: str | Path | None,
    revision: str | None = None,
    change: Change = "split",
    resized_from: int | tuple[int, int] | None = None,
    evidence: Sequence[Evidence] = (),
    repo_id: str = REPO_PLACEHOLDER,
) -> ModelCard:
    """The card of a split model folder, or of an adapter folder (one that holds `adapter_config.json`).

    Args:
        folder: the folder with its config, weights and code files already in place; they are read.
        source: what it was made from: a Hub id (becomes `base_model`), or a local file or folder (only its last path
            element is printed), or None if that is not known. An adapter's base is read from its own config instead.
        revision: commit of `source` on the Hub.
        change: what was done to the source: "split" (qkv cut, no value changed), "finetune" or "merge".
        resized_from: the source's `image_size`, if position tables were resampled for another one.
        evidence: rows of the evidence table; without any, the card says that nothing was measured.
        repo_id: where it will be published; by default a placeholder that the push replaces.

    Raises:
        ValueError: if the folder holds neither a split model nor an adapter, or an adapter's base is not a Hub id.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        return _adapter_card(folder, evidence, repo_id)
    config = _read_json(folder / "config.json")
    if config.get("model_type") != "sam_split":
        raise ValueError(f"{folder}: config.json has model_type {config.get('model_type')!r}, expected 'sam_split'")

    vision = config["vision_config"]
    shapes = tensor_shapes(folder)
    adapted = [shape for name, shape in shapes.items() if re.search(r"\.attn\.[qv]\.weight$", name)]
    # LoRA adds A (r, columns) and B (rows, r) to each linear.
    adapted_parameters = sum(16 * (rows + columns) for rows, columns in adapted)
    height, width = _pair(vision["image_size"])
    base = hub_id(source)
    data = {
        "library_name": "transformers",
        "pipeline_tag": "mask-generation",
        "license": "apache-2.0",
        "tags": ["segment-anything", "sam", "sam-split", "image-segmentation", "peft", "custom_code"],
    }
    if base:
        # The Hub knows adapter, finetune, merge (of several models) and quantized: a conversion counts as "finetune".
        data |= {"base_model": base, "base_model_relation": "finetune"}
    body = _template("card_model.md").substitute(
        title=repo_id.split("/")[-1] if repo_id != REPO_PLACEHOLDER else f"SamSplit {_size(vision)}",
        paper=PAPER,
        size=_size(vision),
        change=_change_sentence(change, shapes, _origin(source, base, revision), resized_from, (height, width)),
        repo_id=repo_id,
        adapted_linears=len(adapted),
        adapted_parameters=f"{adapted_parameters:,}",
        evidence=_evidence_section(evidence),
        code=code_section(folder, repo_id),
        image_size=f"{height} x {width}",
        mask_size=f"{4 * height // vision['patch_size']} x {4 * width // vision['patch_size']}",
        citation=CITATION,
    )
    return _card(data, body)


def code_section(folder: str | Path, repo_id: str = REPO_PLACEHOLDER) -> str:
    """What `trust_remote_code=True` runs: the code files, their sha256, how to pin them. Of an adapter: its base's."""
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        return _adapter_code_section(read_base(folder))
    from sam_split import CODE_FILES

    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in CODE_FILES}
    modified = modified_code(folder)
    if modified:
        origin = (
            f"**Modified code.** {' and '.join(f'`{name}`' for name in modified)} "
            f"{'differ' if len(modified) > 1 else 'differs'} from {_package()}: read before you run."
        )
    else:
        origin = f"They are byte for byte those of {_package()}."
    rows = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in digests.items())
    expected = "\n".join(f'    "{name}": "{digest}",' for name, digest in digests.items())
    return f"""{_CODE_START}
## What `trust_remote_code=True` runs

The {len(CODE_FILES)} Python files named here, of this repository, on your machine, and nothing else. {origin}

| file | sha256 |
|---|---|
{rows}

Without a revision you run whatever the repository holds tomorrow. Read the files once, then pin the commit:

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
{_CODE_END}"""


def _adapter_code_section(base: Base) -> str:
    if base.revision:
        pinned = f"at revision `{base.revision}`. Keep the revision in the call"
    else:
        pinned = "of no particular revision. Look one up, read the files, and put it in the call"
    return f"""{_CODE_START}
## What `trust_remote_code=True` runs

Nothing of this repository: it holds no code. The Python files of the base, `{base.repo_id}`, run: those {pinned}.
{_CODE_END}"""


def refresh_code_section(text: str, folder: str | Path, repo_id: str) -> str:
    """`text` (a whole README.md) with its section on remote code made true of `folder`; appended if it has none."""
    section = code_section(folder, repo_id)
    pattern = re.compile(re.escape(_CODE_START) + ".*?" + re.escape(_CODE_END), re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: section, text)
    return f"{text.rstrip()}\n\n{section}\n"


def modified_code(folder: str | Path) -> list[str]:
    """The code files of `folder` that are not byte for byte those of the installed `sam_split`."""
    import sam_split

    package = Path(sam_split.__file__).parent
    names = sam_split.CODE_FILES
    return [name for name in names if (Path(folder) / name).read_bytes() != (package / name).read_bytes()]


def tensor_shapes(folder: str | Path, pattern: str = "model*.safetensors") -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the folder's weight files; only their headers are read.

    Raises:
        ValueError: if a file is cut short or is not safetensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(folder).glob(pattern)):
        try:
            with safe_open(path, framework="numpy") as weights:
                shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); write it again") from None
    return shapes


def read_base(folder: str | Path) -> Base:
    """What the `adapter_config.json` of `folder` names as its base.

    Raises:
        ValueError: if that is not a Hub id.
    """
    config = _read_json(Path(folder) / "adapter_config.json")
    named = config.get("base_model_name_or_path")
    base = hub_id(named)
    if base is None:
        raise ValueError(
            f"{folder}: adapter_config.json names the base {named!r}, expected a Hub id; nobody else could load it"
        )
    return Base(base, config.get("revision"))


def _adapter_card(folder: Path, evidence: Sequence[Evidence], repo_id: str) -> ModelCard:
    base, config = read_base(folder), _read_json(folder / "adapter_config.json")
    shapes = tensor_shapes(folder, "adapter_model*.safetensors")
    method = "DoRA" if config.get("use_dora") else str(config.get("peft_type", "PEFT")).replace("LORA", "LoRA")
    targets = config.get("target_modules") or []
    options = {
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "modules_to_save": config.get("modules_to_save"),
    }
    settings = ", ".join(f"`{name}={json.dumps(value)}`" for name, value in options.items() if value)
    pin = f', revision="{base.revision}", code_revision="{base.revision}"' if base.revision else ""
    data = {
        "library_name": "peft",
        "pipeline_tag": "mask-generation",
        "license": "apache-2.0",
        "base_model": base.repo_id,
        "base_model_relation": "adapter",
        "tags": ["segment-anything", "sam", "sam-split", "peft", "lora"],
    }
    body = _template("card_adapter.md").substitute(
        title=repo_id.split("/")[-1] if repo_id != REPO_PLACEHOLDER else f"{method} adapter for {base.repo_id}",
        method=method,
        base=base.repo_id,
        base_revision=pin,
        at_revision=f" at revision `{base.revision}`" if base.revision else "",
        tensors=len(shapes),
        values=f"{_parameters(shapes):,}",
        settings=settings,
        repo_id=repo_id,
        evidence=_evidence_section(evidence),
        code=code_section(folder, repo_id),
        citation=CITATION,
    )
    return _card(data, body)


def _change_sentence(change, shapes, origin, resized_from, size) -> str:
    split = [name for name in shapes if re.search(r"\.attn\.[qkv]\.(weight|bias)$", name)]
    held = f"It holds {len(shapes)} tensors, {_parameters(shapes):,} values."
    if change == "finetune":
        return f"Changed against the base: {origin} was fine-tuned; names and shapes stayed. {held}"
    if change == "merge":
        return f"Changed against the base: an adapter was merged into {origin}; names and shapes stayed. {held}"
    kept = "no value changed"
    if resized_from is not None:
        old, new = (f"{height} x {width}" for height, width in (_pair(resized_from), size))
        kept = f"position tables were resampled from {old} to {new} pixels, no other value changed"
    return (
        f"Changed against the base: the fused `qkv` layers of {origin} were cut into `q`, `k` and `v`, so "
        f"{len(split) // 3} tensors became {len(split)}, beside {len(shapes) - len(split)} others; {kept}. {held}"
    )


def _evidence_section(evidence: Sequence[Evidence]) -> str:
    if not evidence:
        return ""
    lines = ["## Evidence", "", "Measured on exactly these weights when the folder was made:", ""]
    lines += ["| compared | largest absolute difference | dtype | device | versions |", "|---|---|---|---|---|"]
    for row in evidence:
        versions = ", ".join(f"{name} {number}" for name, number in row.versions.items())
        lines.append(f"| {row.compared} | {row.max_difference:.3g} | {row.dtype} | {row.device} | {versions} |")
    return "\n".join(lines) + "\n\n"


def _card(data: dict, body: str) -> ModelCard:
    return ModelCard(f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{body}")


def _template(name: str) -> Template:
    return Template((Path(__file__).parent / name).read_text(encoding="utf-8"))


def _origin(source: str | Path | None, base: str | None, revision: str | None) -> str:
    if source is None:
        return "a model that is not recorded"
    if base is None:
        return f"`{Path(source).name}`"  # never the whole path: it says whose machine it was
    return f"[`{base}`](https://huggingface.co/{base})" + (f" at revision `{revision}`" if revision else "")


def hub_id(source: str | Path | None) -> str | None:
    """`source` if it reads as `name/repository` and is not a file or folder here."""
    if not isinstance(source, str) or Path(source).exists():
        return None
    return source if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) else None


def _package() -> str:
    try:
        return f"sam-split {version('sam-split')}"
    except PackageNotFoundError:  # run from a checkout
        return "the sam-split package"


def _size(vision: dict) -> str:
    hidden = vision["hidden_size"]
    return SIZES.get(hidden, f"hidden size {hidden}")


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {path.name}; is it a folder written by `sam-split convert`?")
    return json.loads(path.read_text(encoding="utf-8"))
