"""Whatever the Hub or the network does, the branch holds the old commit or the whole new one; a second run finishes.

The pushes here skip the load in a fresh interpreter (see test_push.py) and run on a clock that does not wait.
"""

import json
import threading

import pytest
from hub_client import Client
from hub_folders import copy_with_config
from hub_server import TOKEN, StoredFile

REPO = "alice/sam"
HTML = b"<!DOCTYPE html><html><body>Please sign in to the guest network</body></html>"
ALWAYS = 10_000

# Every request of a push to a repository that does not exist yet, in order.
STEPS = {
    "read": f"GET /api/models/{REPO}/revision/",
    "create": "POST /api/repos/create",
    "list": f"GET /api/models/{REPO}/tree/",
    "card": "POST /api/validate-yaml",
    "preupload": f"POST /api/models/{REPO}/preupload/",
    "batch": f"POST /{REPO}.git/info/lfs/objects/batch",
    "upload": "PUT /object/",
    "verify": "POST /lfs-verify",
    "commit": f"POST /api/models/{REPO}/commit/",
}


def published(hub, folder, repo=REPO, revision="main") -> bool:
    """Whether a branch holds every file of the folder, the card included."""
    files = hub.files(repo, revision)
    here = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".py", ".safetensors")}
    return here.items() <= files.items() and b"trust_remote_code" in files.get("README.md", b"")


def untouched(hub, repo=REPO) -> bool:
    return repo not in hub.repositories or hub.files(repo).keys() == {".gitattributes"}


def finishes(hub, push, folder):
    """The command, run again on a healthy Hub, does what is left and then has nothing to do."""
    hub.faults.clear()
    outcome = push(folder, REPO)
    assert outcome.code == 0, outcome.text
    assert published(hub, folder)
    commits = len(hub.repositories[REPO].commits)
    assert "Nothing to do" in push(folder, REPO).out
    assert len(hub.repositories[REPO].commits) == commits


def break_step(hub, step, fault, **options):
    """Let requests of a step fail: a status, a cut connection, or somebody else's answer."""
    if fault == "cut":
        return hub.cut(STEPS[step], **options)
    status, body = {"html": (200, HTML), "other JSON": (200, {"fine": True})}.get(fault) or (int(fault), b"")
    return hub.fail(STEPS[step], status, body, **options)


@pytest.mark.parametrize("step", ["preupload", "batch", "upload", "verify"])
@pytest.mark.parametrize("fault", ["503", "cut"])
def test_an_upload_survives_one_error(hub, push, folder, step, fault):
    break_step(hub, step, fault)
    outcome = push(folder, REPO)
    assert outcome.code == 0, outcome.text
    assert outcome.slept, "the fault was met, and waited for"
    assert published(hub, folder)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", ["503", "429", "cut", "html"])
def test_an_error_that_stays_ends_the_push_and_the_next_run_finishes(hub, push, folder, step, fault):
    break_step(hub, step, fault, times=ALWAYS)
    outcome = push(folder, REPO)
    if not (fault == "html" and step in ("upload", "verify")):  # their answers are not read
        assert outcome.code == 1, outcome.text
        assert outcome.err.strip().splitlines()[-1].startswith("sam-split: error: ")
        assert "run the command again" in outcome.err
        assert untouched(hub)
    finishes(hub, push, folder)


@pytest.mark.parametrize("step", [step for step in STEPS if step != "commit"])
def test_a_lost_answer_on_the_way(hub, push, folder, step):
    hub.cut(STEPS[step], after=True)
    assert push(folder, REPO).code in (0, 1)
    finishes(hub, push, folder)
    assert len(hub.repositories[REPO].commits) == 2


REFUSALS = {
    "401": (401, {}, "does not accept the token"),
    "403": (403, {"X-Error-Message": f"{TOKEN} and hf_{'A1' * 15} may read"}, "<token> and <token> may read"),
    "404": (404, {"X-Error-Code": "RepoNotFound"}, "not found"),
    "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"}, "gated"),
}


@pytest.mark.parametrize("step", ["list", "batch", "commit"])
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_explained_and_not_retried(hub, push, folder, step, refusal):
    status, headers, words = REFUSALS[refusal]
    hub.fail(STEPS[step], status, headers=headers, times=ALWAYS)
    outcome = push(folder, REPO)
    assert outcome.code == 1
    assert words in outcome.err
    assert not outcome.slept
    assert untouched(hub)


def test_a_token_that_the_hub_does_not_know(hub, push, folder):
    hub.users.clear()
    outcome = push(folder, REPO)
    assert outcome.code == 1
    assert "hf auth login" in outcome.err
    assert not hub.repositories


@pytest.mark.parametrize("exists", [True, False])
def test_a_repository_of_somebody_else(hub, push, folder, exists):
    if exists:
        hub.create("bob/sam")
    outcome = push(folder, "bob/sam")
    assert outcome.code == 1
    assert "no permission for bob/sam" in outcome.err
    assert untouched(hub, "bob/sam")


