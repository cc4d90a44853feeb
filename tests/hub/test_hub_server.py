"""The Hub of the tests answers an unmodified huggingface_hub as the real one does: LFS (one part, several) and xet.

Each case is one client process with its own environment, which huggingface_hub reads at import.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading

import hub_server
import pytest
from hub_server import OTHER_TOKEN, TOKEN, HubServer

# What a client prints here is compared below: everything a push or a load asks of the Hub.
CLIENT = r"""
import json, os, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.utils import HfHubHTTPError

api, home = HfApi(), Path(os.environ["HF_HOME"])
seen = {"name": api.whoami()["name"]}
api.create_repo("alice/m", private=True)
seen["again"] = str(api.create_repo("alice/m", exist_ok=True))
data = bytes(range(256)) * 700 + os.urandom(1000)
(home / "w.safetensors").write_bytes(data)

def additions():
    card = b"---\nlicense: mit\n---\nHi"
    files = {"model.safetensors": home / "w.safetensors", "sub/a.json": b"{}", "README.md": card}
    return [CommitOperationAdd(path, content) for path, content in files.items()]

def refused(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)

parent = api.model_info("alice/m").sha
first = api.create_commit("alice/m", additions(), commit_message="first", parent_commit=parent)
seen["url"] = first.commit_url == f"{api.endpoint}/alice/m/commit/{first.oid}"
seen["no-op"] = api.create_commit("alice/m", additions(), commit_message="again").oid == first.oid
files = {f.path: f for f in api.list_repo_tree("alice/m", recursive=True) if hasattr(f, "blob_id")}
seen["files"] = sorted(files)
seen["sha256"] = files["model.safetensors"].lfs.sha256
seen["blob"] = files["sub/a.json"].blob_id
seen["info"] = [f.size for f in api.get_paths_info("alice/m", ["sub/a.json", "absent"])]
seen["list"] = sorted(api.list_repo_files("alice/m"))
edits = [CommitOperationAdd("a.txt", b"x"), CommitOperationDelete("sub/", is_folder=True)]
request = api.create_commit("alice/m", edits, commit_message="ask", create_pr=True)
seen["request"] = request.pr_revision, [d.title for d in api.get_repo_discussions("alice/m")]
seen["its files"] = sorted(api.list_repo_files("alice/m", revision="refs/pr/1"))
seen["main"] = api.model_info("alice/m").sha == first.oid
api.create_branch("alice/m", branch="dev/one")
api.create_tag("alice/m", tag="v1")
seen["refs"] = [r.name for r in api.list_repo_refs("alice/m").branches + api.list_repo_refs("alice/m").tags]
seen["commits"] = [(c.title, c.authors) for c in api.list_repo_commits("alice/m")]
folder = Path(snapshot_download("alice/m", revision="v1"))
seen["downloaded"] = (folder / "model.safetensors").read_bytes() == data, (folder / "sub" / "a.json").read_text()

