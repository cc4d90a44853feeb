"""Whatever the Hub or the network does, the branch holds the old commit or the whole new one; a second run finishes.

The pushes here skip the load in a fresh interpreter (see test_push.py) and run on a clock that does not wait.
"""

import json
import threading

import pytest
from hub_client import Client
from hub_folders import save_split_model
from hub_server import OTHER_TOKEN, TOKEN, HubServer

REPO = "alice/sam"
HTML = b"<!DOCTYPE html><html><body>Please sign in to the guest network</body></html>"
ALWAYS = 10_000

# Every request of a push to a repository that does not exist yet, in order.
STEPS = {
    "read": f"GET /api/models/{REPO}/revision/",
    "card": "POST /api/validate-yaml",
    "create": "POST /api/repos/create",
    "list": f"GET /api/models/{REPO}/tree/",
    "preupload": f"POST /api/models/{REPO}/preupload/",
    "batch": f"POST /{REPO}.git/info/lfs/objects/batch",
    "upload": "PUT /object/",
    "verify": "POST /lfs-verify",
    "commit": f"POST /api/models/{REPO}/commit/",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with HubServer() as hub, Client(hub, tmp_path_factory.mktemp("home")) as client:
        yield hub, client
        assert TOKEN not in client.transcript
        assert not client.left_behind(TOKEN)


@pytest.fixture(scope="module")
def split_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    save_split_model(folder)
    return folder


@pytest.fixture
def hub(world):
    world[0].reset()
    return world[0]


@pytest.fixture
def push(world, hub, split_folder):
    """Push the tiny model; whatever happened, no traceback and no token in sight."""

    def run(*options, folder=split_folder, repo=REPO):
        outcome = world[1].run("push", folder, repo, *options)
        assert outcome.code in (0, 1, 2), outcome.text
        assert "Traceback" not in outcome.text
        assert TOKEN not in outcome.text
        assert not any("authorization" in seen.headers for seen in hub.requests if seen.server == "cdn")
        return outcome

    return run


def published(hub, folder, repo=REPO, revision="main") -> bool:
    """Whether a branch holds every file of the folder, the card included."""
    files = hub.files(repo, revision)
    weights = files.get("model.safetensors") == (folder / "model.safetensors").read_bytes()
    code = files.get("modeling_sam_split.py") == (folder / "modeling_sam_split.py").read_bytes()
    return weights and code and b"trust_remote_code" in files.get("README.md", b"") and "config.json" in files


def untouched(hub, before, repo=REPO) -> bool:
    """Whether the repository does not exist, or is as empty or as full as it was."""
    return repo not in hub.repositories or hub.files(repo).keys() - {".gitattributes"} == before


def finishes(hub, push, folder):
    """The command, run again on a healthy Hub, does what is left and then has nothing to do."""
    hub.faults.clear()
    outcome = push()
    assert outcome.code == 0, outcome.text
    assert published(hub, folder)
    commits = len(hub.repositories[REPO].commits)
    assert "Nothing to do" in push().out
    assert len(hub.repositories[REPO].commits) == commits


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("status", [429, 500, 503])
def test_recovers_from_one_error_at_every_step(hub, push, split_folder, step, status):
    hub.fail(STEPS[step], status, headers={"Retry-After": "3"} if status == 429 else {})
    outcome = push()
    assert outcome.code == 0, outcome.text
    assert published(hub, split_folder)
    assert outcome.slept, "the fault was met, and waited for"
    if status == 429:
        assert 4.0 in outcome.slept  # one second more than asked for
    finishes(hub, push, split_folder)


@pytest.mark.parametrize("step", [step for step in STEPS if step != "verify"])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_gives_up_on_an_error_that_stays(hub, push, split_folder, step, status):
    hub.fail(STEPS[step], status, times=ALWAYS)
    outcome = push()
    assert outcome.code == 1, outcome.text
    assert str(status) in outcome.err or f"fault {status}" in outcome.err
    assert untouched(hub, set())
    finishes(hub, push, split_folder)


def test_a_check_of_the_upload_that_never_answers(hub, push, split_folder):
    hub.fail(STEPS["verify"], 503, times=ALWAYS)
    outcome = push()  # the second attempt finds the file stored, and has nothing left to check
    assert outcome.code == 0
    assert published(hub, split_folder)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_recovers_from_a_lost_connection_at_every_step(hub, push, split_folder, step, when):
    hub.cut(STEPS[step], when)
    outcome = push()
    assert outcome.code == 0, outcome.text
    assert published(hub, split_folder)
    assert [commit.title for commit in hub.repositories[REPO].commits.values()] == [
        "initial commit",
        "Upload SamSplit model",
    ]


def test_recovers_from_a_connection_cut_during_the_upload(hub, push, split_folder):
    hub.cut(STEPS["upload"], "during")
    assert push().code == 0
    assert published(hub, split_folder)


def test_a_connection_that_is_always_cut_during_the_upload(hub, push, split_folder):
    hub.cut(STEPS["upload"], "during", times=ALWAYS)
    outcome = push()
    assert outcome.code == 1
    assert "run the command again" in outcome.err
    assert untouched(hub, set())
    finishes(hub, push, split_folder)


@pytest.mark.parametrize("step", [step for step in STEPS if step not in ("upload", "verify")])
@pytest.mark.parametrize("times", [1, ALWAYS])
def test_html_where_json_was_due(hub, push, split_folder, step, times):
    hub.fail(STEPS[step], 200, HTML, times=times)
    outcome = push()
    assert outcome.code == (0 if times == 1 else 1), outcome.text
    if times == ALWAYS:
        assert "not JSON" in outcome.err
        assert untouched(hub, set())
    finishes(hub, push, split_folder)


@pytest.mark.parametrize("step", ["card", "create", "commit"])
def test_an_html_error_page(hub, push, split_folder, step):
    hub.fail(STEPS[step], 502, HTML)
    assert push().code == 0
    assert published(hub, split_folder)


REFUSALS = {
    "401": (401, {}, "does not accept the token"),
    "403": (403, {"X-Error-Message": "read-only token"}, "read-only token"),
    "404": (404, {"X-Error-Code": "RepoNotFound"}, "not found"),
    "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"}, "gated"),
}


