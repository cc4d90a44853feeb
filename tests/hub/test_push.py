"""`sam-split push`: what it prints, what it leaves on the Hub, and that a stranger can load all that is sent."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hub_server
import models
import pytest
import torch
from hub_client import ROOT, Client
from hub_folders import save_adapter, save_split_model
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

REPO = "alice/sam"


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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with HubServer(per_page=3) as hub, Client(hub, tmp_path_factory.mktemp("home"), HF_DEBUG="1") as client:
        yield hub, client
        assert TOKEN not in client.transcript
        assert not client.left_behind(TOKEN)


@pytest.fixture
def hub(world):
    world[0].reset()
    return world[0]


@pytest.fixture
def push(world, hub):
    def run(*arguments, load=False):
        outcome = world[1].run("push", *arguments, load=load)
        assert "Traceback" not in outcome.text
        assert TOKEN not in outcome.text
        return outcome

    return run


def head(hub, repo=REPO, branch="main"):
    return hub.repositories[repo].branches[branch]


def shard(folder):
    """The same weights in two shards, as `save_pretrained` cuts a large model."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": {}}
    for number, half in enumerate((sorted(weights)[:90], sorted(weights)[90:]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: weights[key] for key in half}, folder / name, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(half, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# What is printed, what is pushed


def test_prints_every_file_the_commit_and_the_line_to_paste(hub, push, folder):
    (folder / ".env").write_text("SECRET=1")
    outcome = push(folder, REPO)
    assert outcome.code == 0, outcome.text
    for path, data in hub.files(REPO).items():
        if path != ".gitattributes":
            row = next(line for line in outcome.out.splitlines() if line.split()[:1] == [path])
            assert f"{len(data):,} bytes" in row
    assert "Left out: .env" in outcome.out
    assert f"{hub.url}/{REPO}/commit/{head(hub)}" in outcome.out
    pinned = f'AutoModel.from_pretrained("{REPO}", revision="{head(hub)}"'
    assert pinned in outcome.out
    assert "Hashing" in outcome.err
    assert "model.safetensors: 100%" in outcome.err


def test_one_commit_by_the_message_given(hub, push, folder):
    assert push(folder, REPO, "--message", "First weights").code == 0
    titles = [commit.title for commit in hub.repositories[REPO].history(head(hub))]
    assert titles == ["First weights", "initial commit"]


def test_a_second_run_has_nothing_to_do(hub, push, folder):
    push(folder, REPO)
    before = head(hub)
    hub.requests.clear()
    outcome = push(folder, REPO)
    assert outcome.code == 0
    assert "Nothing to do" in outcome.out
    assert before in outcome.out
    assert head(hub) == before
    assert {seen.method for seen in hub.requests} == {"GET"}


def test_only_what_changed_is_sent(hub, push, folder):
    push(folder, REPO)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "note": "second"}))
    hub.requests.clear()
    assert push(folder, REPO).code == 0
    [commit] = [seen for seen in hub.requests if "/commit/" in seen.path]
    sent = [json.loads(line) for line in commit.body.splitlines()]
    assert [line["value"]["path"] for line in sent[1:]] == ["config.json"]
    assert not [seen for seen in hub.requests if seen.server == "cdn"]


