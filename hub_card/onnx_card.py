"""The card of a model in ONNX graphs, for transformers.js and onnxruntime, and for a Space that shows it.

In the folder the card describes all that is there. Two of its sections are true in one place only and do not travel to
the other: how transformers.js loads the repository, and how the page is served.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from string import Template

from huggingface_hub import ModelCardData, SpaceCardData

from .card import CITATION, REPO_PLACEHOLDER, SIZES, TAGS, named_source, origin_metadata
from .folder import read_json
from .standing_card import parse_card, read_text

SECTION = "<!-- sam-split: {0} -->.*?<!-- /sam-split: {0} -->\n*"
PAGE = """<!-- sam-split: page -->
## The page

`index.html` takes an image and clicks, and shows the masks; the image stays in the browser. The page fetches
transformers.js from jsdelivr, so it needs the Internet. To serve it on your machine, run this here, and open
http://localhost:8000:

```bash
python -m http.server
```
{compare}<!-- /sam-split: page -->

"""
PARTS = {"encoder": "vision_encoder", "decoder": "prompt_encoder_mask_decoder"}
COMPARE = """
A switch compares the adapter with the base. `base/` holds the graphs of the base that the adapter changed; the others,
in `onnx/`, are used by both.
"""


def onnx_card(folder: str | Path, *, source, adapter, evidence: Sequence[tuple[str, str]]) -> str:
    """README.md of a folder.

    Args:
        folder: with its config and graphs in place; they are read.
        source: what it was made from: a Hub id, or a file or folder, of which only the last path element is printed.
        adapter: what was merged into it, named likewise, or None.
        evidence: what was compared with torch, and the result.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    hidden = config["vision_config"]["hidden_size"]
    data = {
        "library_name": "transformers.js",
        "pipeline_tag": "mask-generation",
        "tags": [*TAGS, "onnx"],
        **origin_metadata(source),
    }
    graphs = sorted((folder / "onnx").iterdir())
    fields = {
        "size": SIZES.get(hidden, f"hidden size {hidden}"),
        "origin": named_source(source) + (f" with the adapter {named_source(adapter)}" if adapter else ""),
        "repo_id": REPO_PLACEHOLDER,
        "files": "\n".join(f"| `onnx/{path.name}` | {path.stat().st_size / 1e6:,.1f} MB |" for path in graphs),
        "evidence": "\n".join(f"| {compared} | {result} |" for compared, result in evidence),
        "citation": CITATION,
        **{part: next(path.name for path in graphs if name in path.name) for part, name in PARTS.items()},
    }
    template = (Path(__file__).parent / "card_onnx.md").read_text(encoding="utf-8")
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{Template(template).substitute(fields)}"


def describe_page(folder: Path) -> None:
    """Add to the README.md of an exported folder how its page is served, and what `base/` is if it is there."""
    readme = folder / "README.md"
    section = PAGE.format(compare=COMPARE if (folder / "base").is_dir() else "")
    use = "<!-- sam-split: use -->"
    readme.write_text(readme.read_text(encoding="utf-8").replace(use, section + use), encoding="utf-8")


def published_onnx_card(folder: Path, repo_id: str, space: bool) -> str:
    """The README.md of an exported folder as it will stand at `repo_id`, a Space or a model repository.

    Raises:
        ValueError: if it cannot be read.
    """
    readme = folder / "README.md"
    text = read_text(readme)
    card = parse_card(text, readme)
    if not space:
        return _without("page", text).replace(REPO_PLACEHOLDER, repo_id)
    data = card.data.to_dict()
    base, *_ = [data.pop(key, None) for key in ("base_model", "base_model_relation", "library_name", "pipeline_tag")]
    ours = {
        "title": repo_id.split("/")[1],
        "sdk": "static",
        "app_file": "index.html",
        "models": [base] if base else None,
    }
    return f"---\n{SpaceCardData(**{**ours, **data}).to_yaml()}\n---\n{_without('use', card.text)}"


def _without(section: str, text: str) -> str:
    return re.sub(SECTION.format(section), "", text, flags=re.DOTALL)
