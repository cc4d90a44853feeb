"""The card says what the folder holds: every number is recomputed here; no sentence outlives the weights it is of."""

import hashlib
import re
import shutil

import models
import pytest
import torch
from hub_folders import card_of, edit_json, shard
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import hub_card.card
from conversion.adapters.merge import merge
from conversion.checkpoints import convert
from hub_card.card import REPO_PLACEHOLDER, model_card
from hub_card.folder import weights_digest
from sam_split import CODE_FILES, SamSplitModel

SHA = "0123456789abcdef0123456789abcdef01234567"
METAS = "Original weights: Segment Anything, Meta AI Research"


def test_metadata(folder):
    card = model_card(folder, source="facebook/sam-vit-base", revision=SHA, repo_id="alice/sam")
    assert card.text.startswith("\n# sam\n")
    assert card.text.count('"alice/sam"') == 2
    assert REPO_PLACEHOLDER not in card.text
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "mask-generation", "apache-2.0")
    assert (data.base_model, data.get("base_model_relation")) == ("facebook/sam-vit-base", "finetune")
    assert "segment-anything" in data.tags
    assert f"[`facebook/sam-vit-base`](https://huggingface.co/facebook/sam-vit-base) at revision `{SHA}`" in card.text
    assert str(ModelCard(str(card))) == str(card), "the text survives being read and written"
    assert "$" not in re.sub(r"```.*?```", "", card.text, flags=re.DOTALL), "every field of the template was filled"


def test_the_figures_are_the_folders(folder):
    weights = load_file(folder / "model.safetensors")
    split = [name for name in weights if re.search(r"vision_encoder\.layers\.\d+\.attn\.[qkv]\.", name)]
    card = model_card(folder, source="facebook/sam-vit-base").content
    assert f"{len(split) // 3} tensors became {len(split)}, beside {len(weights) - len(split)} others" in card
    assert f"{len(weights)} tensors, {sum(tensor.numel() for tensor in weights.values()):,} values" in card
    size = models.IMAGE_SIZE
    assert f"fit {size} x {size} pixels; masks leave the decoder at {size // 4} x {size // 4}" in card


def test_the_trainable_parameters_are_those_of_the_example(folder):
    """The card's own call of PEFT is run; so an edit of the example changes the sentence, too."""
    card = model_card(folder, source=None).content
    block = next(block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "get_peft_model" in block)
    namespace = {"model": SamSplitModel.from_pretrained(folder)}
    exec(block, namespace)
    trainable, _ = namespace["adapted"].get_nb_trainable_parameters()
    layers = [name for name, _ in namespace["adapted"].named_modules() if name.endswith(".lora_A.default")]
    assert all("vision_encoder" in name for name in layers)
    assert f"adapts {len(layers)} linear layers, all in the vision encoder: {trainable:,} trainable param" in card
    assert card.count(f"`r={namespace['lora'].r}`") == 1


def test_a_local_source_is_named_without_its_path(folder, tmp_path):
    source = tmp_path / "secret-project" / "sam_vit_b.pth"
    source.mkdir(parents=True)
    card = model_card(folder, source=source)
    assert "`sam_vit_b.pth`" in card.content
    assert "secret-project" not in str(card)
    assert card.data.base_model is None


def test_only_weights_known_to_be_metas_are_called_so(folder, tmp_path, monkeypatch):
    (tmp_path / "sam_vit_b_01ec64.pth").write_bytes(b"other weights under Meta's name")
    (tmp_path / "renamed.pth").write_bytes(b"weights")
    monkeypatch.setattr(hub_card.card, "META_FILES", (hashlib.md5(b"weights").hexdigest(),))
    for source in ("facebook/sam-vit-base", tmp_path / "renamed.pth"):
        card = model_card(folder, source=source)
        assert METAS in card.content
        assert card.data.license == "apache-2.0"
    for source in (None, "alice/sam", tmp_path / "sam_vit_b_01ec64.pth", "conversion/cli/tiny_sam"):
        card = model_card(folder, source=source)
        assert METAS not in card.content
        assert card.data.license is None


def test_the_change_is_one_sentence_about_what_was_done(folder):
    said = {change: model_card(folder, source="a/b", change=change).content for change in ("finetune", "merge")}
    assert "was fine-tuned" in said["finetune"]
    assert "an adapter was merged into" in said["merge"]
    assert "no value changed" not in said["finetune"] + said["merge"]
    resized = model_card(folder, source="a/b", resized_from=1024).content
    assert f"resampled from 1024 x 1024 to {models.IMAGE_SIZE} x {models.IMAGE_SIZE} pixels, no other value" in resized


def test_evidence(folder):
    card = model_card(folder, source="a/b", equal_to="that of the source").content
    assert re.search(
        r"is equal,\nbit for bit, to that of the source \(float32; on the CPU; torch \S+, transformers \S+\)\.\n", card
    )
    assert "Evidence" not in model_card(folder, source="a/b").content


