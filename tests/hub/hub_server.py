"""A Hugging Face Hub small enough to read: repositories in memory, no git, faults on demand.

    with HubServer() as hub, hub.client(home):      # this process; hub.environment(home) is for one that starts
        hub.on("POST /api/models/.*/commit/", lambda serve: Answer(503), times=2)

It answers what unmodified clients ask when they push and load, and is as strict as the Hub: a commit applies whole and
on the parent that it names, or not at all. xet is switched off in the client's environment. The methods below know the
Space alice/page as "spaces/alice/page".
"""

import base64
import contextlib
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest

TOKEN = "oauth-AliceWritesHere.0123456789"  # known by its value alone: it does not look like a token of the Hub


@dataclass
class Commit:
    parent: str | None
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    sdk: str | None = None  # of a Space
    refs: dict[str, str] = field(default_factory=dict)  # a branch, a tag or refs/pr/N -> commit
    commits: dict[str, Commit] = field(default_factory=dict)  # oldest first
    pull_requests: dict[str, str] = field(default_factory=dict)  # ref -> "open" or "closed"

    def commit(self, ref: str, title: str, files: dict[str, bytes], parent: str | None) -> str:
        """Let `ref` point at a new commit."""
        oid = self.refs[ref] = hashlib.sha1(f"{parent}{title}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = Commit(parent, title, files)
        return oid


def in_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".onnx", ".onnx_data", ".jpg"))


def name_of(path: str, data: bytes) -> str:
    """What the Hub calls a file: one in LFS by its sha256, any other by the name that git gives it."""
    if in_lfs(path):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Request(NamedTuple):
    """One request as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    signed_in: bool
    body: bytes

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


class HubServer(ThreadingHTTPServer):
    """The Hub on 127.0.0.1, in threads of this process. `requests` is every request seen, in order of arrival."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.RLock()
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # sha256 -> bytes, whether or not a commit points there
        self.requests: list[Request] = []
        self.faults: list[list] = []

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
        switches = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK", "HF_HUB_DISABLE_XET")
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}
        return {"HF_HUB_OFFLINE": "0", **ours, **dict.fromkeys(switches, "1")}

    @contextlib.contextmanager
    def client(self, home: str | Path, **variables: str):
        """Make this process a client, though huggingface_hub read its environment when it was imported."""
        from huggingface_hub import constants, utils

        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**self.environment(home), **variables}.items():
                patch.setenv(name, value)
            patch.setattr(constants, "ENDPOINT", self.url)
            template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "".join(template[1:]))
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            getattr(utils, "reset_sessions", lambda: None)()  # before 1.0, a session keeps what it was opened with
            yield patch

    # What tests do behind the client's back

    def on(self, pattern: str, act: Callable[[Callable], Answer | None], *, times: int = 1):
        """Let `act` answer the next `times` requests whose "METHOD /path" begins with the regex `pattern`.

        It gets the function that serves the request, and returns an answer or None, which cuts the connection.
        """
        self.faults.append([times, re.compile(pattern), act])

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, *, private=False, sdk=None):
        repository = self.repositories[repo_id] = Repository(private, sdk)
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        repository.commit("main", "initial commit", {".gitattributes": attributes, **(files or {})}, None)

    def commit(self, repo_id: str, files: dict[str, bytes]):
        """Add files to main, as somebody else would."""
        head = self.head(repo_id)
        self.repositories[repo_id].commit("main", "Edit", {**self.files(repo_id), **files}, head)

    def head(self, repo_id: str, ref: str = "main") -> str:
        return self.repositories[repo_id].refs[ref]

    def files(self, repo_id: str, ref: str = "main") -> dict[str, bytes]:
        return self.repositories[repo_id].commits[self.head(repo_id, ref)].files

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
        match parts:
            case ["spaces", owner, *rest]:
                parts = [f"spaces/{owner}", *rest]
            case ["api", "spaces", owner, *rest]:
                parts = ["api", "models", f"spaces/{owner}", *rest]
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
                about = {"sdk": self.repositories[f"{owner}/{name}"].sdk, "tags": [], "siblings": []}
                return Answer(body={"id": f"{owner}/{name}".removeprefix("spaces/"), "sha": oid, **about})
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

    def _create_repository(self, name, organization=None, private=False, visibility=None, type="", sdk=None) -> Answer:
        repo_id = f"{'spaces/' * (type == 'space')}{organization or 'alice'}/{name}"
        url = f"{self.url}/{repo_id}"
        if repo_id in self.repositories:
            raise Answer(409, {"error": "You already created this model repo", "url": url})
        template = {path: b"template" for path in ("README.md", "index.html", "style.css") if sdk == "static"}
        self.create(repo_id, template, private=private or visibility == "private", sdk=sdk)
        return Answer(body={"url": url})

    def _tree(self, commit: Commit) -> Answer:
        entries = []
        for path, data in commit.files.items():
            for parent in list(Path(path).parents)[:-1]:
                entries.append({"type": "directory", "oid": "0" * 40, "path": str(parent)})
            entry = {"type": "file", "oid": name_of(path, data), "size": len(data), "path": path}
            if in_lfs(path):  # git knows its pointer only
                entry |= {"oid": "0" * 40, "lfs": {"oid": entry["oid"], "size": len(data), "pointerSize": 130}}
            entries.append(entry)
        return Answer(body=entries)

    def _pull_requests(self, repo_id: str, query: dict[str, str]) -> Answer:
        listed = []
        for ref, status in self.repositories[repo_id].pull_requests.items():
            if query.get("status", status) == status:
                entry = {"num": int(ref.split("/")[-1]), "title": "", "status": status, "isPullRequest": True}
                kind, name = ("space", repo_id[7:]) if repo_id.startswith("spaces/") else ("model", repo_id)
                entry |= {"author": {"name": "alice"}, "repo": {"name": name, "type": kind}}
                listed.append({**entry, "createdAt": "2026-01-01T00:00:00.000Z"})
        return Answer(body={"discussions": listed, "count": len(listed), "start": 0})

    def _upload_modes(self, files: list[dict]) -> Answer:
        for file in files:
            file |= {"uploadMode": "lfs" if in_lfs(file["path"]) else "regular", "shouldIgnore": False}
        return Answer(body={"files": files})

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
                files[path] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[path] = self.objects[value["oid"]]
            else:
                del files[path]
        url, body = f"{self.url}/{repo_id}", {}
        if request.query.get("create_pr") == "1":
            number = len(repository.pull_requests) + 1
            branch, body["pullRequestUrl"] = f"refs/pr/{number}", f"{url}/discussions/{number}"
            repository.pull_requests[branch] = "open"
        oid = repository.commit(branch, header["value"]["summary"], files, head)
        return Answer(body={**body, "success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"})

    def _file(self, found: tuple[str, Commit], path: str) -> Answer:
        oid, commit = found
        if path not in commit.files:
            raise Answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        data = commit.files[path]
        return Answer(200, data, X_Repo_Commit=oid, ETag=f'"{name_of(path, data)}"')


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))  # whole, so that keep-alive stays in step
        signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        url = urlsplit(self.path)
        answer = self.server.serve(Request(self.command, url.path, dict(parse_qsl(url.query)), signed_in, body))
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
