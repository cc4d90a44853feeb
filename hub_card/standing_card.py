"""A README.md that stands in a folder already, made true of what is published with it.

Two sections of a card must stay true: what the weights are, and which code runs. Each stands between two HTML
comments. The section on code is always written again. The section on weights names the digest of the weights that it
describes and is written again where the folder holds others; the comment also marks our own lines, so that those of an
author stay.
"""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .card import REPO_PLACEHOLDER, WEIGHTS, Change, mark, model_card
from .folder import Base, hub_id, is_adapter

CODE = re.compile(r"<!-- sam-split: code -->.*?<!-- /sam-split: code -->", re.DOTALL)


def published_card(folder: Path, repo_id: str, base: Base | None, change: Change, demo: str | None = None) -> str:
    """The whole README.md for `folder`, which will stand at `repo_id`: the one in it completed, or a card of ours.

    Args:
        folder: with its config, weights and code files in place.
        repo_id: takes the place of the placeholder.
        base: of an adapter, its base; of a model, what it was made from if its card does not say.
        change: what was done since, if the weights are no longer those that the card describes.
        demo: a Space that shows these weights, to link to.

    Raises:
        ValueError: if the README.md cannot be read, names a base that is no Hub id, or has no place for the link.
    """
    readme = folder / "README.md"
    text = read_text(readme) if readme.is_file() else ""
    source, revision = (base.repo_id, base.revision) if base else (None, None)
    if _is_blank(text):
        blank = model_card(folder, source=source, revision=revision, change=change, repo_id=repo_id)
        return _linked(str(blank), demo)
    card = parse_card(text, readme)
    named = card.data.get("base_model")
    bases = named if isinstance(named, list) else [named or source]
    if not is_adapter(folder) and any(name and not hub_id(name) for name in bases):
        raise ValueError(f"{readme}: base_model is {named!r}, expected a Hub id; correct or remove it")
    ours = model_card(folder, source=bases[0], change=change, repo_id=repo_id)
    facts = ("base_model", "base_model_relation") if is_adapter(folder) else ()  # what an adapter's config says
    for key, value in ours.data.to_dict().items():
        if card.data.get(key) is None or (key in facts and card.data[key] != value):
            card.data[key] = value
            text = str(card)
    return _linked(_refreshed(text.replace(REPO_PLACEHOLDER, repo_id), ours.text), demo)


def read_text(readme: Path) -> str:
    try:
        return readme.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{readme} is not UTF-8; save it in that encoding") from None


def parse_card(text: str, readme: Path) -> ModelCard:
    try:
        return ModelCard(text)
    except Exception as error:  # ValueError, or whatever the YAML parser raises
        raise ValueError(f"{readme}: its metadata, between the two --- lines, does not parse: {error}") from None


def _linked(text: str, demo: str | None) -> str:
    """`text` with a link to a Space, as one of our lines on the weights: it goes when they change."""
    line = f"To click on images in a browser: [{demo}](https://huggingface.co/spaces/{demo})."
    if demo is None or line in text:
        return text
    section = WEIGHTS.search(text)
    if section is None:
        raise ValueError(
            "README.md has no section on the weights for the link of --demo; write the link there yourself"
        )
    marks, end = section.end("ours"), section.end("text")
    return f"{text[:marks]} {mark(line)}{text[marks:end]}\n{line}\n{text[end:]}"


def _refreshed(text: str, ours: str) -> str:
    """`text` with the section on code of `ours`, and that on weights if they are not those that `text` describes."""
    code, weights = CODE.search(ours)[0], WEIGHTS.search(ours)
    text, found = CODE.subn(lambda _: code, text)
    if not found:
        text = f"{text.rstrip()}\n\n{code}\n"
    old = WEIGHTS.search(text)
    if old is None or old["digest"] == weights["digest"]:
        return text
    # Our own lines go, with the evidence; those that an author put between them stay, below the new ones.
    marks = old["ours"].split()
    theirs = "\n".join(line for line in old["text"].splitlines() if not line.strip() or mark(line) not in marks)
    theirs = re.sub(r"\n{3,}", "\n\n", theirs).strip()
    section = weights[0].replace("\n<!-- /", f"\n\n{theirs}\n<!-- /") if theirs else weights[0]
    return text[: old.start()] + section + text[old.end() :]


def _is_blank(text: str) -> bool:
    """Whether nobody wrote anything: no card, or the form of PEFT, Trainer and save_pretrained as they leave it."""
    if "Model Card for Model ID" not in text:
        return not text.strip()
    form = ModelCard.from_template(ModelCardData()).text.splitlines()
    generated = re.compile(r"### Framework versions|- PEFT \S+|.*automatically generated\.")
    lines = ModelCard(text, ignore_metadata_errors=True).text.splitlines()
    return all(line in form or generated.fullmatch(line) for line in lines)
