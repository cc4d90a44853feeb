"""The model card of a folder: what it holds, how to use it, what was measured, and what code it runs.

Every number comes from the folder itself or from an `Evidence` row; nothing is typed in by hand.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from string import Template

from huggingface_hub import ModelCard, ModelCardData

from .sections import (
    REPO_PLACEHOLDER,
    Change,
    Evidence,
    code_section,
    hub_id,
    model_config,
    read_base,
    read_json,
    refresh_code_section,
    refresh_weights_section,
    weights_section,
)
from .weight_files import is_adapter

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
    evidence: Sequence[Evidence] = (),
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
        evidence: rows of the evidence table; without any, the card says nothing of a measurement.
        repo_id: where it will be published; by default a placeholder that the push replaces.

    Raises:
        ValueError: if the folder holds neither a split model nor an adapter, or an adapter's base is not a Hub id.
    """
    folder = Path(folder)
    data, named = metadata(folder, source), repo_id.split("/")[-1] if repo_id != REPO_PLACEHOLDER else None
    if is_adapter(folder):
        base, config = read_base(folder), read_json(folder / "adapter_config.json")
        method = "DoRA" if config.get("use_dora") else str(config.get("peft_type", "PEFT")).replace("LORA", "LoRA")
        fields = {
            "title": named or f"{method} adapter for {base.repo_id}",
            "method": method,
            "base": base.repo_id,
            "at_revision": f" at revision `{base.revision}`" if base.revision else "",
            "pinned": f', revision="{base.revision}", code_revision="{base.revision}"' if base.revision else "",
        }
    else:
        hidden = model_config(folder)["vision_config"]["hidden_size"]
        size = SIZES.get(hidden, f"hidden size {hidden}")
        metas = "Original weights: Segment Anything, Meta AI Research, Apache-2.0."
        credit = metas if "license" in data else "The weights are under the licence of what they were made from."
        fields = {"title": named or f"SamSplit {size}", "size": size, "paper": PAPER, "weights_credit": credit}
    origin = _origin(source, revision)
    section = weights_section(folder, origin=origin, change=change, resized_from=resized_from, evidence=evidence)
    template = Path(__file__).parent / ("card_adapter.md" if is_adapter(folder) else "card_model.md")
    body = Template(template.read_text(encoding="utf-8")).substitute(
        fields, repo_id=repo_id, weights=section, code=code_section(folder, repo_id), citation=CITATION
    )
    return ModelCard(f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{body}")


def metadata(folder: str | Path, source: str | Path | None) -> dict:
    """What the Hub needs to show and find a folder; the licence only where the weights are known to be Meta's.

    Raises:
        ValueError: as `model_card` does.
    """
    folder = Path(folder)
    if is_adapter(folder):
        return {
            "library_name": "peft",
            "pipeline_tag": "mask-generation",
            "base_model": read_base(folder).repo_id,
            "base_model_relation": "adapter",
            "tags": ["segment-anything", "sam", "sam-split", "peft", "lora"],
        }
    model_config(folder)  # raises for any other model
    data = {
        "library_name": "transformers",
        "pipeline_tag": "mask-generation",
        "tags": ["segment-anything", "sam", "sam-split", "image-segmentation", "peft", "custom_code"],
    }
    base = hub_id(source) or _recorded_base(source)
    if base in META_REPOSITORIES or _is_metas(source):
        data["license"] = "apache-2.0"
    if base:
        # The Hub knows adapter, finetune, merge (of several models) and quantized: a conversion counts as "finetune".
        data |= {"base_model": base, "base_model_relation": "finetune"}
    return data


def refreshed(text: str, folder: str | Path, repo_id: str, *, base: str | None, change: Change) -> str:
    """`text` (a whole README.md) made true of `folder`, which will stand at `repo_id`.

    Args:
        text: what `model_card` wrote and somebody may have edited, or what an author wrote without us.
        folder: with its config, weights and code files in place.
        repo_id: takes the place of the placeholder.
        base: Hub id of what the weights were made from, if it is known.
        change: what was done since, if the weights are no longer those that `text` describes.
    """
    text = refresh_code_section(text.replace(REPO_PLACEHOLDER, repo_id), folder, repo_id)
    return refresh_weights_section(text, folder, _origin(base, None), change)


def _origin(source: str | Path | None, revision: str | None) -> str:
    if source is None:
        return "a model that is not recorded"
    base = hub_id(source)
    if base is None:
        return f"`{Path(source).name}`"  # never the whole path: it says whose machine it was
    return f"[`{base}`](https://huggingface.co/{base})" + (f" at revision `{revision}`" if revision else "")


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