edit = lambda path, content: [CommitOperationAdd(path, content)]
commit = lambda operations, **options: api.create_commit("alice/m", operations, commit_message="x", **options)
seen["stale parent"] = refused(lambda: commit(edit("b", b"1"), parent_commit=parent))
seen["bad card"] = refused(lambda: commit(edit("README.md", b"---\nlicense: mine\n---\n")))
seen["no such file"] = refused(lambda: commit([CommitOperationDelete("absent")]))
seen["no such branch"] = refused(lambda: commit(edit("b", b"1"), revision="absent"))
seen["no such repository"] = refused(lambda: api.model_info("alice/absent"))
seen["branch exists"] = refused(lambda: api.create_branch("alice/m", branch="dev/one"))
seen["not ours"] = refused(lambda: api.create_repo("bob/m"))
seen["in the end"] = api.model_info("alice/m").sha == first.oid
print(json.dumps(seen))
"""


def client(hub, home, program, token=TOKEN):
    environment = hub.environment(home, token)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("transfer", ["lfs", "multipart", "xet"])
def test_an_unmodified_client_pushes_and_reads(tmp_path, transfer):
    if transfer == "xet" and not hub_server.xet_works():
        pytest.skip("this hf_xet has no store on the file system")
    part_size = 50_000 if transfer == "multipart" else None
    with HubServer(per_page=2, part_size=part_size, xet=transfer == "xet") as hub:
        seen = client(hub, tmp_path, CLIENT)
        stored = hub.files("alice/m")["model.safetensors"]
        expected = sorted([".gitattributes", "README.md", "model.safetensors", "sub/a.json"])
        assert seen == {
            "name": "alice",
            "again": f"{hub.url}/alice/m",
            "url": True,
            "no-op": True,
            "files": expected,
            "sha256": hashlib.sha256(stored).hexdigest(),
            "blob": "9e26dfeeb6e641a33dae4961196235bdb965b21b",  # what `git hash-object` says of {}
            "info": [2],
            "list": expected,
            "request": ["refs/pr/1", ["ask"]],
            "its files": sorted([".gitattributes", "README.md", "a.txt", "model.safetensors"]),
            "main": True,
            "refs": ["main", "dev/one", "v1"],
            "commits": [["first", ["alice"]], ["initial commit", ["system"]]],
            "downloaded": [True, "{}"],
            "stale parent": ["HfHubHTTPError", 412],
            "bad card": ["ValueError", None],
            "no such file": seen["no such file"],  # the name of the class changed between versions
            "no such branch": ["RevisionNotFoundError", 404],
            "no such repository": ["RepositoryNotFoundError", 404],
            "branch exists": ["HfHubHTTPError", 409],
            "not ours": ["HfHubHTTPError", 403],
            "in the end": True,
        }
        assert seen["no such file"][1] == 404
        assert hub.repositories["alice/m"].private
        asked = {(seen.server, seen.method, seen.path.split("/")[1]) for seen in hub.requests}
        assert (("cdn", "PUT", "object") in asked) == (transfer == "lfs")
        assert (("cdn", "PUT", "part") in asked) == (transfer == "multipart")
        tokens = [seen for seen in hub.requests if "/xet-write-token/" in seen.path]
        assert bool(tokens) == (transfer == "xet")
        assert_the_cdn_saw_no_token(hub)


def assert_the_cdn_saw_no_token(hub):
    for seen in hub.requests:
        if seen.server == "cdn":
            assert "authorization" not in seen.headers
            assert TOKEN not in f"{seen.target}{seen.headers}"
            assert TOKEN.encode() not in seen.body


READER = r"""
import json
from huggingface_hub import HfApi, hf_hub_download, model_info
seen = {}
for repo in ("alice/public", "alice/private", "alice/gated"):
    for name, call in (("info", lambda: model_info(repo)), ("file", lambda: hf_hub_download(repo, "a.txt"))):
        try:
            call()
            seen[f"{repo} {name}"] = "ok"
        except Exception as error:
            seen[f"{repo} {name}"] = type(error).__name__
print(json.dumps(seen))
"""


@pytest.mark.parametrize(
    ("token", "gated"), [(TOKEN, "ok"), (OTHER_TOKEN, "GatedRepoError"), (None, "GatedRepoError")]
)
def test_who_may_read_what(tmp_path, token, gated):
    with HubServer() as hub:
        for name in ("public", "private", "gated"):
            hub.create(f"alice/{name}", {"a.txt": b"1"}, private=name == "private", gated=name == "gated")
        private = "ok" if token == TOKEN else "RepositoryNotFoundError"
        seen = client(hub, tmp_path, READER, token)
    assert seen["alice/public info"] == seen["alice/public file"] == "ok"
    assert seen["alice/private info"] == private
    assert seen["alice/gated info"] == "ok"
    assert seen["alice/gated file"] == gated


def test_a_broken_download_is_resumed(tmp_path):
    data = os.urandom(25_000_000)  # the client asks for 10 MB at a time
    program = """
import hashlib, json
from huggingface_hub import hf_hub_download
for attempt in range(2):  # huggingface_hub before 1.0 resumes on the next call
    try:
        path = hf_hub_download("alice/m", "w.safetensors")
        break
    except Exception:
        if attempt:
            raise
print(json.dumps(hashlib.sha256(open(path, "rb").read()).hexdigest()))
"""
    with HubServer() as hub:
        hub.create("alice/m", {"w.safetensors": data})
        hub.cut("GET /object/", "during")
        assert client(hub, tmp_path, program) == hashlib.sha256(data).hexdigest()
        assert any("range" in seen.headers for seen in hub.requests if seen.server == "cdn")


def test_it_stops_by_itself_and_binds_loopback_only():
    before = threading.active_count()
    with HubServer() as hub:
        addresses = {listener.server_address[0] for listener in hub._listeners}
        scratch = hub.scratch
    assert addresses == {"127.0.0.1", "127.0.0.2"}
    assert threading.active_count() <= before
    assert not scratch.exists()
