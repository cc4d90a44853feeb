"""The model card of a folder: what it holds, how to use it, what was measured, and what code it runs.

The words stand in card_model.md and card_adapter.md. Every number comes from the folder itself.
"""

import hashlib
import json
import math
import re
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Literal

from huggingface_hub import ModelCard, ModelCardData

from .folder import (
    code_files,
    hub_id,
    is_adapter,
    model_config,
    modified_code,
    read_base,
    read_json,
    tensor_shapes,
    weights_digest,
)

# Stands for the repository id until the push knows it; a valid id, so the card of an unpublished folder reads well.
REPO_PLACEHOLDER = "your-name/your-sam-split"

# "unknown": the values changed, and nothing in the folder says how.
Change = Literal["split", "finetune", "merge", "unknown"]

# The section on weights, of any weights and of whatever version; `ours` marks the lines in it that we wrote.
WEIGHTS = re.compile(
    r"<!-- sam-split: weights (?P<digest>\w+), our lines (?P<ours>[\w ]+) -->"
    r"(?P<text>.*?)<!-- /sam-split: weights -->",
    re.DOTALL,
)
CITATION = """@article{kirillov2023segany,
  title   = {Segment Anything},
  author  = {Kirillov, Alexander and Mintun, Eric and Ravi, Nikhila and Mao, Hanzi and Rolland, Chloe and
             Gustafson, Laura and Xiao, Tete and Whitehead, Spencer and Berg, Alexander C. and Lo, Wan-Yen and
             Doll{\\'a}r, Piotr and Girshick, Ross},
  journal = {arXiv:2304.02643},
  year    = {2023}
}"""
SIZES = {768: "ViT-B", 1024: "ViT-L", 1280: "ViT-H"}  # hidden size of the vision encoder -> the paper's name
TAGS = ["segment-anything", "sam", "sam-split"]

# Weights that are known to be Meta's: their repositories on the Hub, and the md5 of the files on their server.
META_REPOSITORIES = ("facebook/sam-vit-base", "facebook/sam-vit-large", "facebook/sam-vit-huge")
META_FILES = (
    "01ec64d29a2fca3f0661936605ae66f8",  # sam_vit_b_01ec64.pth
    "0b3195507c641ddb6910d2bb5adee89c",  # sam_vit_l_0b3195.pth
    "4b8939a88964f0f4ff5f5b2642c598a6",  # sam_vit_h_4b8939.pth
)


