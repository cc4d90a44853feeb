"""A Hugging Face Hub small enough to read: repositories in memory, no git, faults on demand.

    with HubServer() as hub, hub.client(home):      # this process; hub.environment(home) is for one that starts
        hub.on("POST /api/models/.*/commit/", lambda serve: Answer(503), times=2)

It answers what unmodified clients ask when they push and load, and is as strict as the Hub: a commit applies whole and
on the parent that it names, or not at all. xet is switched off in the client's environment.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "oauth-AliceWritesHere.0123456789"  # known by its value alone: it does not look like a token of the Hub


@dataclass(frozen=True)
class StoredFile:
    data: bytes
    lfs: bool = False

    @property
    def oid(self) -> str:
        """What the Hub calls it: an LFS file by its sha256, any other by the name that git gives it."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Commit:
    parent: str | None
    title: str
    files: dict[str, StoredFile]


@dataclass
class Repository:
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)  # a branch, a tag or refs/pr/N -> commit
    commits: dict[str, Commit] = field(default_factory=dict)  # oldest first
    closed: set[str] = field(default_factory=set)  # pull requests

    @property
    def pull_requests(self) -> list[str]:
        return [ref for ref in self.refs if ref.startswith("refs/pr/")]

    def commit(self, ref: str, title: str, files: dict[str, StoredFile], parent: str | None) -> str:
        """Let `ref` point at a new commit."""
        oid = self.refs[ref] = hashlib.sha1(f"{parent}{title}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = Commit(parent, title, files)
        return oid


@dataclass
class Request:
    """One request as it arrived."""

    method: str
    target: str
    signed_in: bool
    body: bytes = field(repr=False)

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        return {key: values[-1] for key, values in parse_qs(urlsplit(self.target).query).items()}

    def lines(self) -> list[dict]:
        """The JSON objects of its body, one a line."""
        return [json.loads(line) for line in self.body.splitlines()]


class Answer(Exception):
    """What the Hub says to a request, raised where it refuses. A body that is not bytes is sent as JSON."""

    def __init__(self, status: int = 200, body=b"", **headers: str):
        super().__init__(status, body)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        self.headers = {"Content-Type": kind, "Content-Length": str(len(self.body)), **named}


Serve = Callable[[], Answer]


class HubServer(ThreadingHTTPServer):
    """The Hub on 127.0.0.1, in threads of this process. `requests` is every request seen, in order of arrival."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.RLock()
        self.reset()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *arguments):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients may hang up
            super().handle_error(*arguments)

    def environment(self, home: str | Path) -> dict[str, str]:
        """What a client's process must be started with; huggingface_hub reads it once, at import."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        switches = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK", "HF_HUB_DISABLE_XET")
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}
        return kept | ours | dict.fromkeys(switches, "1")

    @contextlib.contextmanager
    def client(self, home: str | Path, **variables: str):
        """Make this process a client, though huggingface_hub read its environment when it was imported."""
        from huggingface_hub import constants, utils

        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"HF_HUB_OFFLINE": "0", **self.environment(home), **variables}.items():
                patch.setenv(name, value)
            patch.setattr(constants, "ENDPOINT", self.url)
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            getattr(utils, "reset_sessions", lambda: None)()  # before 1.0, a session keeps what it was opened with
            yield patch

    # What tests do behind the client's back

    def reset(self):
        """Forget every repository, file, request and fault."""
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # sha256 -> bytes, whether or not a commit points there
        self.requests: list[Request] = []
        self.faults: list[list] = []

    def on(self, pattern: str, act: Callable[[Serve], Answer | None], *, times: int = 1):
        """Let `act` answer the next `times` requests whose "METHOD /path" begins with the regex `pattern`.

        It gets the function that serves the request, and returns an answer or None, which cuts the connection.
        """
        self.faults.append([times, re.compile(pattern), act])

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, *, private=False):
        repository = self.repositories[repo_id] = Repository(private)
        attributes = StoredFile(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        repository.commit("main", "initial commit", {".gitattributes": attributes}, None)
        if files:
            self.commit(repo_id, files)

    def commit(self, repo_id: str, files: dict[str, bytes]):
        """Add regular files to main, as somebody else would."""
        repository, head = self.repositories[repo_id], self.head(repo_id)
        edited = {path: StoredFile(data) for path, data in files.items()}
        repository.commit("main", "Edit", {**repository.commits[head].files, **edited}, head)

    def head(self, repo_id: str, ref: str = "main") -> str:
        return self.repositories[repo_id].refs[ref]

    def files(self, repo_id: str, ref: str = "main") -> dict[str, bytes]:
        commit = self.repositories[repo_id].commits[self.head(repo_id, ref)]
        return {path: file.data for path, file in commit.files.items()}

    # Serving

    def serve(self, request: Request) -> Answer | None:
        """The answer, or what the first fault that is due makes of it."""
        with self.lock:
            self.requests.append(request)
            line = f"{request.method} {request.path}"
            due = next((fault for fault in self.faults if fault[0] and fault[1].match(line)), None)
            if due:
                due[0] -= 1
        return due[2](partial(self.answer, request)) if due else self.answer(request)

    def answer(self, request: Request) -> Answer:
        method = "GET" if request.method == "HEAD" else request.method
        if method == "POST" and not request.signed_in:  # an upload's address is a key itself
            return Answer(401, {"error": "Invalid username or password."})
        with self.lock:
            try:
                return self._route(method, [unquote(part) for part in request.path.split("/")[1:]], request)
            except Answer as refused:
                return refused

    def _route(self, method: str, parts: list[str], request: Request) -> Answer:
        match method, parts:
            case "POST", ["api", "repos", "create"]:
                return self._create_repository(**json.loads(request.body))
            case "POST", ["api", "validate-yaml"]:
                return Answer(body={"errors": [], "warnings": []})
            case "PUT", ["object", sha256] if sha256 == hashlib.sha256(request.body).hexdigest():
                self.objects[sha256] = request.body
                return Answer()
            case "POST", [_, _, "info", "lfs", "objects", "batch"]:
                return self._upload_addresses(json.loads(request.body)["objects"])
            case "GET", [owner, name, "resolve", revision, *path]:
                return self._file(self._commit_at(f"{owner}/{name}", revision), "/".join(path))
            case "GET", ["api", "models", owner, name] | ["api", "models", owner, name, "revision", _]:
                oid = self._commit_at(f"{owner}/{name}", parts[5] if parts[5:] else "main")[0]
                return Answer(body={"id": f"{owner}/{name}", "sha": oid, "tags": [], "siblings": []})
            case "GET", ["api", "models", owner, name, "tree", revision]:
                return self._tree(self._commit_at(f"{owner}/{name}", revision)[1])
            case "GET", ["api", "models", owner, name, "discussions"]:
                return self._pull_requests(f"{owner}/{name}", request.query)
            case "POST", ["api", "models", owner, name, "branch", branch]:
                refs = self.repositories[f"{owner}/{name}"].refs
                refs[branch] = refs["main"]
                return Answer()
            case "POST", ["api", "models", owner, name, "preupload", revision]:
                return self._upload_modes(json.loads(request.body)["files"])
            case "POST", ["api", "models", owner, name, "commit", branch]:
                return self._apply_commit(f"{owner}/{name}", branch, request)
        raise Answer(404, X_Error_Code="EntryNotFound")

    def _commit_at(self, repo_id: str, revision: str) -> tuple[str, Commit]:
        if repo_id not in self.repositories:
            raise Answer(404, X_Error_Code="RepoNotFound")
        repository = self.repositories[repo_id]
        oid = repository.refs.get(revision, revision)
        if oid not in repository.commits:
            raise Answer(404, X_Error_Code="RevisionNotFound")
        return oid, repository.commits[oid]

    def _create_repository(self, name, organization=None, private=False, visibility=None, **_) -> Answer:
        repo_id = f"{organization or 'alice'}/{name}"
        url = f"{self.url}/{repo_id}"
        if repo_id in self.repositories:
            raise Answer(409, {"error": "You already created this model repo", "url": url})
        self.create(repo_id, private=private or visibility == "private")
        return Answer(body={"url": url})

    def _tree(self, commit: Commit) -> Answer:
        entries = []
        for path, stored in commit.files.items():
            for parent in list(Path(path).parents)[:-1]:
                entries.append({"type": "directory", "oid": "0" * 40, "path": str(parent)})
            entry = {"type": "file", "oid": stored.oid, "size": len(stored.data), "path": path}
            if stored.lfs:  # git knows its pointer only
                entry |= {"oid": "0" * 40, "lfs": {"oid": stored.oid, "size": len(stored.data), "pointerSize": 130}}
            entries.append(entry)
        return Answer(body=entries)

    def _pull_requests(self, repo_id: str, query: dict[str, str]) -> Answer:
        repository, listed = self.repositories[repo_id], []
        for ref in repository.pull_requests:
            status = "closed" if ref in repository.closed else "open"
            if query.get("status", status) == status:
                entry = {"num": int(ref.split("/")[-1]), "title": "", "status": status, "isPullRequest": True}
                entry |= {"author": {"name": "alice"}, "repo": {"name": repo_id, "type": "model"}}
                listed.append({**entry, "createdAt": "2026-01-01T00:00:00.000Z"})
        return Answer(body={"discussions": listed, "count": len(listed), "start": 0})

    def _upload_modes(self, files: list[dict]) -> Answer:
        modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in files}
        answers = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        return Answer(body={"files": answers})

    def _upload_addresses(self, wanted: list[dict]) -> Answer:
        for item in wanted:
            if item["oid"] not in self.objects:
                item["actions"] = {"upload": {"href": f"{self.url}/object/{item['oid']}"}}
        return Answer(body={"transfer": "basic", "objects": wanted})

    def _apply_commit(self, repo_id: str, branch: str, request: Request) -> Answer:
        repository, (head, commit) = self.repositories[repo_id], self._commit_at(repo_id, branch)
        (header, *operations), files = request.lines(), dict(commit.files)
        if header["value"].get("parentCommit", head) != head:
            raise Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        for operation in operations:
            path, value = operation["value"]["path"], operation["value"]
            if operation["key"] == "file":
                files[path] = StoredFile(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                files[path] = StoredFile(self.objects[value["oid"]], lfs=True)
            else:
                del files[path]
        url, body = f"{self.url}/{repo_id}", {}
        if request.query.get("create_pr") == "1":
            number = len(repository.pull_requests) + 1
            branch, body["pullRequestUrl"] = f"refs/pr/{number}", f"{url}/discussions/{number}"
        oid = repository.commit(branch, header["value"]["summary"], files, head)
        return Answer(body={**body, "success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"})

    def _file(self, found: tuple[str, Commit], path: str) -> Answer:
        oid, commit = found
        if path not in commit.files:
            raise Answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        stored = commit.files[path]
        return Answer(200, stored.data, X_Repo_Commit=oid, ETag=f'"{stored.oid}"')


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))  # whole, so that keep-alive stays in step
        signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        answer = self.server.serve(Request(self.command, self.path, signed_in, body))
        if answer is None:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_):
        pass
