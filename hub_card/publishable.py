"""Which files of a folder belong on the Hub, and the copy of them that is pushed.

What is not listed here does not leave the machine: training states, `.env` files, pickles and notes are left out, by
name.
"""

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd
from huggingface_hub.utils import HFValidationError, validate_repo_id
from tqdm import tqdm

from .errors import TOKEN, PushRefused
from .folder import Base, code_files, is_adapter, model_config, modified_code, read_base, read_json
from .onnx_card import published_onnx_card
from .onnx_folder import GRAPH, export_paths, is_export
from .standing_card import published_card

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
WEIGHTS = (".safetensors", ".onnx", ".onnx_data")  # how files of gigabytes end
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
CODE = re.compile(r"\w+_sam_split\.py")


@dataclass(frozen=True)
class Kind:
    """A kind of folder. `ours` matches what a push of one writes, `foreign` what only the others hold."""

    name: str
    ours: re.Pattern
    foreign: re.Pattern


_OURS = f"{'|'.join(map(re.escape, MODEL_FILES))}|{SHARD.pattern}|{CODE.pattern}"
MODEL = Kind("model", re.compile(_OURS), re.compile(r"adapter_config\.json|onnx/mask_prompt_encoder\w*\.onnx"))
ADAPTER = Kind("adapter", re.compile("|".join(map(re.escape, ADAPTER_FILES))), re.compile(r"config\.json"))
EXPORT = Kind("ONNX graphs", GRAPH, re.compile(rf"adapter_config\.json|model\.safetensors.*|{CODE.pattern}"))
SPACE = dataclasses.replace(EXPORT, name="page")


@dataclass(frozen=True)
class Staged:
    """A folder made ready: `files` is everything that will be pushed, `left_out` what stays here."""

    folder: Path
    files: list[CommitOperationAdd]
    left_out: list[str]
    kind: Kind
    base: Base | None  # of an adapter

    def is_stale(self, path: str) -> bool:
        """Whether a file on the Hub is one that an earlier push of ours left and this one does not bring."""
        return bool(self.kind.ours.fullmatch(path)) and path not in {file.path_in_repo for file in self.files}


def what(path: str) -> str:
    """What a file that is pushed is for."""
    known = {**MODEL_FILES, **ADAPTER_FILES, "README.md": "model card", "LICENSE": "licence"}
    if CODE.fullmatch(path):
        return "code that trust_remote_code runs"
    return known.get(path, "weights" if SHARD.fullmatch(path) else "graph" if GRAPH.fullmatch(path) else "page")


def check_repo_id(repo_id: str) -> None:
    """Raises PushRefused unless `repo_id` is `name/repository` in the Hub's alphabet."""
    if repo_id.count("/") != 1:
        raise PushRefused(f"{repo_id!r} is not a repository id; expected 'name/repository', both parts")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushRefused(f"{repo_id!r} is not a repository id: {error}") from None


def stage(
    folder: str | Path,
    target: str | Path,
    repo_id: str,
    *,
    allow_modified_code: bool = False,
    base: Base | None = None,
    space: bool = False,
    demo: str | None = None,
) -> Staged:
    """Copy what belongs into `target` (an empty folder), with the card and the configs as they will be published.

    Args:
        base: of an adapter, its Hub id and commit; of a model, what it was made from if its card does not say.
        space: whether for a Space that shows an exported model.
        demo: id of the Space that the card of a model or an adapter links to.

    Raises:
        PushRefused: if the folder is incomplete, ambiguous, not a split model, or holds a token.
    """
    folder, target = Path(folder), Path(target)
    kind = kind_of(folder, space)
    if (base or demo) and kind in (EXPORT, SPACE):
        raise PushRefused(f"{folder} was exported, and its card names its base; leave out --base-model and --demo")
    try:
        if kind is ADAPTER:
            paths = _adapter_paths(folder)
        elif kind is MODEL:
            paths = _model_paths(folder, allow_modified_code)
        else:
            paths = export_paths(folder, space)
        paths += [name for name in ("README.md", "LICENSE") if (folder / name).is_file() and name not in paths]
        for path in paths:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(folder / path, target / path)
        if kind is ADAPTER:
            theirs, config = read_base(folder, base), read_json(folder / "adapter_config.json")
            # auto_mapping holds the name and hash of a local module, true on this machine only.
            named = {"base_model_name_or_path": theirs.repo_id, "revision": theirs.revision, "auto_mapping": None}
            _write_json(target / "adapter_config.json", {**config, **named})
        elif kind is MODEL:
            _write_json(target / "config.json", _published_config(folder))
        if kind in (EXPORT, SPACE):
            card = published_onnx_card(target, repo_id, space)
        else:
            trained = any((folder / name).is_file() for name in ("training_args.bin", "trainer_state.json"))
            card = published_card(target, repo_id, base, "finetune" if trained else "unknown", demo)
    except ValueError as error:
        raise PushRefused(str(error).replace(str(target), str(folder))) from None
    (target / "README.md").write_text(card, encoding="utf-8", newline="\n")
    names = sorted({*paths, "README.md"})
    _refuse_tokens(target, names)
    files = [CommitOperationAdd(name, target / name) for name in tqdm(names, desc="Hashing", unit="file")]
    return Staged(target, files, _left_out(folder, names), kind, read_base(target) if kind is ADAPTER else None)


def kind_of(folder: str | Path, space: bool = False) -> Kind:
    """What a folder is, by the files that tell.

    Raises:
        PushRefused: if it is none, or not what a Space shows.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PushRefused(f"{folder} is not a folder; give the one that `sam-split convert` or save_pretrained wrote")
    if is_adapter(folder):
        kind = ADAPTER
    elif is_export(folder):
        kind = SPACE if space else EXPORT
    elif is_adapter(folder / "adapter") and not (folder / "config.json").is_file():
        raise PushRefused(f"{folder} is a run of `sam-split finetune`; push its adapter, {folder / 'adapter'}")
    else:
        kind = MODEL
    if space and kind is not SPACE:
        raise PushRefused(f"{folder} is no page; a Space shows what `sam-split export MODEL OUT --page` writes")
    return kind


def _left_out(folder: Path, names: list[str]) -> list[str]:
    """What lies beside the files `names`, in the same folders."""
    published = {folder / name for name in names}
    parents = {parent for path in published for parent in path.parents if parent.is_relative_to(folder)}
    found = {path for parent in parents for path in parent.iterdir()} - published - parents
    return sorted(path.relative_to(folder).as_posix() + "/" * path.is_dir() for path in found)


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


def _refuse_tokens(folder: Path, names: list[str]) -> None:
    for name in names:
        if not name.endswith(WEIGHTS) and TOKEN.search((folder / name).read_bytes().decode("latin-1")):
            raise PushRefused(f"{name} holds what looks like a Hugging Face token; remove it, and revoke the token")


def _link_or_copy(source: Path, target: Path) -> None:
    source = source.resolve()  # files of a Hub cache are links themselves
    try:
        (os.link if source.name.endswith(WEIGHTS) else shutil.copyfile)(source, target)  # weights are gigabytes
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
