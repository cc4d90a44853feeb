"""Which files of a folder belong on the Hub, and the copy of them that is pushed.

What is not listed here does not leave the machine: training states, `.env` files, pickles and notes are left out, by
name.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from tqdm import tqdm

from .card import metadata, model_card, refreshed
from .errors import TOKEN, PushRefused
from .sections import Base, Change, code_files, hub_id, model_config, modified_code, read_base, read_json
from .weight_files import is_adapter

MODEL_FILES = {
    "config.json": "configuration; its auto_map names the code",
    "model.safetensors": "weights",
    "model.safetensors.index.json": "which shard holds which tensor",
    "preprocessor_config.json": "image processor",
    "processor_config.json": "image processor",
}
ADAPTER_FILES = {
    "adapter_config.json": "adapter configuration; names the base",
    "adapter_model.safetensors": "adapter",
}
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
CODE = re.compile(r"\w+_sam_split\.py")


@dataclass(frozen=True)
class Staged:
    """A folder made ready: `files` is everything that will be pushed, `left_out` what stays here."""

    folder: Path
    files: list[CommitOperationAdd]
    left_out: list[str]
    base: Base | None  # of an adapter

    @property
    def is_adapter(self) -> bool:
        return self.base is not None

    def is_stale(self, path: str) -> bool:
        """Whether a file on the Hub is one that an earlier push of ours left and this one does not bring."""
        if path in {file.path_in_repo for file in self.files}:
            return False
        if self.is_adapter:
            return path in ADAPTER_FILES
        return path in MODEL_FILES or bool(SHARD.fullmatch(path) or CODE.fullmatch(path))


def what(path: str) -> str:
    """What a file that is pushed is for."""
    known = {**MODEL_FILES, **ADAPTER_FILES, "README.md": "model card", "LICENSE": "licence"}
    return known.get(path, "code that trust_remote_code runs" if CODE.fullmatch(path) else "weights")


def check_repo_id(repo_id: str) -> None:
    """Raises PushRefused unless `repo_id` is `name/repository` in the Hub's alphabet."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushRefused(f"{repo_id!r} is not a repository id: {error}") from None
    if repo_id.count("/") != 1:
        raise PushRefused(f"{repo_id!r} is not a repository id; expected 'name/repository', both parts")


def stage(
    folder: str | Path,
    target: str | Path,
    repo_id: str,
    *,
    allow_modified_code: bool = False,
    base: Base | None = None,
) -> Staged:
    """Copy what belongs into `target` (an empty folder), with the card and the configs as they will be published.

    Args:
        base: of an adapter, its Hub id and commit; of a model, what it was made from if its card does not say.

    Raises:
        PushRefused: if the folder is incomplete, ambiguous, not a split model, or holds a token.
    """
    folder, target = Path(folder), Path(target)
    if not folder.is_dir():
        raise PushRefused(f"{folder} is not a folder; give the one that `sam-split convert` or save_pretrained wrote")
    try:
        paths = _adapter_paths(folder) if is_adapter(folder) else _model_paths(folder, allow_modified_code)
        paths += [name for name in ("README.md", "LICENSE") if (folder / name).is_file()]
        for path in paths:
            _link_or_copy(folder / path, target / path)
        if is_adapter(folder):
            theirs, config = read_base(folder, base), read_json(folder / "adapter_config.json")
            # auto_mapping holds the name and hash of a local module, true on this machine only.
            named = {"base_model_name_or_path": theirs.repo_id, "revision": theirs.revision, "auto_mapping": None}
            _rewrite_json(target / "adapter_config.json", {**config, **named})
        else:
            _rewrite_json(target / "config.json", _published_config(folder))
        card = _published_card(folder, target, repo_id, base)
    except ValueError as error:
        raise PushRefused(str(error).replace(str(target), str(folder))) from None
    (target / "README.md").write_text(card, encoding="utf-8", newline="\n")
    names = sorted({*paths, "README.md"})
    _refuse_tokens(target, names)
    files = [CommitOperationAdd(name, target / name) for name in tqdm(names, desc="Hashing", unit="file")]
    left_out = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir() if entry.name not in names)
    return Staged(target, files, left_out, read_base(target) if is_adapter(folder) else None)


def _model_paths(folder: Path, allow_modified_code: bool) -> list[str]:
    from sam_split.configuration_sam_split import AUTO_MAP  # here, because it imports torch

    model_config(folder)  # raises for any other model
    again = "load it with sam_split.SamSplitModel.from_pretrained and save it again"
    code = code_files(folder)
    for name in {f"{target.partition('.')[0]}.py" for target in AUTO_MAP.values()}:
        if name not in code:
            raise PushRefused(f"{folder} holds no {name}, without which AutoModel cannot load it; {again}")
    modified = modified_code(folder)
    if modified and not allow_modified_code:
        raise PushRefused(
            f"{' and '.join(modified)} in {folder} differ from the installed sam_split, and whoever loads the "
            f"repository runs them. If another version of sam-split wrote the folder, {again}; "
            "if the change is meant, pass --allow-modified-code"
        )
    paths = ["config.json", *code, *_weight_paths(folder)]
    processors = [name for name in ("preprocessor_config.json", "processor_config.json") if (folder / name).is_file()]
    if not processors:
        raise PushRefused(
            f"{folder} holds no preprocessor_config.json; save the base's there: "
            f"AutoProcessor.from_pretrained(BASE).save_pretrained({str(folder)!r})"
        )
    return paths + processors


