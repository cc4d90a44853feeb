"""What leaves the machine and what does not: the files that belong, as they will stand on the Hub, nothing else."""

import json
import shutil

import pytest
from hub_folders import card_of, edit_json, shard
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file

import sam_split
from hub_card.errors import PushRefused
from hub_card.folder import Base
from sam_split import CODE_FILES

MODEL = {"config.json", *CODE_FILES, "model.safetensors", "README.md"}
SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "AbCdEfGhIj" * 3


def paths(staged):
    return {file.path_in_repo for file in staged.files}


STRAY = {
    *(".env", "id_rsa", "token", "notes.txt", "train.py"),
    *("optimizer.pt", "training_args.bin", "trainer_state.json", "pytorch_model.bin", "model.safetensors.bak"),
}


def test_exactly_what_belongs_and_the_rest_is_left_out_by_name(folder, staged):
    for name in STRAY:
        (folder / name).write_text("secret")
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "model.safetensors").write_text("x")
    got = staged(folder)
    assert paths(got) - {"preprocessor_config.json", "processor_config.json"} == MODEL
    assert got.left_out == sorted([*STRAY, "checkpoint-500/"])
    assert {path.name for path in got.folder.iterdir()} == paths(got)
    assert "byte for byte" in card_of(got)
    assert "Modified" not in card_of(got)


def test_only_the_shards_of_the_index(folder, staged):
    shard(folder)
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"of an earlier save")
    got = staged(folder)
    assert {path for path in paths(got) if "-of-" in path} == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert got.left_out == ["model-00003-of-00003.safetensors"]


@pytest.mark.parametrize("name", ["README.md", "config.json", "modeling_sam_split.py"])
def test_a_token_inside_a_file_that_belongs(folder, staged, name):
    if name == "config.json":
        edit_json(folder / name, note=TOKEN)
    else:
        with (folder / name).open("a") as file:
            file.write(f"\n# {TOKEN}\n")
    with pytest.raises(PushRefused, match=name) as refused:
        staged(folder, allow_modified_code=True)
    assert TOKEN not in str(refused.value)


def test_this_machines_paths_and_other_repositories_code_do_not_travel(folder, staged):
    theirs = {"AutoModel": "other/repo--modeling_sam_split.SamSplitModel"}
    edit_json(folder / "config.json", _name_or_path="/home/alice/secret-project", auto_map=theirs)
    got = staged(folder)
    config = json.loads((got.folder / "config.json").read_text())
    assert "secret-project" not in json.dumps(config)
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForMaskGeneration"}
    assert not any("--" in target for target in config["auto_map"].values())


def without(name):
    return lambda folder: [path.unlink() for path in folder.glob(name)]


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def index(text):
    return lambda folder: (
        (folder / "model.safetensors").rename(folder / "model.safetensors.index.json").write_text(text)
    )


