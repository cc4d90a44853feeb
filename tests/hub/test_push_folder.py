"""What leaves the machine and what does not: the files that belong, as they will stand on the Hub, nothing else."""

import json
import shutil

import pytest
from hub_folders import save_adapter, save_split_model
from huggingface_hub import ModelCard

from hub_card.card import Base
from hub_card.errors import PushRefused
from hub_card.publishable import check_repo_id, stage
from sam_split import CODE_FILES

REPO = "alice/sam"
MODEL = {"config.json", *CODE_FILES, "model.safetensors", "README.md"}
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    save_adapter(save_split_model(root / "model"), root / "adapter")
    return root


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals / "model", tmp_path / "model")


@pytest.fixture
def adapter(originals, tmp_path):
    return shutil.copytree(originals / "adapter", tmp_path / "adapter")


@pytest.fixture
def staged(tmp_path):
    """Stage a folder; the result's files by path."""

    def run(folder, **options):
        target = tmp_path / "staged"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        return stage(folder, target, REPO, **options)

    return run


def paths(staged):
    return {file.path for file in staged.files}


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_exactly_what_belongs(folder, staged):
    got = staged(folder)
    assert paths(got) - {"preprocessor_config.json", "processor_config.json"} == MODEL
    assert {path.name for path in got.folder.iterdir()} == paths(got)
    assert got.left_out == []


SECRETS = [
    ".env",
    "id_rsa",
    "token",
    "optimizer.pt",
    "training_args.bin",
    "pytorch_model.bin",
    "notes.txt",
    "train.py",
]


def test_the_rest_is_left_out_by_name(folder, staged):
    for name in SECRETS:
        (folder / name).write_text("secret")
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "model.safetensors").write_text("x")
    got = staged(folder)
    assert not paths(got) & {*SECRETS, "checkpoint-500"}
    assert got.left_out == sorted([*SECRETS, "checkpoint-500/"])
    assert {path.name for path in got.folder.iterdir()} == paths(got)


@pytest.mark.parametrize("name", ["README.md", "config.json", "modeling_sam_split.py"])
def test_a_token_inside_a_file_that_belongs(folder, staged, name):
    token = "hf_" + "AbCdEfGhIj" * 3
    if name == "config.json":
        edit_json(folder / name, note=token)
    else:
        with (folder / name).open("a") as file:
            file.write(f"\n# {token}\n")
    with pytest.raises(PushRefused, match=name) as refused:
        staged(folder, allow_modified_code=True)
    assert token not in str(refused.value)


def test_this_machines_paths_and_other_repositories_code_do_not_travel(folder, staged):
    theirs = {"AutoModel": "other/repo--modeling_sam_split.SamSplitModel"}
    edit_json(folder / "config.json", _name_or_path="/home/alice/secret-project", auto_map=theirs)
    got = staged(folder)
    config = json.loads((got.folder / "config.json").read_text())
    assert "secret-project" not in json.dumps(config)
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForMaskGeneration"}
    assert not any("--" in target for target in config["auto_map"].values())


def break_model_type(folder):
    edit_json(folder / "config.json", model_type="sam")


def break_config(folder):
    (folder / "config.json").write_text("{")