def model_card(
    folder: str | Path,
    *,
    source: str | Path | None,
    revision: str | None = None,
    change: Change = "split",
    resized_from: int | tuple[int, int] | None = None,
    equal_to: str | None = None,
    repo_id: str = REPO_PLACEHOLDER,
) -> ModelCard:
    """The card of a split model folder, or of an adapter folder (one that holds `adapter_config.json`).

    Args:
        folder: the folder with its config, weights and code files already in place; they are read.
        source: what it was made from: a Hub id (becomes `base_model`), or a local file or folder (only its last path
            element is printed), or None if that is not known. An adapter's base is read from its own config instead.
        revision: commit of `source` on the Hub.
        change: what was done to the source: "split" (qkv cut, no value changed), "finetune", "merge" or "unknown".
        resized_from: the source's `image_size`, if position tables were resampled for another one.
        equal_to: what every tensor of a model was found equal to, in words: "that of the source"; None if none was
            compared, and the card says nothing of a measurement.
        repo_id: where it will be published; by default a placeholder that the push replaces.

    Raises:
        ValueError: if the folder holds neither a split model nor an adapter, or an adapter's base is not a Hub id.
    """
    folder = Path(folder)
    kind, shapes = "adapter" if is_adapter(folder) else "model", tensor_shapes(folder)
    if is_adapter(folder):
        data, fields = _adapter(folder)
    else:
        data, fields = _model(folder, shapes, source, revision, change, resized_from, equal_to)
    if repo_id != REPO_PLACEHOLDER:
        fields["title"] = repo_id.split("/")[-1]
    values = sum(math.prod(shape) for shape in shapes.values())
    fields |= {"tensors": len(shapes), "values": f"{values:,}", "digest": weights_digest(folder), "ours": "OURS"}
    words = Template((Path(__file__).parent / f"card_{kind}.md").read_text(encoding="utf-8"))
    body = words.substitute(fields, repo_id=repo_id, citation=CITATION)
    marks = dict.fromkeys(map(mark, WEIGHTS.search(body)["text"].splitlines()))
    body = body.replace("our lines OURS", f"our lines {' '.join(marks)}")
    return ModelCard(f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{body}")


def mark(line: str) -> str:
    return hashlib.sha256(line.strip().encode()).hexdigest()[:8]


def _adapter(folder: Path) -> tuple[dict, dict]:
    """Metadata of the card, and the fields of its template but for those that both kinds have."""
    base, config = read_base(folder), read_json(folder / "adapter_config.json")
    data = {
        "library_name": "peft",
        "pipeline_tag": "mask-generation",
        "base_model": base.repo_id,
        "base_model_relation": "adapter",
        "tags": [*TAGS, "peft", "lora"],
    }
    method = "DoRA" if config.get("use_dora") else str(config.get("peft_type", "PEFT")).replace("LORA", "LoRA")
    settings = {name: config.get(name) for name in ("r", "lora_alpha", "target_modules", "modules_to_save")}
    return data, {
        "title": f"{method} adapter for {base.repo_id}",
        "method": method,
        "base": base.repo_id,
        "at_revision": f" at revision `{base.revision}`" if base.revision else " at no fixed revision",
        "pinned": f', revision="{base.revision}", code_revision="{base.revision}"' if base.revision else "",
        "settings": ", ".join(f"`{name}={json.dumps(value)}`" for name, value in settings.items() if value),
    }


def origin_metadata(source: str | Path | None) -> dict:
    """What a model that was made from `source` tells the Hub of it: the base, and the licence of weights of Meta's."""
    data, base = {}, hub_id(source) or _recorded_base(source)
    if base in META_REPOSITORIES or _is_metas(source):
        data["license"] = "apache-2.0"
    if base:
        # The Hub knows adapter, finetune, merge (of several models) and quantized: a conversion counts as "finetune".
        data |= {"base_model": base, "base_model_relation": "finetune"}
    return data


def _model(folder: Path, shapes, source, revision, change, resized_from, equal_to) -> tuple[dict, dict]:
    """As `_adapter`, of a split model."""
    config = model_config(folder)
    vision = config["vision_config"]
    data = {
        "library_name": "transformers",
        "pipeline_tag": "mask-generation",
        "tags": [*TAGS, "image-segmentation", "peft", "custom_code"],
    }
    data |= origin_metadata(source)
    credit = "The weights are under the licence of what they were made from."
    if "license" in data:
        credit = "Original weights: Segment Anything, Meta AI Research, Apache-2.0."

    height, width = _pair(vision["image_size"])
    rows, columns = 4 * height // vision["patch_size"], 4 * width // vision["patch_size"]
    split = [name for name in shapes if re.search(r"\.attn\.[qkv]\.(weight|bias)$", name)]
    kept = "no value changed"
    if resized_from is not None:
        before = "{} x {}".format(*_pair(resized_from))
        kept = f"position tables were resampled from {before} to {height} x {width} pixels, no other value changed"
    origin = named_source(source, revision)
    sentences = {
        "split": f"Changed against the base: the fused `qkv` layers of {origin} were cut into `q`, `k` and `v`, so "
        f"{len(split) // 3} tensors became {len(split)}, beside {len(shapes) - len(split)} others; {kept}.",
        "finetune": f"Changed against the base: {origin} was fine-tuned.",
        "merge": f"Changed against the base: an adapter was merged into {origin}.",
        "unknown": f"Made from {origin}. Its values were changed (fine-tuned, merged, ...); how is not recorded.",
    }
    rank, targets = 16, ["q", "v"]  # of the example
    adapted = [shape for name, shape in shapes.items() if name.split(".")[-2:] in [[t, "weight"] for t in targets]]
    trainable = sum(rank * (outputs + inputs) for outputs, inputs in adapted)  # LoRA's B (outputs, r), A (r, inputs)
    size = SIZES.get(vision["hidden_size"], f"hidden size {vision['hidden_size']}")
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in code_files(folder)}
    return data, {
        "title": f"SamSplit {size}",
        "size": size,
        "change": sentences[change],
        "image": f"{height} x {width}",
        "mask": f"{rows} x {columns}",
        "evidence": _evidence(equal_to, config.get("dtype")),
        "rank": rank,
        "targets": json.dumps(targets),
        "adapted": len(adapted),
        "trainable": f"{trainable:,}",
        "files": len(digests),
        "code": _code_origin(folder),
        "digests": "\n".join(f"| `{name}` | `{digest}` |" for name, digest in digests.items()),
        "credit": credit,
    }


def _code_origin(folder: Path) -> str:
    import sam_split

    package = f"sam-split {sam_split.__version__}"
    modified = " and ".join(f"`{name}`" for name in modified_code(folder))
    if modified:
        return f"**Modified code.** Not those of {package}: {modified}; read before you run."
    return f"They are byte for byte those of {package}."


def _evidence(equal_to: str | None, dtype: str | None) -> str:
    """What was measured: nothing, or a heading and a sentence after an empty line."""
    if equal_to is None:
        return ""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"""
### Evidence

Measured on exactly these weights when the folder was made: every tensor, as read back from the disk, is equal,
bit for bit, to {equal_to} ({dtype}; on the CPU; {versions}).
"""


def named_source(source: str | Path | None, revision: str | None = None) -> str:
    """`source` in Markdown; of a path the last element alone."""
    if source is None:
        return "a model that is not recorded"
    base = hub_id(source)
    if base is None:
        return f"`{short_name(source)}`"
    return f"[`{base}`](https://huggingface.co/{base})" + (f" at revision `{revision}`" if revision else "")


def short_name(path: str | Path) -> str:
    """The end of a path, which says no more of a machine: the last part, or two where it is `adapter`, as most are."""
    parts = Path(path).parts
    return "/".join(parts[-2:] if parts[-1:] == ("adapter",) else parts[-1:])


def _recorded_base(source: str | Path | None) -> str | None:
    """The base that the card of a local folder names."""
    readme = Path(source or "", "README.md")
    if source is None or not readme.is_file():
        return None
    try:
        return hub_id(ModelCard.load(readme).data.base_model)
    except Exception:  # ValueError, or whatever the YAML parser raises: a card that does not parse records nothing
        return None


def _is_metas(source: str | Path | None) -> bool:
    """Whether a local file is one of those that Meta published, whatever its name."""
    if source is None or not Path(source).is_file():
        return False
    with Path(source).open("rb") as file:
        digest = hashlib.md5(usedforsecurity=False)
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest() in META_FILES


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