def test_the_repository_appears_between_looking_and_creating(hub, push, folder):
    hub.hook(STEPS["create"], lambda: hub.create(REPO))
    assert push(folder, REPO).code == 0
    assert 409 in [seen.status for seen in hub.requests if seen.path == "/api/repos/create"]
    assert published(hub, folder)


# Somebody else pushes


@pytest.mark.parametrize("moment", ["preupload", "upload", "commit"])
def test_a_push_in_between_is_not_overwritten(hub, push, folder, moment):
    hub.create(REPO, {"config.json": b'{"model_type": "theirs"}', "theirs.txt": b"1"})
    hub.hook(STEPS[moment], lambda: hub.commit(REPO, {"config.json": b"{}", "theirs.txt": b"2"}))
    outcome = push(folder, REPO)
    assert outcome.code == 1
    assert "Nothing was overwritten" in outcome.err
    assert hub.files(REPO)["config.json"] == b"{}"
    assert "model.safetensors" not in hub.files(REPO)
    finishes(hub, push, folder)
    assert hub.files(REPO)["theirs.txt"] == b"2"


@pytest.mark.slow
def test_three_pushes_race_and_one_wins(hub, folder, tmp_path):
    barrier = threading.Barrier(3)
    hub.hook(STEPS["preupload"], barrier.wait, times=3)
    hub.create(REPO)
    clients = []
    try:
        for number in range(3):
            copy_with_config(folder, tmp_path / str(number), racer=number)
            (tmp_path / f"home{number}").mkdir()
            clients.append(Client(hub, tmp_path / f"home{number}"))
        for number, client in enumerate(clients):
            client.start("push", tmp_path / str(number), REPO)
        outcomes = [client.finish() for client in clients]
    finally:
        for client in clients:
            client.__exit__()
    codes = [outcome.code for outcome in outcomes]
    assert sorted(codes) == [0, 1, 1], [outcome.text for outcome in outcomes]
    assert json.loads(hub.files(REPO)["config.json"])["racer"] == codes.index(0)
    assert ["Nothing was overwritten" in outcome.err for outcome in outcomes] == [code == 1 for code in codes]
    assert len(hub.repositories[REPO].commits) == 2


# The commit landed, its answer did not


@pytest.mark.parametrize("lost", ["cut", "500", "html", "other JSON"])
def test_a_lost_answer_to_the_commit_is_found_out(hub, push, folder, lost):
    break_step(hub, "commit", lost, after=True)
    outcome = push(folder, REPO)
    assert outcome.code == 0, outcome.text
    assert "was lost, but the commit is there" in outcome.out
    assert hub.repositories[REPO].branches["main"] in outcome.out
    finishes(hub, push, folder)
    assert len(hub.repositories[REPO].commits) == 2


def test_a_lost_answer_to_a_pull_request_opens_no_second_one(hub, push, folder):
    hub.create(REPO)
    hub.cut(STEPS["commit"], after=True)
    outcome = push(folder, REPO, "--create-pr")
    assert outcome.code == 0, outcome.text
    assert len(hub.repositories[REPO].pull_requests) == 1
    assert f"{hub.url}/{REPO}/discussions/1" in outcome.out
    assert published(hub, folder, revision="refs/pr/1")


def test_a_lost_answer_and_nobody_to_ask(hub, push, folder):
    hub.create(REPO)
    hub.cut(STEPS["commit"], after=True)
    hub.hook(STEPS["commit"], lambda: hub.fail(STEPS["read"], 503, times=ALWAYS))
    outcome = push(folder, REPO)
    assert outcome.code == 1
    assert "run the command again" in outcome.err
    assert published(hub, folder)
    finishes(hub, push, folder)


def test_what_the_hub_stored_is_compared(hub, push, folder, monkeypatch):
    def corrupted(tree, lines, applied=hub.applied):
        stored = applied(tree, lines)
        return {**stored, "config.json": StoredFile(stored["config.json"].data + b" ", lfs=False)}

    monkeypatch.setattr(hub, "applied", corrupted)
    outcome = push(folder, REPO)
    assert outcome.code == 1
    assert "these files differ: config.json" in outcome.err


# What the Hub would make of it


def test_a_card_that_the_hub_rejects(hub, push, folder):
    hub.create(REPO, {"old.txt": b"1"})
    (folder / "README.md").write_text("---\nlicense: whatever-i-like\n---\nMine.\n")
    outcome = push(folder, REPO)
    assert outcome.code == 2
    assert '"license" must be one of' in outcome.err
    assert not [seen for seen in hub.requests if "/lfs/" in seen.path or "/commit/" in seen.path]
    (folder / "README.md").unlink()
    finishes(hub, push, folder)


def test_a_gitignore_that_would_drop_files(hub, push, folder):
    hub.create(REPO, {".gitignore": b"*.safetensors\n"})
    outcome = push(folder, REPO)
    assert outcome.code == 2
    assert ".gitignore" in outcome.err
    assert "config.json" not in hub.files(REPO)