@pytest.mark.parametrize("step", ["list", "preupload", "batch", "commit"])
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_explained_and_not_retried(hub, push, split_folder, step, refusal):
    status, headers, words = REFUSALS[refusal]
    hub.fail(STEPS[step], status, headers=headers, times=ALWAYS)
    outcome = push()
    assert outcome.code == 1
    assert words in outcome.err
    assert outcome.err.strip().splitlines()[-1].startswith("sam-split: error: ")
    assert not outcome.slept
    assert untouched(hub, set())
    finishes(hub, push, split_folder)


def test_a_token_that_the_hub_does_not_know(hub, push, split_folder):
    hub.tokens.clear()
    try:
        outcome = push()
    finally:
        hub.tokens.update({TOKEN: "alice", OTHER_TOKEN: "bob"})
    assert outcome.code == 1
    assert "hf auth login" in outcome.err
    assert not hub.repositories


def test_somebody_elses_namespace(hub, push):
    outcome = push(repo="bob/sam")
    assert outcome.code == 1
    assert "bob/sam" in outcome.err
    assert "403" in outcome.err
    assert not hub.repositories


def test_somebody_elses_repository(hub, push):
    hub.create("bob/sam", {"notes.txt": b"mine"})
    outcome = push(repo="bob/sam")
    assert outcome.code == 1
    assert hub.files("bob/sam").keys() == {".gitattributes", "notes.txt"}


def test_a_gated_repository_of_ones_own_can_be_pushed_to(hub, push, split_folder):
    hub.create(REPO, gated=True)
    assert push().code == 0
    assert published(hub, split_folder)


