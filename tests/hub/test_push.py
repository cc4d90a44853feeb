"""`sam-split push`: what it prints, what it leaves on the Hub, and that a stranger can load all that is sent."""

import json
import re
import shutil
import subprocess
import sys

import models
import pytest
import torch
from hub_folders import edit_json, shard
from hub_server import TOKEN
from safetensors.torch import load_file, save_file

from hub_card.fresh_load import check

REPO = "alice/sam"


def test_one_commit_every_file_and_the_line_to_paste(hub, push, folder):
    (folder / ".env").write_text("SECRET=1")
    outcome = push(folder, REPO, "--message", "First weights", "--private")
    assert hub.repositories[REPO].private
    assert [commit.title for commit in hub.repositories[REPO].commits.values()] == ["initial commit", "First weights"]
    for path, data in hub.files(REPO).items():
        if path != ".gitattributes":
            row = next(line for line in outcome.out.splitlines() if line.split()[:1] == [path])
            assert f"{len(data):,} bytes" in row
    assert "Left out: .env" in outcome.out
    assert f"{hub.url}/{REPO}/commit/{hub.head(REPO)}" in outcome.out
    assert f'AutoModel.from_pretrained("{REPO}", revision="{hub.head(REPO)}"' in outcome.out
    assert "Hashing" in outcome.err


def test_a_second_run_has_nothing_to_do_and_a_third_sends_what_changed(hub, push, folder):
    push(folder, REPO)
    before = hub.head(REPO)
    hub.requests.clear()
    outcome = push(folder, REPO)
    assert "Nothing to do" in outcome.out
    assert hub.head(REPO) == before
    assert before in outcome.out
    assert {seen.method for seen in hub.requests} == {"GET"}
    assert not hub.repositories[REPO].private
    edit_json(folder / "config.json", note="second")
    push(folder, REPO)
    [commit] = [seen for seen in hub.requests if "/commit/" in seen.path]
    assert [line["value"]["path"] for line in commit.lines()[1:]] == ["config.json"]


def test_stale_files_go_in_the_same_commit_and_others_stay(hub, push, folder):
    single = (folder / "model.safetensors").read_bytes()
    shard(folder)
    push(folder, REPO)
    assert "model-00002-of-00002.safetensors" in hub.files(REPO)
    theirs = {"modeling_theirs.py": b"1", "images/a.txt": b"2", "LICENSE": b"4"}
    hub.commit(REPO, {"layers_sam_split.py": b"0", **theirs})
    before = hub.head(REPO)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    (folder / "model.safetensors").write_bytes(single)
    outcome = push(folder, REPO)
    files = hub.files(REPO).keys()
    assert not {path for path in files if "-of-" in path or "index" in path or path == "layers_sam_split.py"}
    assert {"model.safetensors", *theirs} <= files
    assert hub.repositories[REPO].commits[hub.head(REPO)].parent == before
    assert "delete model-00001-of-00002.safetensors" in outcome.out


@pytest.mark.parametrize("exists", [True, False])
def test_a_branch_is_made_and_main_stays(hub, push, folder, exists):
    if exists:
        hub.create(REPO, {"a.txt": b"1"})
    outcome = push(folder, REPO, "--branch", "fine/tuned")
    assert "model.safetensors" not in hub.files(REPO)
    assert "model.safetensors" in hub.files(REPO, "fine/tuned")
    assert hub.head(REPO, "fine/tuned") in outcome.out


def test_a_pull_request_and_then_nothing_to_do(hub, push, folder):
    hub.create(REPO, {"a.txt": b"1"})
    before = hub.head(REPO)
    assert f"Pull request: {hub.url}/{REPO}/discussions/1" in push(folder, REPO, "--create-pr").out
    assert hub.head(REPO) == before
    assert "model.safetensors" in hub.files(REPO, "refs/pr/1")
    assert "Nothing to do" in push(folder, REPO, "--create-pr").out
    assert hub.repositories[REPO].pull_requests == {"refs/pr/1": "open"}
    hub.repositories[REPO].pull_requests["refs/pr/1"] = "closed"
    push(folder, REPO, "--create-pr")
    assert len(hub.repositories[REPO].pull_requests) == 2, "a closed one brings nothing"


@pytest.mark.parametrize("exists", [True, False])
def test_a_dry_run_needs_no_token_and_writes_nothing(hub, push, folder, exists):
    if exists:
        hub.create(REPO, {"old_sam_split.py": b"1"})
    assert "hf auth login" in push(folder, REPO, HF_TOKEN="", code=2).err
    assert not hub.requests
    outcome = push(folder, REPO, "--dry-run", HF_TOKEN="")
    assert "Dry run" in outcome.out
    assert {seen.method for seen in hub.requests} == {"GET"}
    assert ("delete old_sam_split.py" in outcome.out) == exists
    assert ("write  model.safetensors" in outcome.out) == exists


def test_an_adapter_does_not_go_on_top_of_its_model(hub, push, folder, adapter):
    push(folder, REPO)
    assert "repository of its own" in push(adapter, REPO, "--base-model", REPO, code=2).err
    assert "adapter_config.json" not in hub.files(REPO)
    push(adapter, "alice/lora", "--base-model", REPO)


