"""The card says what the folder holds: every number in it is recomputed here, and nothing of this machine is in it."""

import hashlib
import json
import re
import shutil

import pytest
from hub_folders import save_adapter, save_split_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hub_card.card import REPO_PLACEHOLDER, Evidence, model_card, refresh_code_section
from sam_split import CODE_FILES

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    save_adapter(save_split_model(root / "model"), root / "adapter", modules_to_save=["mask_decoder"])
    config = json.loads((root / "adapter" / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "alice/sam", "revision": SHA}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return root


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original / "model", tmp_path / "model")


def test_metadata(folder):
    data = model_card(folder, source="facebook/sam-vit-base", revision=SHA).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "mask-generation"
    assert data.license == "apache-2.0"
    assert data.base_model == "facebook/sam-vit-base"
    assert data.get("base_model_relation") == "finetune"
    assert "segment-anything" in data.tags


def test_the_text_survives_being_read_and_written(folder):
    text = str(model_card(folder, source="facebook/sam-vit-base"))
    assert str(ModelCard(text)) == text
    assert "$" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL), "every field of the template was filled"


def test_the_tensor_count_is_the_folders(folder):
    weights = load_file(folder / "model.safetensors")
    split = [name for name in weights if re.search(r"vision_encoder\.layers\.\d+\.attn\.[qkv]\.", name)]
    card = model_card(folder, source="facebook/sam-vit-base").content
    assert f"{len(split) // 3} tensors became {len(split)}, beside {len(weights) - len(split)} others" in card
    assert f"{len(weights)} tensors, {sum(tensor.numel() for tensor in weights.values()):,} values" in card


def test_the_code_files_with_their_sha256(folder):
    card = model_card(folder, source=None).content
    for name in CODE_FILES:
        assert f"| `{name}` | `{hashlib.sha256((folder / name).read_bytes()).hexdigest()}` |" in card


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_local_source_is_named_without_its_path(folder, tmp_path, kind):
    source = tmp_path / "secret-project" / "sam_vit_b.pth"
    source.parent.mkdir()
    source.mkdir() if kind == "folder" else source.write_bytes(b"")
    card = model_card(folder, source=source)
    assert "`sam_vit_b.pth`" in card.content
    assert "secret-project" not in str(card)
    assert card.data.base_model is None


def test_the_change_is_one_sentence_about_what_was_done(folder):
    sentences = {
        change: model_card(folder, source="a/b", change=change).content for change in ("split", "finetune", "merge")
    }
    assert "were cut into `q`, `k` and `v`" in sentences["split"]
    assert "no value changed" in sentences["split"]
    assert "fine-tuned" in sentences["finetune"]
    assert "merged" in sentences["merge"]
    assert "no value changed" not in sentences["finetune"] + sentences["merge"]


def test_resampled_tables_are_not_called_unchanged(folder):
    card = model_card(folder, source="a/b", resized_from=1024).content
    assert "resampled from 1024 x 1024 to 96 x 96 pixels" in card
    assert "; no value changed" not in card


def test_evidence(folder):
    rows = [
        Evidence("masks of one click, against transformers' SamModel", 2.5e-7, "float32", "cpu", {"torch": "9.9"}),
        Evidence("weights, against the source", 0.0, "float32", "cpu"),
    ]
    card = model_card(folder, source="a/b", evidence=rows).content
    assert "| masks of one click, against transformers' SamModel | 2.5e-07 | float32 | cpu | torch 9.9 |" in card
    assert re.search(r"\| weights, against the source \| 0 \| float32 \| cpu \| torch \S+, transformers \S+ \|", card)


def test_no_evidence_no_claim(folder):
    assert "Evidence" not in model_card(folder, source="a/b").content


def test_the_code_section_is_renewed_and_the_rest_is_left_alone(folder):
    text = str(model_card(folder, source="a/b")) + "\nWritten by hand.\n"
    before = hashlib.sha256((folder / "modeling_sam_split.py").read_bytes()).hexdigest()
    with (folder / "modeling_sam_split.py").open("a") as file:
        file.write("\n# changed\n")
    renewed = refresh_code_section(text, folder, "alice/sam")
    assert before in text
    assert before not in renewed
    assert "**Modified code.**" in renewed
    assert renewed.endswith("\nWritten by hand.\n")
    assert refresh_code_section(renewed, folder, "alice/sam") == renewed


def test_the_placeholder_gives_way_to_the_repository(folder):
    assert model_card(folder, source="a/b").content.count(REPO_PLACEHOLDER) == 2
    card = model_card(folder, source="a/b", repo_id="alice/sam").content
    assert REPO_PLACEHOLDER not in card
    assert card.count('"alice/sam"') == 2


def test_a_folder_that_is_not_a_split_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "sam"}))
    with pytest.raises(ValueError, match="sam_split"):
        model_card(folder, source=None)


def test_weights_cut_short(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        model_card(folder, source=None)


def test_an_adapter(original):
    card = model_card(original / "adapter", source=None)
    assert (card.data.base_model, card.data.get("base_model_relation")) == ("alice/sam", "adapter")
    assert card.data.library_name == "peft"
    weights = load_file(original / "adapter" / "adapter_model.safetensors")
    assert f"{len(weights)} tensors ({sum(tensor.numel() for tensor in weights.values()):,} values)" in card.content
    assert f'AutoModel.from_pretrained("alice/sam", revision="{SHA}"' in card.content
    for setting in ('`target_modules=["q", "v"]`', "`r=4`", '`modules_to_save=["mask_decoder"]`'):
        assert setting in card.content


def test_an_adapter_whose_base_is_a_path(original, tmp_path):
    folder = shutil.copytree(original / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/home/alice/sam"}))
    with pytest.raises(ValueError, match="Hub id"):
        model_card(folder, source=None)
