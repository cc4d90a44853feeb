"""The Hub of the tests answers an unmodified huggingface_hub as the real one does."""

import hashlib
import json
import subprocess
import sys
import threading

from hub_server import TOKEN, HubServer

# What a client prints here is compared below: everything a push or a load asks of the Hub.
CLIENT = r"""
import json, os, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download

api, home = HfApi(), Path(os.environ["HF_HOME"])
api.create_repo("alice/m", private=True)
seen = {"again": str(api.create_repo("alice/m", exist_ok=True))}
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
edits = [CommitOperationAdd("a.txt", b"x"), CommitOperationDelete("sub/a.json")]
request = api.create_commit("alice/m", edits, commit_message="ask", create_pr=True)
seen["request"] = request.pr_revision, [d.title for d in api.get_repo_discussions("alice/m")]
seen["its files"] = sorted(api.list_repo_files("alice/m", revision="refs/pr/1"))
seen["main"] = api.model_info("alice/m").sha == first.oid
api.create_branch("alice/m", branch="dev/one")
folder = Path(snapshot_download("alice/m", revision="dev/one"))
seen["downloaded"] = (folder / "model.safetensors").read_bytes() == data, (folder / "sub" / "a.json").read_text()

edit = lambda path, content: [CommitOperationAdd(path, content)]
commit = lambda operations, **options: api.create_commit("alice/m", operations, commit_message="x", **options)
seen["stale parent"] = refused(lambda: commit(edit("b", b"1"), parent_commit=parent))
seen["bad card"] = refused(lambda: commit(edit("README.md", b"---\nlicense: mine\n---\n")))
seen["no such file"] = refused(lambda: commit([CommitOperationDelete("absent")]))[1]  # classes differ by version
seen["no such branch"] = refused(lambda: commit(edit("b", b"1"), revision="absent"))
seen["no such repository"] = refused(lambda: api.model_info("alice/absent"))
seen["branch exists"] = refused(lambda: api.create_branch("alice/m", branch="dev/one"))
seen["not ours"] = refused(lambda: api.create_repo("bob/m"))
seen["in the end"] = api.model_info("alice/m").sha == first.oid
print(json.dumps(seen))
"""


def test_an_unmodified_client_pushes_and_reads(tmp_path):
    with HubServer() as hub:
        command, environment = [sys.executable, "-c", CLIENT], hub.environment(tmp_path)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        seen = json.loads(done.stdout.splitlines()[-1])
        assert seen == {
            "again": f"{hub.url}/alice/m",
            "url": True,
            "no-op": True,
            "files": [".gitattributes", "README.md", "model.safetensors", "sub/a.json"],
            "sha256": hashlib.sha256(hub.files("alice/m")["model.safetensors"]).hexdigest(),
            "blob": "9e26dfeeb6e641a33dae4961196235bdb965b21b",  # what `git hash-object` says of {}
            "request": ["refs/pr/1", ["ask"]],
            "its files": [".gitattributes", "README.md", "a.txt", "model.safetensors"],
            "main": True,
            "downloaded": [True, "{}"],
            "stale parent": ["HfHubHTTPError", 412],
            "bad card": ["ValueError", None],
            "no such file": 404,
            "no such branch": ["RevisionNotFoundError", 404],
            "no such repository": ["RepositoryNotFoundError", 404],
            "branch exists": ["HfHubHTTPError", 409],
            "not ours": ["HfHubHTTPError", 403],
            "in the end": True,
        }
        assert hub.repositories["alice/m"].private
        to_cdn = [seen for seen in hub.requests if seen.server == "cdn"]
        assert {seen.method for seen in to_cdn} == {"PUT", "GET"}
        assert not any(TOKEN in f"{seen.target}{seen.headers}" or TOKEN.encode() in seen.body for seen in to_cdn)


def test_it_stops_by_itself_and_binds_loopback_only():
    before = threading.active_count()
    with HubServer() as hub:
        addresses = {listener.server_address[0] for listener in hub.listeners}
    assert addresses == {"127.0.0.1", "127.0.0.2"}
    assert threading.active_count() <= before