def test_stale_files_go_in_the_same_commit_and_others_stay(hub, push, folder):
    shard(folder)
    assert push(folder, REPO).code == 0
    assert "model-00002-of-00002.safetensors" in hub.files(REPO)
    theirs = {"layers_sam_split.py": b"1", "pictures/a.txt": b"2", "handler.py": b"3", "LICENSE": b"4"}
    hub.commit(REPO, theirs, author="alice")
    before = head(hub)
    merged = {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
    outcome = push(folder, REPO)
    assert outcome.code == 0
    files = hub.files(REPO).keys()
    assert not {path for path in files if "-of-" in path or "index" in path or path == "layers_sam_split.py"}
    assert {"model.safetensors", "pictures/a.txt", "handler.py", "LICENSE"} <= files
    assert hub.repositories[REPO].commits[head(hub)].parent == before
    assert "delete model-00001-of-00002.safetensors" in outcome.out


def test_a_branch_is_made_and_main_stays(hub, push, folder):
    hub.create(REPO, {"a.txt": b"1"})
    before = head(hub)
    outcome = push(folder, REPO, "--branch", "fine/tuned")
    assert outcome.code == 0, outcome.text
    assert head(hub) == before
    assert "model.safetensors" in hub.files(REPO, "fine/tuned")
    assert head(hub, branch="fine/tuned") in outcome.out


def test_a_branch_of_a_repository_that_does_not_exist(hub, push, folder):
    assert push(folder, REPO, "--branch", "v2").code == 0
    assert hub.files(REPO).keys() == {".gitattributes"}
    assert "model.safetensors" in hub.files(REPO, "v2")


def test_a_pull_request_and_then_nothing_to_do(hub, push, folder):
    hub.create("bob/sam", {"a.txt": b"1"})
    before = head(hub, "bob/sam")
    outcome = push(folder, "bob/sam", "--create-pr")
    assert outcome.code == 0, outcome.text
    assert f"Pull request: {hub.url}/bob/sam/discussions/1" in outcome.out
    assert head(hub, "bob/sam") == before
    assert "model.safetensors" in hub.files("bob/sam", "refs/pr/1")
    outcome = push(folder, "bob/sam", "--create-pr")
    assert "Nothing to do" in outcome.out
    assert len(hub.repositories["bob/sam"].pull_requests) == 1


@pytest.mark.parametrize("private", [True, False])
def test_private_or_not(hub, push, folder, private):
    assert push(folder, REPO, *["--private"] * private).code == 0
    assert hub.repositories[REPO].private == private


@pytest.mark.parametrize("exists", [True, False])
def test_a_dry_run_writes_nothing(hub, push, folder, exists):
    if exists:
        hub.create(REPO, {"layers_sam_split.py": b"1"})
    outcome = push(folder, REPO, "--dry-run")
    assert outcome.code == 0
    assert "Dry run" in outcome.out
    assert {seen.method for seen in hub.requests} == {"GET"}
    if exists:
        assert "delete layers_sam_split.py" in outcome.out
        assert "write  model.safetensors" in outcome.out
    else:
        assert not hub.repositories


def test_modified_code(hub, push, folder):
    with (folder / "modeling_sam_split.py").open("a") as file:
        file.write("\n# changed\n")
    outcome = push(folder, REPO)
    assert outcome.code == 2
    assert "--allow-modified-code" in outcome.err
    assert not hub.requests
    assert push(folder, REPO, "--allow-modified-code").code == 0
    assert b"Modified code" in hub.files(REPO)["README.md"]


def test_an_adapter_does_not_go_on_top_of_a_model_nor_the_other_way(hub, push, folder, adapter):
    assert push(folder, REPO).code == 0
    before = head(hub)
    outcome = push(adapter, REPO, "--base-model", REPO)
    assert outcome.code == 2
    assert "repository of its own" in outcome.err
    assert head(hub) == before
    assert push(adapter, "alice/lora", "--base-model", REPO).code == 0
    assert push(folder, "alice/lora").code == 2


@pytest.mark.parametrize("arguments", [["absent-folder", REPO], ["{folder}", "not a repo"], ["{folder}", "sam"]])
def test_bad_input_is_one_line_and_exit_code_2(hub, push, folder, arguments):
    outcome = push(*[argument.format(folder=folder) for argument in arguments])
    assert outcome.code == 2
    assert outcome.err.startswith("sam-split: error: ")
    assert outcome.err.count("\n") == 1
    assert not hub.requests


@pytest.mark.parametrize("transfer", ["multipart", "xet"])
def test_other_ways_to_upload(folder, tmp_path, transfer):
    if transfer == "xet" and not hub_server.xet_works():
        pytest.skip("this hf_xet has no store on the file system")
    part_size = 100_000 if transfer == "multipart" else None
    with HubServer(part_size=part_size, xet=transfer == "xet") as hub, Client(hub, tmp_path) as client:
        outcome = client.run("push", folder, REPO)
        assert outcome.code == 0, outcome.text
        assert hub.files(REPO)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        assert "Nothing to do" in client.run("push", folder, REPO).out
        save_split_model(folder, seed=1)  # weights that the store has not seen
        pattern = "PUT /part/" if transfer == "multipart" else "GET /api/models/.*/xet-write-token/"
        hub.fail(pattern, 403, times=10_000)
        before = head(hub)
        outcome = client.run("push", folder, REPO)
        assert outcome.code == 1, outcome.text
        assert "Traceback" not in outcome.text
        assert head(hub) == before
        hub.faults.clear()
        assert client.run("push", folder, REPO).code == 0
        assert hub.files(REPO)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        assert TOKEN not in client.transcript
        assert not client.left_behind(TOKEN)
        assert not any("authorization" in seen.headers for seen in hub.requests if seen.server == "cdn")


def test_no_token(hub, folder, tmp_path):
    with Client(hub, tmp_path, HF_TOKEN="") as client:
        outcome = client.run("push", folder, REPO)
        assert outcome.code == 2
        assert "hf auth login" in outcome.err
        assert client.run("push", folder, REPO, "--dry-run").code == 0
    assert not hub.repositories


# The load in a fresh interpreter


def test_the_folder_is_loaded_first_and_the_token_stays_out_of_sight(hub, push, folder):
    """Code in the folder sees no package, no token, and a command line without one."""
    with (folder / "configuration_sam_split.py").open("a") as file:
        file.write(
            "\nimport os, sys\n"
            "assert 'HF_TOKEN' not in os.environ\n"
            "assert not any('hf_' in argument for argument in sys.argv)\n"
            "assert sys.modules['sam_split'] is None\n"
        )
    outcome = push(folder, REPO, "--allow-modified-code", load=True)
    assert outcome.code == 0, outcome.text
    assert "182 tensors, each equal to the one in" in outcome.out
    assert "model.safetensors" in hub.files(REPO)


def drop_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["vision_encoder.layers.0.attn.q.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def not_finite(folder):
    weights = load_file(folder / "model.safetensors")
    weights["vision_encoder.layers.0.attn.q.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])


def needs_the_package(folder):
    code = (folder / "modeling_sam_split.py").read_text()
    (folder / "modeling_sam_split.py").write_text("import sam_split\n" + code)


UNLOADABLE = [drop_a_tensor, not_finite, truncate, needs_the_package]


@pytest.mark.parametrize("damage", UNLOADABLE, ids=lambda damage: damage.__name__)
def test_a_folder_that_does_not_load_is_refused(hub, push, folder, damage):
    damage(folder)
    outcome = push(folder, REPO, "--allow-modified-code", load=True)
    assert outcome.code == 2, outcome.text
    assert outcome.err.strip().splitlines()[-1].startswith("sam-split: error: ")
    assert {seen.method for seen in hub.requests} <= {"GET"}
    assert not hub.repositories


def test_an_adapter_names_its_base_and_is_tried_on_it(hub, push, folder, adapter):
    assert push(folder, REPO).code == 0
    base = head(hub)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": REPO}))
    outcome = push(adapter, "alice/lora", load=True)
    assert outcome.code == 0, outcome.text
    published = json.loads(hub.files("alice/lora")["adapter_config.json"])
    assert (published["base_model_name_or_path"], published["revision"]) == (REPO, base)
    card = ModelCard(hub.files("alice/lora")["README.md"].decode())
    assert card.data.base_model == REPO
    assert base in card.content
    assert f'PeftModel.from_pretrained(base, "alice/lora", revision="{head(hub, "alice/lora")}")' in outcome.out
    assert "Nothing to do" in push(adapter, "alice/lora").out


def test_an_adapter_for_a_base_of_another_shape(hub, push, folder, adapter):
    assert push(folder, REPO).code == 0
    weights = load_file(adapter / "adapter_model.safetensors")
    wider = {
        key: torch.cat([tensor, tensor], dim=-1) if "lora_A" in key else tensor for key, tensor in weights.items()
    }
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


def test_a_malformed_repository_id_is_refused_before_the_conversion(world, hub, source, tmp_path):
    outcome = world[1].run("convert", source, tmp_path / "out", "--push-to-hub", "sam")
    assert outcome.code == 2
    assert outcome.err.startswith("sam-split: error: 'sam' is not a repository id; expected 'name/repository'")
    assert not (tmp_path / "out").exists()


def test_private_without_a_repository(world, source, tmp_path):
    outcome = world[1].run("convert", source, tmp_path / "out", "--private")
    assert outcome.code == 2
    assert "--push-to-hub" in outcome.err
    assert not (tmp_path / "out").exists()


# The real command line, in a process of its own, watched from outside


def test_the_command_line_never_carries_the_token(hub, folder, tmp_path):
    environment = hub.environment(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "conversion", "push", str(folder), REPO]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path
    )
    arguments = set()
    while process.poll() is None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                arguments.add(path.read_bytes())
            except OSError:  # it has just ended
                continue
        time.sleep(0.02)
    output = process.stdout.read().decode()
    assert process.returncode == 0, output
    assert any(b"fresh_load.py" in line for line in arguments)
    assert not any(TOKEN.encode() in line for line in arguments)
    assert TOKEN not in output
    assert "model.safetensors" in hub.files(REPO)