def two_kinds_of_weights(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')


def shard_missing(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_elsewhere(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../../secrets.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without(name):
    def remove(folder):
        for path in folder.glob(name):
            path.unlink()

    return remove


REFUSED = {
    "no config": (without("config.json"), "config.json"),
    "a fused checkpoint": (break_model_type, "sam-split convert"),
    "not JSON": (break_config, "not JSON"),
    "no code": (without("modeling_sam_split.py"), "modeling_sam_split.py"),
    "no processor": (without("*processor_config.json"), "preprocessor_config.json"),
    "no weights": (without("model.safetensors"), "model.safetensors"),
    "only a pickle": (only_a_pickle, "pytorch_model.bin is a pickle"),
    "weights and index": (two_kinds_of_weights, "both"),
    "a shard is missing": (shard_missing, "model-00001-of-00002"),
    "a shard from elsewhere": (shard_elsewhere, "secrets"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_incomplete_folder_is_refused(folder, staged, case):
    damage, words = REFUSED[case]
    damage(folder)
    with pytest.raises(PushRefused, match=words):
        staged(folder)


def test_no_such_folder(tmp_path, staged):
    with pytest.raises(PushRefused, match="not a folder"):
        staged(tmp_path / "absent")


@pytest.mark.parametrize(
    "repo_id",
    ["", "sam", "a/b/c", "alice/sam split", "alice/-sam", "alice/sam..b", "alice/sam.git", "alice/" + "x" * 97],
)
def test_a_malformed_repository_id(repo_id):
    with pytest.raises(PushRefused, match="repository id"):
        check_repo_id(repo_id)


def test_a_well_formed_repository_id():
    check_repo_id("alice/sam-split_vit.b")


def test_modified_code_needs_consent_and_the_card_says_so(folder, staged):
    with (folder / "modeling_sam_split.py").open("a") as file:
        file.write("\n# changed\n")
    with pytest.raises(PushRefused, match=r"modeling_sam_split\.py.*--allow-modified-code"):
        staged(folder)
    card = (staged(folder, allow_modified_code=True).folder / "README.md").read_text()
    assert "**Modified code.** `modeling_sam_split.py` differs" in card
    assert "byte for byte" not in card


def test_unmodified_code_is_called_so(folder, staged):
    card = (staged(folder).folder / "README.md").read_text()
    assert "byte for byte" in card
    assert "Modified" not in card


def test_a_card_that_somebody_wrote_is_kept_and_completed(folder, staged):
    (folder / "README.md").write_text(
        "---\nlicense: mit\ntags: [mine]\n---\n# My nuclei\n\nFine-tuned on my slides.\n"
    )
    got = staged(folder, base=Base("facebook/sam-vit-base", SHA))
    card = ModelCard((got.folder / "README.md").read_text())
    assert "Fine-tuned on my slides." in card.content
    assert card.data.license == "mit"
    assert card.data.tags == ["mine"]
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "mask-generation"
    assert card.data.base_model == "facebook/sam-vit-base"
    assert "What `trust_remote_code=True` runs" in card.content


def test_staging_twice_gives_the_same_bytes(folder, staged):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# My nuclei\n")
    first = {file.path: file.sha256 for file in staged(folder).files}
    assert {file.path: file.sha256 for file in staged(folder).files} == first


@pytest.mark.parametrize("text", ["---\n- a\n---\n# List\n", "---\na: [\n---\n# Broken\n"])
def test_metadata_that_is_not_a_mapping(folder, staged, text):
    (folder / "README.md").write_text(text)
    with pytest.raises(PushRefused, match="metadata"):
        staged(folder)


def test_a_base_that_is_a_path_on_this_machine(folder, staged):
    (folder / "README.md").write_text("---\nbase_model: /home/alice/sam\n---\n# Mine\n")
    with pytest.raises(PushRefused, match="base_model"):
        staged(folder)


# Adapters


def test_an_adapter(adapter, staged):
    got = staged(adapter, base=Base("alice/sam", SHA))
    assert paths(got) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    config = json.loads((got.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "alice/sam"
    assert config["revision"] == SHA
    assert config["auto_mapping"] is None
    card = ModelCard((got.folder / "README.md").read_text())
    assert card.data.base_model == "alice/sam"
    assert card.data.base_model_relation == "adapter"
    assert card.data.library_name == "peft"
    assert SHA in card.content
    assert "More Information Needed" not in card.content


def test_an_adapter_whose_base_is_a_path(adapter, staged):
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="/home/alice/base")
    with pytest.raises(PushRefused, match="--base-model"):
        staged(adapter)


def test_an_adapter_and_a_model_in_one_folder(adapter, staged):
    (adapter / "config.json").write_text("{}")
    with pytest.raises(PushRefused, match="folder of its own"):
        staged(adapter, base=Base("alice/sam", SHA))


def test_a_pickled_adapter(adapter, staged):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(PushRefused, match="safe_serialization"):
        staged(adapter, base=Base("alice/sam", SHA))