def _weight_paths(folder: Path) -> list[str]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise PushRefused(
            f"{folder} holds both {single.name} and {index.name}: keep one, the loader cannot know which is meant"
        )
    if single.is_file():
        return [single.name]
    if not index.is_file():
        pickles = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pth")))
        found = f" ({pickles} is a pickle and is never published)" if pickles else ""
        raise PushRefused(f"{folder} holds no model.safetensors{found}; `sam-split convert {folder} OUT` writes one")
    weight_map = read_json(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise PushRefused(f"{index} has no weight_map, which names the shard of each tensor; save the model again")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if not SHARD.fullmatch(shard) or not (folder / shard).is_file():
            raise PushRefused(f"{index} names the shard {shard!r}, which is not in the folder")
    return [index.name, *shards]


def _adapter_paths(folder: Path) -> list[str]:
    if not (folder / "adapter_model.safetensors").is_file():
        raise PushRefused(
            f"{folder} holds no adapter_model.safetensors; save the adapter with safe_serialization=True"
        )
    if (folder / "config.json").is_file():
        raise PushRefused(f"{folder} holds an adapter and a model; publish each from a folder of its own")
    return list(ADAPTER_FILES)


def _published_config(folder: Path) -> dict:
    """The config without this machine's paths, and with an auto_map that points into this repository alone."""
    from sam_split.configuration_sam_split import AUTO_MAP

    config = model_config(folder)
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        part.pop("_name_or_path", None)
    return {**config, "auto_map": AUTO_MAP}


def _published_card(folder: Path, target: Path, repo_id: str, base: Base | None) -> str:
    readme = folder / "README.md"
    try:
        text = readme.read_text(encoding="utf-8-sig") if readme.is_file() else ""
    except UnicodeDecodeError:
        raise PushRefused(f"{readme} is not UTF-8; save it in that encoding") from None
    trained = any((folder / name).is_file() for name in ("training_args.bin", "trainer_state.json"))
    change: Change = "finetune" if trained else "unknown"
    if _is_blank(text):
        source, revision = (base.repo_id, base.revision) if base else (None, None)
        return str(model_card(target, source=source, revision=revision, change=change, repo_id=repo_id))
    try:
        card = ModelCard(text)
    except Exception as error:  # ValueError, or whatever the YAML parser raises
        raise PushRefused(f"{readme}: its metadata, between the two --- lines, does not parse: {error}") from None
    named = card.data.get("base_model")
    bases = named if isinstance(named, list) else [named or (base.repo_id if base else None)]
    if not is_adapter(folder) and any(name and not hub_id(name) for name in bases):
        raise PushRefused(f"{readme}: base_model is {named!r}, expected a Hub id; correct or remove it")
    wanted = metadata(target, bases[0])
    missing = {key: value for key, value in wanted.items() if card.data.get(key) is None}
    if is_adapter(folder) and named != wanted["base_model"]:
        missing |= {key: value for key, value in wanted.items() if key.startswith("base_model")}
    for key, value in missing.items():
        card.data[key] = value
    text = str(card) if missing else text
    return refreshed(text, target, repo_id, base=bases[0], change=change)


def _is_blank(text: str) -> bool:
    """Whether nobody wrote anything: no card, or the form of PEFT, Trainer and save_pretrained as they leave it."""
    if "Model Card for Model ID" not in text:
        return not text.strip()
    form = ModelCard.from_template(ModelCardData()).text.splitlines()
    generated = re.compile(r"### Framework versions|- PEFT \S+|.*automatically generated\.")
    lines = ModelCard(text, ignore_metadata_errors=True).text.splitlines()
    return all(line in form or generated.fullmatch(line) for line in lines)


def _refuse_tokens(folder: Path, names: list[str]) -> None:
    for name in names:
        if not name.endswith(".safetensors") and TOKEN.search((folder / name).read_bytes().decode("latin-1")):
            raise PushRefused(f"{name} holds what looks like a Hugging Face token; remove it, and revoke the token")


def _link_or_copy(source: Path, target: Path) -> None:
    source = source.resolve()  # files of a Hub cache are links themselves
    if source.suffix != ".safetensors":
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)  # weights are gigabytes
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _rewrite_json(path: Path, content: dict) -> None:
    if read_json(path) != content:
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