BAD_INPUT = {
    "absent is not a folder": ("push", "absent", REPO),
    "is a run of `sam-split finetune`; push its adapter": ("push", "run", REPO),
    "'not a repo' is not a repository id": ("push", "model", "not a repo"),
    "expected 'name/repository'": ("push", "model", "sam"),
    "'a/b/c' is not a repository id": ("push", "model", "a/b/c"),
    "give its id with --base-model": ("push", "model", REPO, "--base-revision", "abc"),
    "adapter_config.json is not JSON": ("push", "damaged", REPO),
    "alice/absent (revision main) is not on the Hub": ("push", "adapter", REPO, "--base-model", "alice/absent"),
    "'x' is not a repository id; expected 'name/repo": ("convert", "model", "out", "--push-to-hub", "x"),
    "give its id with --push-to-hub": ("convert", "model", "out", "--private"),
}


@pytest.mark.parametrize("words", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(hub, sam_split, folder, adapter, tmp_path, monkeypatch, words):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "adapter_config.json").write_text("{")
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    monkeypatch.chdir(tmp_path)
    outcome = sam_split(*BAD_INPUT[words], code=2)
    assert outcome.err.count("\n") == 1
    assert words in outcome.err
    assert not hub.repositories
    assert not (tmp_path / "out").exists()


def test_convert_and_push(hub, sam_split, tmp_path):
    models.stock_model().save_pretrained(tmp_path / "sam-vit-tiny")
    sam_split("convert", tmp_path / "sam-vit-tiny", tmp_path / "out", "--push-to-hub", REPO, "--private")
    assert hub.repositories[REPO].private
    assert hub.files(REPO)["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    card = hub.files(REPO)["README.md"].decode()
    assert f'repo = "{REPO}"' in card
    assert "your-name" not in card
    assert "`sam-vit-tiny`" in card
    assert str(tmp_path) not in card
    assert {"LICENSE", "preprocessor_config.json"} <= hub.files(REPO).keys()


# The load in a fresh interpreter


ONES, NAN = torch.ones(2), torch.tensor([1.0, torch.nan])


@pytest.mark.parametrize(
    ("loaded", "stored", "words"),
    [
        ({}, ONES, "q is not both in the weight files and in the model"),
        ({"q": ONES, "k": ONES}, ONES, "k is not both in the weight files and in the model"),
        ({"q": torch.ones(2, 1)}, ONES, r"q changes on loading: .*\[2, 1\]\) != torch.Size\(\[2\]\)"),
        ({"q": ONES.half()}, ONES, "q changes on loading: .*torch.float16 != torch.float32"),
        ({"q": torch.tensor([1.0, 1.0000001])}, ONES, "q changes on loading: .*1 / 2"),
        ({"q": NAN}, NAN, "q holds values that are not finite"),
    ],
)
def test_each_tensor_is_compared_with_the_weight_file(tmp_path, loaded, stored, words):
    save_file({"q": stored}, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match=words):
        check(loaded, [tmp_path / "model.safetensors"])


@pytest.mark.slow
def test_the_folders_code_sees_neither_the_package_nor_the_token(hub, push, folder, monkeypatch, tmp_path):
    (tmp_path / "token").write_text(TOKEN)  # as `hf auth login` stores it
    started, start = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *call, **options: started.append(call[0]) or start(*call, **options))
    with (folder / "configuration_sam_split.py").open("a") as file:
        file.write("\nimport sys, huggingface_hub\nassert huggingface_hub.get_token() is None\n")
        file.write("assert sys.modules['sam_split'] is None\n")
    outcome = push(folder, REPO, "--allow-modified-code", load=True, HF_HOME=str(tmp_path))
    assert "182 tensors, each equal to the one in" in outcome.out
    [command] = started
    assert command[0] == sys.executable
    assert TOKEN not in command, "or `ps` would show it"


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["import of sam_split halted", "size mismatch"])
def test_a_folder_that_does_not_load_is_refused(hub, push, folder, adapter, reason):
    """A model whose code needs the package; an adapter for a base of another shape."""
    if "sam_split" in reason:
        code = (folder / "modeling_sam_split.py").read_text()
        (folder / "modeling_sam_split.py").write_text("import sam_split\n" + code)
        outcome = push(folder, "alice/new", "--allow-modified-code", load=True, code=2)
    else:
        push(folder, REPO)
        weights = load_file(adapter / "adapter_model.safetensors")
        wider = {key: tensor.repeat(1, 2) if "lora_A" in key else tensor for key, tensor in weights.items()}
        save_file(wider, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        outcome = push(adapter, "alice/new", "--base-model", REPO, load=True, code=2)
    assert re.search(f"does not load in a fresh process: .*{reason}", outcome.err)
    assert "alice/new" not in hub.repositories


@pytest.mark.slow
def test_an_adapter_names_its_base_and_is_tried_on_it(hub, push, folder, adapter):
    push(folder, REPO)
    base = hub.head(REPO)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=REPO)
    outcome = push(adapter, "alice/lora", load=True)
    published = json.loads(hub.files("alice/lora")["adapter_config.json"])
    assert (published["base_model_name_or_path"], published["revision"]) == (REPO, base)
    assert base in hub.files("alice/lora")["README.md"].decode()
    assert f'PeftModel.from_pretrained(base, "alice/lora", revision="{hub.head("alice/lora")}")' in outcome.out
    assert "Nothing to do" in push(adapter, "alice/lora").out