REFUSED = {
    "no folder": (shutil.rmtree, "not a folder"),
    "no config": (without("config.json"), "config.json"),
    "a fused checkpoint": (lambda folder: edit_json(folder / "config.json", model_type="sam"), "sam-split convert"),
    "not JSON": (write("config.json", "{"), "not JSON"),
    "not an object": (write("config.json", "[]"), "JSON object"),
    "no code": (without("modeling_sam_split.py"), "modeling_sam_split.py"),
    "no processor": (without("*processor_config.json"), "preprocessor_config.json"),
    "no weights": (without("model.safetensors"), "model.safetensors"),
    "only a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle",
    ),
    "weights and index": (write("model.safetensors.index.json", '{"weight_map": {}}'), "both"),
    "no weight map": (index("{}"), "no weight_map"),
    "a shard is missing": (index('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'), "model-00001-of-00002"),
    "a shard from elsewhere": (index('{"weight_map": {"a": "../../secrets.safetensors"}}'), "secrets"),
    "a shard without a name": (index('{"weight_map": {"a": null}}'), "None"),
    "metadata is a list": (write("README.md", "---\n- a\n---\n# List\n"), "metadata"),
    "metadata is broken": (write("README.md", "---\na: [\n---\n# Broken\n"), "metadata"),
    "a base on this machine": (write("README.md", "---\nbase_model: /home/alice/sam\n---\n# Mine\n"), "base_model"),
    "not UTF-8": (lambda folder: (folder / "README.md").write_bytes(b"\xff\xfe#"), "UTF-8"),
    "weights cut short": (write("model.safetensors", "x"), "damaged"),
    "adapter: a base on this machine": (lambda folder: None, "--base-model"),
    "adapter: a model as well": (write("config.json", "{}"), "folder of its own"),
    "adapter: a pickle": (without("adapter_model.safetensors"), "safe_serialization"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unfit_folder_is_refused(folder, adapter, staged, case):
    damage, words = REFUSED[case]
    unfit = adapter if case.startswith("adapter") else folder
    damage(unfit)
    with pytest.raises(PushRefused, match=words):
        staged(unfit)


# Code


@pytest.mark.parametrize(
    ("difference", "name"),
    [("edited", "modeling_sam_split.py"), ("older", "__init__.py"), ("newer", "layers_sam_split.py")],
)
def test_other_code_than_the_packages_needs_consent_and_the_card_says_so(
    folder, staged, monkeypatch, difference, name
):
    """An edit, a folder that lacks a code file of this version, and one with a code file more."""
    if difference == "older":
        monkeypatch.setattr(sam_split, "CODE_FILES", (*CODE_FILES, name))
    else:
        with (folder / name).open("a") as file:
            file.write("\n# changed\n")
    with pytest.raises(PushRefused, match=rf"{name}.*save it again.*--allow-modified-code"):
        staged(folder)
    got = staged(folder, allow_modified_code=True)
    assert f"**Modified code.** Not those of sam-split {sam_split.__version__}: `{name}`;" in card_of(got)
    assert "byte for byte" not in card_of(got)
    assert (name in paths(got)) == (difference != "older")


# The card


@pytest.mark.parametrize(
    "text",
    [
        "# My nuclei\n",
        "\ufeff# My nuclei\r\n",
        "---\nlicense: mit\ntags: [mine]\n---\n# My nuclei\n",
        "---\nbase_model:\n- a/b\n- c/d\n---\n# My nuclei\n",
    ],
)
def test_a_card_that_somebody_wrote_is_kept_and_completed(folder, staged, text):
    (folder / "README.md").write_text(text, encoding="utf-8", newline="")
    base = Base("facebook/sam-vit-base", SHA) if "mit" in text else None
    got = staged(folder, base=base)
    card = ModelCard(card_of(got))
    assert card.text.lstrip().startswith("# My nuclei")
    assert "What `trust_remote_code=True` runs" in card.content
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "mask-generation")
    assert card.data.license == ("mit" if base else None), "a licence is not ours to choose"
    assert (card.data.tags == ["mine"]) == bool(base)
    assert card.data.base_model == (base.repo_id if base else ["a/b", "c/d"] if "a/b" in text else None)
    first = {file.path_in_repo: file.upload_info.sha256 for file in got.files}
    assert {file.path_in_repo: file.upload_info.sha256 for file in staged(folder, base=base).files} == first


def form(text="") -> str:
    """What transformers and PEFT leave for people to fill in."""
    card = ModelCard.from_template(ModelCardData(library_name="transformers")).text
    return f"---\nlibrary_name: transformers\n---\n{card}\n### Framework versions\n\n- PEFT 0.18.0\n{text}"


def test_a_form_that_nobody_filled_in_gives_way(folder, staged):
    (folder / "README.md").write_text(form())
    assert "More Information Needed" not in card_of(staged(folder))
    (folder / "README.md").write_text(form("\nTrained on my slides.\n"))
    assert "Trained on my slides." in card_of(staged(folder))


@pytest.mark.parametrize("trained", [True, False])
def test_only_what_is_known_is_said_of_a_folder_without_a_card(folder, staged, trained):
    if trained:
        (folder / "training_args.bin").write_bytes(b"")
    card = card_of(staged(folder, base=Base("alice/base", SHA)))
    assert ("was fine-tuned" if trained else "how is not recorded") in card
    assert f"[`alice/base`](https://huggingface.co/alice/base) at revision `{SHA}`" in card
    assert "Meta AI" not in card


# Adapters


def test_an_adapter(adapter, staged):
    got = staged(adapter, base=Base("alice/sam", SHA))
    assert paths(got) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    config = json.loads((got.folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("alice/sam", SHA)
    assert config["auto_mapping"] is None
    card = ModelCard(card_of(got))
    assert (card.data.base_model, card.data.get("base_model_relation")) == ("alice/sam", "adapter")
    assert (card.data.library_name, card.data.license) == ("peft", None)
    weights = load_file(adapter / "adapter_model.safetensors")
    assert f"{len(weights)} tensors ({sum(tensor.numel() for tensor in weights.values()):,} values)" in card.content
    assert f'AutoModel.from_pretrained("alice/sam", revision="{SHA}"' in card.content
    for setting in (f"`target_modules={json.dumps(config['target_modules'])}`", "`r=4`", '=["iou_prediction_head"]`'):
        assert setting in card.content
    assert "More Information Needed" not in card.content, "the form that PEFT wrote is gone"
