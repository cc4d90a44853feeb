"""`sam-split push`: what it prints, what it leaves on the Hub, and that a stranger can load all that is sent."""

import json
import subprocess
import sys
import time
from pathlib import Path

import models
import pytest
import torch
from hub_client import Client, environment
from hub_folders import edit_json, shard
from hub_server import TOKEN
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from hub_card.fresh_load import check

REPO = "alice/sam"


def head(hub, repo=REPO, branch="main"):
    return hub.repositories[repo].branches[branch]


# What is printed, what is pushed


def test_one_commit_every_file_and_the_line_to_paste(hub, push, folder):
    (folder / ".env").write_text("SECRET=1")
    outcome = push(folder, REPO, "--message", "First weights", "--private")
    assert outcome.code == 0, outcome.text
    assert hub.repositories[REPO].private
    assert [commit.title for commit in hub.repositories[REPO].commits.values()] == ["initial commit", "First weights"]
    for path, data in hub.files(REPO).items():
        if path != ".gitattributes":
            row = next(line for line in outcome.out.splitlines() if line.split()[:1] == [path])
            assert f"{len(data):,} bytes" in row
    assert "Left out: .env" in outcome.out
    assert f"{hub.url}/{REPO}/commit/{head(hub)}" in outcome.out
    assert f'AutoModel.from_pretrained("{REPO}", revision="{head(hub)}"' in outcome.out
    assert "Hashing" in outcome.err


def test_a_second_run_has_nothing_to_do_and_a_third_sends_what_changed(hub, push, folder):
    push(folder, REPO)
    before = head(hub)
    hub.requests.clear()
    outcome = push(folder, REPO)
    assert outcome.code == 0
    assert "Nothing to do" in outcome.out
    assert head(hub) == before
    assert before in outcome.out
    assert {seen.method for seen in hub.requests} == {"GET"}
    assert not hub.repositories[REPO].private
    edit_json(folder / "config.json", note="second")
    assert push(folder, REPO).code == 0
    [commit] = [seen for seen in hub.requests if "/commit/" in seen.path]
    sent = [json.loads(line) for line in commit.body.splitlines()]
    assert [line["value"]["path"] for line in sent[1:]] == ["config.json"]
    assert not [seen for seen in hub.requests if seen.server == "cdn"]


def test_stale_files_go_in_the_same_commit_and_others_stay(hub, push, folder):
    single = (folder / "model.safetensors").read_bytes()
    shard(folder)
    assert push(folder, REPO).code == 0
    assert "model-00002-of-00002.safetensors" in hub.files(REPO)
    theirs = {"modeling_theirs.py": b"1", "images/a.txt": b"2", "LICENSE": b"4"}
    hub.commit(REPO, {"layers_sam_split.py": b"0", **theirs})
    before = head(hub)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    (folder / "model.safetensors").write_bytes(single)
    outcome = push(folder, REPO)
    assert outcome.code == 0
    files = hub.files(REPO).keys()
    assert not {path for path in files if "-of-" in path or "index" in path or path == "layers_sam_split.py"}
    assert {"model.safetensors", *theirs} <= files
    assert hub.repositories[REPO].commits[head(hub)].parent == before
    assert "delete model-00001-of-00002.safetensors" in outcome.out


@pytest.mark.parametrize("exists", [True, False])
def test_a_branch_is_made_and_main_stays(hub, push, folder, exists):
    if exists:
        hub.create(REPO, {"a.txt": b"1"})
    outcome = push(folder, REPO, "--branch", "fine/tuned")
    assert outcome.code == 0, outcome.text
    assert "model.safetensors" not in hub.files(REPO)
    assert "model.safetensors" in hub.files(REPO, "fine/tuned")
    assert head(hub, branch="fine/tuned") in outcome.out