def test_the_repository_appears_between_looking_and_creating(hub, push, split_folder):
    hub.hook(STEPS["create"], lambda: hub.create(REPO))
    assert push().code == 0
    assert 409 in [seen.status for seen in hub.requests if seen.path == "/api/repos/create"]
    assert published(hub, split_folder)


def test_the_hub_is_busy_creating_another_repository(hub, push, split_folder):
    words = {"error": "Cannot create repo: another conflicting operation is in progress"}
    hub.fail(STEPS["create"], 409, words, times=3)
    assert push().code == 0
    assert published(hub, split_folder)


def test_a_longer_wait_than_anybody_has_is_not_waited_for(hub, push, split_folder):
    hub.fail(STEPS["commit"], 429, headers={"Retry-After": "86400"}, times=ALWAYS)
    outcome = push()
    assert outcome.code == 1
    assert sum(outcome.slept) < 300
    assert "86401 s" in outcome.err
    finishes(hub, push, split_folder)


# Somebody else pushes


@pytest.mark.parametrize("moment", ["preupload", "upload", "commit"])
def test_a_push_in_between_is_not_overwritten(hub, push, split_folder, moment):
    hub.create(REPO, {"config.json": b'{"model_type": "theirs"}', "theirs.txt": b"1"})
    hub.hook(STEPS[moment], lambda: hub.commit(REPO, {"config.json": b"{}", "theirs.txt": b"2"}, title="Tune"))
    outcome = push()
    assert outcome.code == 1
    assert "bob" in outcome.err
    assert "Tune" in outcome.err
    assert "Nothing was overwritten" in outcome.err
    assert hub.files(REPO)["config.json"] == b"{}"
    assert "model.safetensors" not in hub.files(REPO)
    finishes(hub, push, split_folder)
    assert hub.files(REPO)["theirs.txt"] == b"2"


def test_a_412_although_nobody_pushed_is_tried_again(hub, push, split_folder):
    hub.fail(STEPS["commit"], 412)
    assert push().code == 0
    assert published(hub, split_folder)


def test_three_pushes_race_and_one_wins(hub, world, split_folder, tmp_path):
    barrier = threading.Barrier(3)
    hub.hook(STEPS["preupload"], barrier.wait, times=3)
    hub.create(REPO)
    clients, folders = [], []
    try:
        for number in range(3):
            folders.append(copy_with_config(split_folder, tmp_path / str(number), {"racer": number}))
            home = tmp_path / f"home{number}"
            home.mkdir()
            clients.append(Client(hub, home))
        for client, folder in zip(clients, folders, strict=True):
            client.start("push", folder, REPO, "--message", f"from {folder.name}")
        outcomes = [client.finish() for client in clients]
        codes = [outcome.code for outcome in outcomes]
        assert sorted(codes) == [0, 1, 1], [outcome.text for outcome in outcomes]
        winner = codes.index(0)
        assert json.loads(hub.files(REPO)["config.json"])["racer"] == winner
        for number, outcome in enumerate(outcomes):
            if number != winner:
                assert f"from {winner}" in outcome.err
                assert "Nothing was overwritten" in outcome.err
        assert len(hub.repositories[REPO].commits) == 2
        assert not any(TOKEN in client.transcript for client in clients)
    finally:
        for client in clients:
            client.__exit__()


# The commit landed, its answer did not


@pytest.mark.parametrize("lost", ["cut", "500", "html", "other JSON"])
def test_a_lost_answer_is_found_out(hub, push, split_folder, lost):
    if lost == "cut":
        hub.cut(STEPS["commit"], "after")
    else:
        status, body = {"500": (500, b""), "html": (200, HTML), "other JSON": (200, {"fine": True})}[lost]
        hub.fail(STEPS["commit"], status, body, after=True)
    outcome = push()
    assert outcome.code == 0
    assert "was lost, but the commit is there" in outcome.out
    assert len(hub.repositories[REPO].commits) == 2
    assert hub.repositories[REPO].branches["main"] in outcome.out
    finishes(hub, push, split_folder)


