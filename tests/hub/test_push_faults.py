"""Whatever the Hub or the network does, the branch holds the old commit or the whole new one; a new run ends it."""

import pytest
from hub_server import TOKEN, Answer

REPO = "alice/sam"
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
    "commit": f"POST /api/models/{REPO}/commit/",
}
FAULTS = {
    "503": Answer(503),
    "429": Answer(429),
    "cut": None,
    "html": Answer(200, b"<!DOCTYPE html><html><body>Please sign in to the guest network</body></html>"),
    "other JSON": Answer(200, {"fine": True}),
}


def published(hub, folder, ref="main") -> bool:
    """Whether a branch holds every file of the folder, the card included."""
    files = hub.files(REPO, ref)
    here = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".py", ".safetensors")}
    return here.items() <= files.items() and b"trust_remote_code" in files.get("README.md", b"")


def untouched(hub) -> bool:
    return REPO not in hub.repositories or hub.files(REPO).keys() == {".gitattributes"}


def finishes(hub, push, folder):
    """The command, run again on a healthy Hub, does what is left and then has nothing to do."""
    hub.faults.clear()
    push(folder, REPO)
    assert published(hub, folder)
    commits = len(hub.repositories[REPO].commits)
    assert "Nothing to do" in push(folder, REPO).out
    assert len(hub.repositories[REPO].commits) == commits


def lost(answer):
    """The request is served, and its answer is another one."""
    return lambda serve: (serve(), answer)[1]


@pytest.mark.parametrize("step", ["preupload", "batch", "upload"])
@pytest.mark.parametrize("fault", ["503", "cut"])
def test_an_upload_survives_one_error(hub, push, folder, step, fault):
    hub.on(STEPS[step], lambda serve: FAULTS[fault])
    outcome = push(folder, REPO)
    assert outcome.slept, "the fault was met, and waited for"
    assert published(hub, folder)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", ["503", "429", "cut", "html"])
def test_an_error_that_stays_ends_the_push_and_the_next_run_finishes(hub, push, folder, step, fault):
    hub.on(STEPS[step], lambda serve: FAULTS[fault], times=ALWAYS)
    unread = (fault, step) == ("html", "upload")
    outcome = push(folder, REPO, code=None if unread else 1)
    assert unread or "run the command again" in outcome.err
    assert unread or untouched(hub)
    finishes(hub, push, folder)


@pytest.mark.parametrize("step", [step for step in STEPS if step != "commit"])
def test_a_lost_answer_on_the_way(hub, push, folder, step):
    hub.on(STEPS[step], lost(None))
    push(folder, REPO, code=None)
    finishes(hub, push, folder)
    assert len(hub.repositories[REPO].commits) == 2


REFUSALS = {
    "does not accept the token": Answer(401),
    "no permission for alice/sam": Answer(403),
    "<token> and <token> may read": Answer(403, X_Error_Message=f"{TOKEN} and hf_{'A1' * 15} may read"),
    "not found": Answer(404, X_Error_Code="RepoNotFound"),
    "ask for it": Answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted, ask for it"),
}


@pytest.mark.parametrize("step", ["read", "create", "list", "batch", "commit"])
@pytest.mark.parametrize("words", REFUSALS)
def test_a_refusal_is_explained_and_not_retried(hub, push, folder, step, words):
    hub.on(STEPS[step], lambda serve: REFUSALS[words], times=ALWAYS)
    missing = (step, words) == ("read", "not found")  # then it is created, and still not found
    outcome = push(folder, REPO, code=1)
    assert ("was created but cannot be read" if missing else words) in outcome.err
    assert not outcome.slept
    assert untouched(hub)


def test_the_repository_appears_between_looking_and_creating(hub, push, folder):
    hub.on(STEPS["create"], lambda serve: (hub.create(REPO), serve())[1])
    push(folder, REPO)
    assert published(hub, folder)


@pytest.mark.parametrize("moment", ["preupload", "upload", "commit"])
def test_a_push_in_between_is_not_overwritten(hub, push, folder, moment):
    hub.create(REPO, {"config.json": b'{"model_type": "theirs"}', "theirs.txt": b"1"})
    theirs = {"config.json": b"{}", "theirs.txt": b"2"}
    hub.on(STEPS[moment], lambda serve: (hub.commit(REPO, theirs), serve())[1])
    assert "Nothing was overwritten" in push(folder, REPO, code=1).err
    assert hub.files(REPO)["config.json"] == b"{}"
    assert "model.safetensors" not in hub.files(REPO)
    finishes(hub, push, folder)
    assert hub.files(REPO)["theirs.txt"] == b"2"


# The commit landed, its answer did not


@pytest.mark.parametrize("fault", ["503", "cut", "html", "other JSON"])
def test_a_lost_answer_to_the_commit_is_found_out(hub, push, folder, fault):
    hub.on(STEPS["commit"], lost(FAULTS[fault]))
    outcome = push(folder, REPO)
    assert "was lost, but the commit is there" in outcome.out
    assert hub.head(REPO) in outcome.out
    finishes(hub, push, folder)
    assert len(hub.repositories[REPO].commits) == 2


def test_a_lost_answer_to_a_pull_request_opens_no_second_one(hub, push, folder):
    hub.create(REPO)
    hub.on(STEPS["commit"], lost(None))
    outcome = push(folder, REPO, "--create-pr")
    assert hub.repositories[REPO].pull_requests == {"refs/pr/1": "open"}
    assert f"{hub.url}/{REPO}/discussions/1" in outcome.out
    assert published(hub, folder, "refs/pr/1")


def test_a_lost_answer_and_nobody_to_ask(hub, push, folder):
    hub.create(REPO)

    def break_down(serve):
        serve()
        hub.on(STEPS["read"], lambda _: FAULTS["503"], times=ALWAYS)

    hub.on(STEPS["commit"], break_down)
    assert "run the command again" in push(folder, REPO, code=1).err
    assert published(hub, folder)
    finishes(hub, push, folder)


@pytest.mark.parametrize("path", ["config.json", "model.safetensors"])
def test_what_the_hub_stored_is_compared(hub, push, folder, path):
    def corrupt(serve):
        answer = serve()
        hub.files(REPO)[path] = b"{ }"
        return answer

    hub.on(STEPS["commit"], corrupt)
    assert f"these files differ: {path}" in push(folder, REPO, code=1).err


# What the Hub would make of it


def test_a_card_that_the_hub_rejects(hub, push, folder):
    hub.on(STEPS["card"], lambda serve: Answer(400, {"errors": [{"message": '"license" must be one of'}]}))
    assert '"license" must be one of' in push(folder, REPO, code=2).err
    finishes(hub, push, folder)


@pytest.mark.parametrize(
    ("path", "words"),
    [(".gitignore", "silently drops files that match"), ("adapter_config.json", "in a repository of its own")],
)
def test_a_repository_that_the_files_do_not_fit(hub, push, folder, path, words):
    hub.create(REPO, {path: b"*.safetensors\n"})
    assert words in push(folder, REPO, code=2).err
    assert "config.json" not in hub.files(REPO)