def test_a_pull_request_and_then_nothing_to_do(hub, push, folder):
    hub.create("bob/sam", {"a.txt": b"1"})
    before = head(hub, "bob/sam")
    outcome = push(folder, "bob/sam", "--create-pr")
    assert outcome.code == 0, outcome.text
    assert f"Pull request: {hub.url}/bob/sam/discussions/1" in outcome.out
    assert head(hub, "bob/sam") == before
    assert "model.safetensors" in hub.files("bob/sam", "refs/pr/1")
    assert "Nothing to do" in push(folder, "bob/sam", "--create-pr").out
    assert len(hub.repositories["bob/sam"].pull_requests) == 1
    hub.repositories["bob/sam"].closed.add(1)
    assert push(folder, "bob/sam", "--create-pr").code == 0
    assert len(hub.repositories["bob/sam"].pull_requests) == 2, "a closed one brings nothing"


@pytest.mark.parametrize("exists", [True, False])
def test_a_dry_run_writes_nothing(hub, push, folder, exists):
    if exists:
        hub.create(REPO, {"old_sam_split.py": b"1"})
    outcome = push(folder, REPO, "--dry-run")
    assert outcome.code == 0
    assert "Dry run" in outcome.out
    assert {seen.method for seen in hub.requests} == {"GET"}
    if exists:
        assert "delete old_sam_split.py" in outcome.out
        assert "write  model.safetensors" in outcome.out
    else:
        assert not hub.repositories


def test_an_adapter_does_not_go_on_top_of_a_model_nor_the_other_way(hub, push, folder, adapter):
    assert push(folder, REPO).code == 0
    before = head(hub)
    outcome = push(adapter, REPO, "--base-model", REPO)
    assert outcome.code == 2
    assert "repository of its own" in outcome.err
    assert head(hub) == before
    assert push(adapter, "alice/lora", "--base-model", REPO).code == 0
    assert push(folder, "alice/lora").code == 2


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("absent", [REPO], "absent is not a folder"),
        ("model", ["not a repo"], "'not a repo' is not a repository id"),
        ("model", ["sam"], "expected 'name/repository'"),
        ("model", [REPO, "--base-revision", "abc"], "--base-model"),
        ("adapter", [REPO], "adapter_config.json is not JSON"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(hub, push, folder, adapter, name, options, words):
    (adapter / "adapter_config.json").write_text("{")
    outcome = push(folder.with_name(name), *options)
    assert outcome.code == 2
    assert outcome.err.startswith("sam-split: error: ")
    assert outcome.err.count("\n") == 1
    assert words in outcome.err
    assert not hub.requests


@pytest.mark.slow
def test_no_token(hub, folder, tmp_path):
    with Client(hub, tmp_path, HF_TOKEN="") as client:
        outcome = client.run("push", folder, REPO)
        assert outcome.code == 2
        assert "hf auth login" in outcome.err
        assert client.run("push", folder, REPO, "--dry-run").code == 0
    assert not hub.repositories


# The load in a fresh interpreter


@pytest.mark.slow
def test_the_command_loads_the_folder_first_and_keeps_the_token_out_of_sight(hub, folder, tmp_path):
    """The real command in a process of its own: the folder's code sees no package and no token, `ps` no token."""
    with (folder / "configuration_sam_split.py").open("a") as file:
        file.write("\nimport os, sys\nassert 'HF_TOKEN' not in os.environ\nassert sys.modules['sam_split'] is None\n")
    command = [sys.executable, "-m", "conversion", "push", str(folder), REPO, "--allow-modified-code"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=environment(hub, tmp_path), cwd=tmp_path, **pipes)
    arguments = set()
    while process.poll() is None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                arguments.add(path.read_bytes())
            except OSError:  # it has just ended
                continue
        time.sleep(0.1)
    output = process.stdout.read().decode()
    assert process.returncode == 0, output
    assert "182 tensors, each equal to the one in" in output
    assert any(b"fresh_load.py" in line for line in arguments)
    assert not any(TOKEN.encode() in line for line in arguments)
    assert TOKEN not in output
    assert "model.safetensors" in hub.files(REPO)


ONES, NAN = torch.ones(2), torch.tensor([1.0, torch.nan])


@pytest.mark.parametrize(
    ("loaded", "stored", "words"),
    [
        ({}, ONES, "q .* the model has no such tensor"),
        ({"q": torch.ones(2, 1)}, ONES, r"q is \(2,\) torch.float32 in the weight file and \(2, 1\)"),
        ({"q": ONES.half()}, ONES, "q .* torch.float16 once loaded"),
        ({"q": torch.tensor([1.0, 2.0])}, ONES, "q changes on loading"),
        ({"q": NAN}, NAN, "q .* not finite"),
        ({"q": ONES, "k": ONES}, ONES, "k was loaded but is in none of the weight files"),
    ],
)
def test_each_tensor_is_compared_with_the_weight_file(tmp_path, loaded, stored, words):
    save_file({"q": stored}, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match=words):
        check(loaded, [tmp_path / "model.safetensors"])


@pytest.mark.slow
def test_a_folder_that_does_not_load_is_refused(hub, push, folder):
    code = (folder / "modeling_sam_split.py").read_text()
    (folder / "modeling_sam_split.py").write_text("import sam_split\n" + code)
    outcome = push(folder, REPO, "--allow-modified-code", load=True)
    assert outcome.code == 2, outcome.text
    assert outcome.err.strip().splitlines()[-1].startswith("sam-split: error: ")
    assert "does not load in a fresh process" in outcome.err
    assert not hub.repositories


@pytest.mark.slow
def test_an_adapter_names_its_base_and_is_tried_on_it(hub, push, folder, adapter):
    assert push(folder, REPO).code == 0
    base = head(hub)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=REPO)
    outcome = push(adapter, "alice/lora", load=True)
    assert outcome.code == 0, outcome.text
    published = json.loads(hub.files("alice/lora")["adapter_config.json"])
    assert (published["base_model_name_or_path"], published["revision"]) == (REPO, base)
    card = ModelCard(hub.files("alice/lora")["README.md"].decode())
    assert card.data.base_model == REPO
    assert base in card.content
    assert f'PeftModel.from_pretrained(base, "alice/lora", revision="{head(hub, "alice/lora")}")' in outcome.out
    assert "Nothing to do" in push(adapter, "alice/lora").out