def test_the_code_section_lists_the_files_and_is_renewed_alone(folder, published):
    def rows():
        return [f"| `{name}` | `{hashlib.sha256((folder / name).read_bytes()).hexdigest()}` |" for name in CODE_FILES]

    text = str(model_card(folder, source="a/b")) + "\nWritten by hand.\n"
    assert f"These {len(CODE_FILES)} Python files" in text
    assert all(row in text for row in rows())
    (folder / "README.md").write_text(text)
    with (folder / "modeling_sam_split.py").open("a") as file:
        file.write("\n# changed\n")
    renewed = published(folder)
    assert all(row in renewed for row in rows())
    assert [row in text for row in rows()].count(False) == 1
    assert "**Modified code.**" in renewed
    assert renewed.endswith("\nWritten by hand.\n")
    (folder / "README.md").write_text(renewed)
    assert published(folder) == renewed


# The card after the weights


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    root = tmp_path_factory.mktemp("converted")
    models.stock_model().save_pretrained(root / "stock")
    convert(root / "stock", root / "kept", progress=False)
    convert(root / "stock", root / "resized", image_size=64, progress=False)
    return root


@pytest.fixture
def published(staged):
    """The card of a folder as it would be pushed."""
    return lambda folder: card_of(staged(folder, REPO_PLACEHOLDER, allow_modified_code=True))


def save_again(folder):
    model = SamSplitModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("kind", ["kept", "resized"])
@pytest.mark.parametrize("write", [lambda folder: None, shard, save_again], ids=["as it is", "sharded", "saved again"])
def test_untouched_weights_keep_their_card_byte_for_byte(converted, published, tmp_path, kind, write):
    folder = shutil.copytree(converted / kind, tmp_path / "out")
    write(folder)
    text = published(folder)
    assert text == (folder / "README.md").read_text()
    assert "bit for bit, to " in text


def scale(folder):
    model = SamSplitModel.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(folder)


def halve(folder):
    SamSplitModel.from_pretrained(folder).half().save_pretrained(folder)


def train(folder):
    scale(folder)
    arguments = TrainingArguments(str(folder.parent / "run"), use_cpu=True, report_to=[])
    Trainer(SamSplitModel.from_pretrained(folder), arguments).save_model(str(folder))


@pytest.mark.parametrize("kind", ["kept", "resized"])
@pytest.mark.parametrize("change", [scale, halve, train], ids=lambda change: change.__name__)
def test_other_weights_lose_the_sentence_and_the_evidence(converted, published, tmp_path, kind, change):
    folder = shutil.copytree(converted / kind, tmp_path / "out")
    change(folder)
    text = published(folder)
    for claim in ("value changed", "resampled", "Evidence", "bit for bit", "were cut into"):
        assert claim not in text
    assert ("was fine-tuned" if change is train else "how is not recorded") in text
    assert f"weights {weights_digest(folder)}" in text, "and the digest is that of these weights"
    (folder / "README.md").write_text(text)
    assert published(folder) == text


def test_what_an_author_wrote_stays(converted, published, tmp_path):
    folder = shutil.copytree(converted / "kept", tmp_path / "out")
    readme, added = folder / "README.md", "Trained on 300 nuclei.\n\n| set | IoU |\n|---|---|\n| mine | 0.81 |"
    text = readme.read_text().replace("\n### Evidence", f"\n{added}\n\n### Evidence")
    text = text.replace("## Limits\n", "## Limits\n\n- Not for cats.\n").replace("tags:", "license: mit\ntags:")
    readme.write_text(text)
    assert published(folder) == text, "an edited card of these weights is left alone"
    scale(folder)
    renewed = published(folder)
    assert "no value changed" not in renewed
    assert "bit for bit" not in renewed
    assert added in renewed
    assert "- Not for cats." in renewed
    assert ModelCard(renewed).data.license == "mit"


def test_a_merge_by_the_command_line_is_recorded(converted, saved, published, tmp_path):
    base = shutil.copytree(converted / "kept", tmp_path / "base")
    readme = base / "README.md"
    readme.write_text(readme.read_text().replace("tags:", "base_model: facebook/sam-vit-base\ntags:"))
    merge(base, saved / "adapter", tmp_path / "merged", progress=False)
    text = (tmp_path / "merged" / "README.md").read_text()
    assert "an adapter was merged into `base`" in text
    assert ModelCard(text).data.base_model == "facebook/sam-vit-base", "which the card of the base names"
    assert METAS in text
    assert published(tmp_path / "merged") == text
    scale(tmp_path / "merged")
    assert "was merged into" not in published(tmp_path / "merged")


def test_an_adapter_trained_again(adapter, published):
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="alice/sam")
    text = model_card(adapter, source=None).content
    (adapter / "README.md").write_text(text)
    assert published(adapter) == text
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    edit_json(adapter / "adapter_config.json", lora_alpha=99)
    renewed = published(adapter)
    assert "`lora_alpha=8`" in text
    assert "`lora_alpha=8`" not in renewed
    assert "`lora_alpha=99`" in renewed


def test_the_digest_tells_names_dtypes_shapes_and_values_apart(tmp_path):
    digests = []
    ones = torch.ones(4, 2)
    both = {"q": ones, "v": ones.clone()}
    cases = [{"q": ones}, {"k": ones}, {"q": ones.view(torch.int32)}, {"q": ones.view(2, 4)}, {"q": 2 * ones}, both]
    for case in cases:
        save_file(case, tmp_path / "model.safetensors")
        digests.append(weights_digest(tmp_path))
    assert len(set(digests)) == len(cases)
    save_file({"v": ones}, tmp_path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file({"q": ones}, tmp_path / "model.safetensors")
    assert weights_digest(tmp_path) == digests[-1]