def test_a_lost_answer_with_somebody_elses_commit_on_top(hub, push, split_folder):
    hub.cut(STEPS["commit"], "after")
    hub.hook(f"GET /api/models/{REPO}/commits/", lambda: hub.commit(REPO, {"theirs.txt": b"1"}))
    outcome = push()
    assert outcome.code == 0
    ours = next(oid for oid, commit in hub.repositories[REPO].commits.items() if commit.author == "alice")
    assert ours in outcome.out
    assert hub.files(REPO)["theirs.txt"] == b"1"


def test_a_lost_answer_and_nobody_to_ask(hub, push, split_folder):
    hub.cut(STEPS["commit"], "after")
    hub.fail(f"GET /api/models/{REPO}/commits/", 503, times=ALWAYS)
    outcome = push()
    assert outcome.code == 1
    assert "see whether it landed" in outcome.err
    assert published(hub, split_folder)
    finishes(hub, push, split_folder)


def test_a_lost_answer_to_a_pull_request_opens_no_second_one(hub, push, split_folder):
    hub.create(REPO)
    hub.cut(STEPS["commit"], "after")
    outcome = push("--create-pr")
    assert outcome.code == 0
    assert len(hub.repositories[REPO].pull_requests) == 1
    assert f"{hub.url}/{REPO}/discussions/1" in outcome.out
    assert published(hub, split_folder, revision="refs/pr/1")


def test_the_comparison_afterwards_fails(hub, push, split_folder):
    hub.fail(STEPS["list"], 503, times=ALWAYS, skip=3)
    outcome = push()
    assert outcome.code == 1
    assert "is on the Hub, but its files could not be compared" in outcome.err
    assert published(hub, split_folder)
    finishes(hub, push, split_folder)


def test_what_the_hub_stored_is_compared(hub, push, split_folder, monkeypatch):
    def corrupted(tree, lines, applied=hub._applied):
        changed = applied(tree, lines)
        stored = changed["config.json"]
        changed["config.json"] = type(stored)(stored.data + b" ", lfs=False)
        return changed

    monkeypatch.setattr(hub, "_applied", corrupted)
    outcome = push()
    assert outcome.code == 1
    assert "config.json" in outcome.err


# What the Hub would make of it


def test_a_card_that_the_hub_rejects(hub, push, split_folder, tmp_path):
    folder = copy_with_config(split_folder, tmp_path / "folder", {})
    (folder / "README.md").write_text("---\nlicense: whatever-i-like\n---\nMine.\n")
    outcome = push(folder=folder)
    assert outcome.code == 2
    assert "license" in outcome.err
    assert not hub.repositories, "nothing was created for a card that cannot be pushed"
    (folder / "README.md").unlink()
    finishes(hub, lambda: push(folder=folder), folder)


def test_a_card_that_the_hub_rejects_for_an_existing_repository(hub, push, split_folder, tmp_path):
    hub.create(REPO, {"old.txt": b"1"})
    folder = copy_with_config(split_folder, tmp_path / "folder", {})
    (folder / "README.md").write_text("---\nlicense: whatever-i-like\n---\nMine.\n")
    outcome = push(folder=folder)
    assert outcome.code == 2
    assert not [seen for seen in hub.requests if "/lfs/" in seen.path or "/commit/" in seen.path]
    assert hub.files(REPO).keys() == {".gitattributes", "old.txt"}


def test_a_gitignore_that_would_drop_files(hub, push, split_folder):
    hub.create(REPO, {".gitignore": b"*.safetensors\n"})
    outcome = push()
    assert outcome.code == 2
    assert ".gitignore" in outcome.err
    assert "config.json" not in hub.files(REPO)


def copy_with_config(source, target, changes):
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target