@pytest.mark.slow
def test_an_adapter_for_a_base_of_another_shape(hub, push, folder, adapter):
    assert push(folder, REPO).code == 0
    weights = load_file(adapter / "adapter_model.safetensors")
    wider = {key: tensor.repeat(1, 2) if "lora_A" in key else tensor for key, tensor in weights.items()}
    save_file(wider, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    outcome = push(adapter, "alice/lora", "--base-model", REPO, load=True)
    assert outcome.code == 2
    assert "does not load" in outcome.err
    assert "alice/lora" not in hub.repositories


def test_an_adapter_whose_base_is_not_on_the_hub(hub, push, adapter):
    outcome = push(adapter, "alice/lora", "--base-model", "alice/absent")
    assert outcome.code == 2
    assert "alice/absent" in outcome.err
    assert not hub.repositories


# After a conversion


@pytest.fixture
def source(tmp_path):
    """A stock SamModel folder."""
    models.stock_model().save_pretrained(tmp_path / "sam-vit-tiny")
    return tmp_path / "sam-vit-tiny"


def test_convert_and_push(world, hub, source, tmp_path):
    outcome = world[1].run("convert", source, tmp_path / "out", "--push-to-hub", REPO, "--private")
    assert outcome.code == 0, outcome.text
    assert hub.repositories[REPO].private
    assert hub.files(REPO)["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    card = hub.files(REPO)["README.md"].decode()
    assert f'repo = "{REPO}"' in card
    assert "your-name" not in card
    assert "`sam-vit-tiny`" in card
    assert str(tmp_path) not in card
    assert {"LICENSE", "preprocessor_config.json"} <= hub.files(REPO).keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--push-to-hub", "sam"], "'sam' is not a repository id; expected 'name/repo"),
        (["--private"], "--push-to-hub"),
    ],
)
def test_bad_options_are_refused_before_the_conversion(world, source, tmp_path, options, words):
    outcome = world[1].run("convert", source, tmp_path / "out", *options)
    assert outcome.code == 2
    assert outcome.err.startswith("sam-split: error: ")
    assert words in outcome.err
    assert not (tmp_path / "out").exists()
