"""A Hugging Face Hub small enough to read: repositories in memory, no git, faults on demand.

    with HubServer() as hub:                        # the Hub on 127.0.0.1, its file store ("CDN") on 127.0.0.2
        environment = hub.environment(home)         # for the process that imports huggingface_hub
        hub.fail("POST /api/models/.*/commit/", 503, times=2)

It answers what unmodified clients ask when they push and load, and is as strict as the Hub: a commit applies whole and
on the parent that it names, or not at all; the CDN refuses a token. xet is switched off in the client's environment.
"""

import base64
import hashlib
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

TOKEN = "oauth-AliceWritesHere.0123456789"  # known by its value alone: it does not look like a token of the Hub
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LICENCES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "openrail", "other"}


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit. `oid` is what git would call it: for an LFS file, the name of its pointer."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        content = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    files: dict[str, StoredFile]
    title: str


@dataclass
class Repository:
    id: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: list[Commit] = field(default_factory=list)
    closed: set[int] = field(default_factory=set)  # numbers of pull requests
    commits: dict[str, Commit] = field(default_factory=dict)  # oldest first

    def resolve(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag, `refs/pr/N` or a sha names."""
        requests = {f"refs/pr/{number}": commit.oid for number, commit in enumerate(self.pull_requests, start=1)}
        return self.commits.get({**self.tags, **self.branches, **requests}.get(revision, revision))

    def add_commit(self, parent: str | None, files: dict[str, StoredFile], title: str) -> Commit:
        oid = hashlib.sha1(f"{parent}{title}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, files, title)
        return self.commits[oid]


@dataclass
class Request:
    """One request as it arrived, and the status it got (0 if the connection was cut)."""

    server: str
    method: str
    target: str
    headers: dict[str, str]
    body: bytes = field(default=b"", repr=False)
    user: str | None = None
    status: int = 0

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, str]:
        return {key: values[-1] for key, values in parse_qs(self.target.partition("?")[2]).items()}

    def json(self):
        return json.loads(self.body)


@dataclass
class Answer:
    body: bytes | dict | list = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What happens instead to the next `times` requests that match `pattern`.

    `act` gets the function that serves the request and returns the answer, or None to close the connection.
    """

    pattern: str
    times: int
    act: Callable[[Callable[[], Answer | None]], Answer | None]


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer({"error": message}, status, headers)


class HubServer:
    """The Hub and its CDN, in two threads of this process.

    Attributes:
        requests: every request seen, in order of arrival.
        users: token -> user name.
    """

    def __init__(self):
        self.users = {TOKEN: "alice"}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # sha256 -> bytes, whether or not a commit points there
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.listeners = [_Listener("127.0.0.1", "hub", self), _Listener("127.0.0.2", "cdn", self)]
        self.url, self.cdn_url = (listener.url for listener in self.listeners)

    def __enter__(self):
        for listener in self.listeners:
            threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        for listener in self.listeners:
            listener.shutdown()
            listener.server_close()

    def environment(self, home: str | Path) -> dict[str, str]:
        """What a client's process must be started with; huggingface_hub reads it once, at import."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1,127.0.0.2",
        }

    # Faults: each is for the next `times` requests that match `pattern`, a regex on "METHOD /path"

    def fail(self, pattern: str, status: int, body=b"", headers=None, *, times: int = 1, after=False):
        """Answer `status`; `after` the request was served, as if the true answer were lost."""
        answer = Answer(body or {"error": f"fault {status}"}, status, headers or {})
        self.faults.append(Fault(pattern, times, lambda serve: (after and serve(), answer)[1]))

    def cut(self, pattern: str, *, times: int = 1, after=False):
        """Close the connection, before or `after` the request is served."""
        self.faults.append(Fault(pattern, times, lambda serve: (after and serve(), None)[1]))

    def hook(self, pattern: str, call: Callable[[], object], *, times: int = 1):
        """Call something before the request is served."""
        self.faults.append(Fault(pattern, times, lambda serve: (call(), serve())[1]))

    def serve(self, request: Request) -> Answer | None:
        """The answer, or what the faults that are due make of it."""
        line, serve = f"{request.method} {request.path}", partial(self.answer, request)
        with self.lock:
            self.requests.append(request)
            due = [fault for fault in self.faults if fault.times and re.match(fault.pattern, line)]
            for fault in due:
                fault.times -= 1
                serve = partial(fault.act, serve)
        return serve()

    def reset(self):
        """Forget every repository, object, fault and request; know the token."""
        with self.lock:
            self.users[TOKEN] = "alice"
            for forgotten in (self.repositories, self.objects, self.requests, self.faults):
                forgotten.clear()

    # Straight to the store, without a client

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, *, private=False) -> Repository:
        with self.lock:
            repository = self.repositories[repo_id] = Repository(repo_id, private)
            attributes = {".gitattributes": StoredFile(GITATTRIBUTES, lfs=False)}
            repository.branches["main"] = repository.add_commit(None, attributes, "initial commit").oid
        if files:
            self.commit(repo_id, files)
        return repository

    def commit(self, repo_id: str, files: dict[str, bytes]) -> None:
        """Add files to main as somebody else would, behind the back of the client under test."""
        with self.lock:
            repository = self.repositories[repo_id]
            parent = repository.resolve("main")
            tree = {path: StoredFile(data, _belongs_in_lfs(path)) for path, data in files.items()}
            repository.branches["main"] = repository.add_commit(parent.oid, {**parent.files, **tree}, "Edit").oid
            self.objects |= {stored.sha256: stored.data for stored in tree.values()}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: file.data for path, file in self.repositories[repo_id].resolve(revision).files.items()}

    # Serving

    def answer(self, request: Request) -> Answer:
        routes = ROUTES if request.server == "hub" else CDN_ROUTES
        method = "GET" if request.method == "HEAD" else request.method
        try:
            if request.server == "hub":
                request.user = self._user(request)
            elif "authorization" in request.headers:  # S3 refuses a presigned address that comes with a second proof
                raise HubError(400, "Only one auth mechanism allowed")
            for verb, pattern, handler in routes:
                match = re.fullmatch(pattern, request.path)
                if verb == method and match:
                    with self.lock:
                        return handler(self, request, *match.groups())
            raise HubError(404, f"no route for {request.method} {request.path}")
        except HubError as error:
            return error.answer

    def _user(self, request: Request) -> str | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users.get(token)

    def _signed_in(self, request: Request) -> str:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        return request.user

    def _repository(self, request: Request, repo_id: str, *, write=False) -> Repository:
        repo_id = unquote(repo_id)
        repository, owner = self.repositories.get(repo_id), repo_id.split("/")[0]
        if repository is None:
            # huggingface.co leaves the code out for anonymous users; its client knows that case by https alone.
            raise HubError(404 if request.user else 401, "Repository not found", "RepoNotFound")
        if write and self._signed_in(request) != owner and request.query.get("create_pr") != "1":
            raise HubError(403, f"You don't have the rights to write to {repo_id}")
        return repository

    def _commit_at(self, repository: Repository, revision: str) -> Commit:
        commit = repository.resolve(unquote(revision))
        if commit is None:
            raise HubError(404, f"Invalid rev id: {unquote(revision)}", "RevisionNotFound")
        return commit

    def create_repo(self, request):
        user, wanted = self._signed_in(request), request.json()
        owner = wanted.get("organization") or user
        repo_id = f"{owner}/{wanted['name']}"
        url = f"{self.url}/{repo_id}"
        if owner != user:
            raise HubError(403, f"You don't have the rights to create a model under the namespace {owner}")
        if repo_id in self.repositories:
            return Answer({"error": "You already created this model repo", "url": url}, 409)
        self.create(repo_id, private=wanted.get("private", False) or wanted.get("visibility") == "private")
        return Answer({"url": url, "name": repo_id, "id": repo_id})

    def validate_yaml(self, request):
        licence = re.search(r"^license: (.*)$", request.json()["content"].partition("\n---")[0], re.MULTILINE)
        if licence and licence[1] not in LICENCES:
            return Answer(
                {"errors": [{"message": f'"license" must be one of {sorted(LICENCES)}'}], "warnings": []}, 400
            )
        return Answer({"errors": [], "warnings": []})

    def info(self, request, repo_id, revision="main"):
        repository = self._repository(request, repo_id)
        commit = self._commit_at(repository, revision)
        known = {"id": repository.id, "sha": commit.oid, "private": repository.private, "tags": []}
        return Answer({**known, "siblings": [{"rfilename": path} for path in sorted(commit.files)]})

    def tree(self, request, repo_id, revision, folder=""):
        """Every file below a folder, and the folders on the way, whatever `recursive` says."""
        commit = self._commit_at(self._repository(request, repo_id), revision)
        entries = {}
        for path, stored in sorted(commit.files.items()):
            if path.startswith(f"{unquote(folder)}/" if folder else ""):
                for parent in list(Path(path).parents)[:-1]:
                    entries[str(parent)] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": str(parent)}
                entries[path] = {"type": "file", "oid": stored.oid, "size": len(stored.data), "path": path}
                if stored.lfs:
                    entries[path]["lfs"] = {"oid": stored.sha256, "size": len(stored.data), "pointerSize": 130}
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        return Answer(list(entries.values()))

    def discussions(self, request, repo_id):
        repository, listed = self._repository(request, repo_id), []
        for number, commit in enumerate(repository.pull_requests, start=1):
            status = "closed" if number in repository.closed else "open"
            entry = {"num": number, "title": commit.title, "status": status, "isPullRequest": True}
            entry |= {"author": {"name": "alice"}, "repo": {"name": repository.id, "type": "model"}}
            listed.append({**entry, "createdAt": "2026-01-01T00:00:00.000Z"})
        return Answer({"discussions": listed, "count": len(listed), "start": 0})

    def create_branch(self, request, repo_id, name):
        repository, name = self._repository(request, repo_id, write=True), unquote(name)
        if name in repository.branches:
            return Answer({"error": "Reference already exists"}, 409)
        repository.branches[name] = repository.branches["main"]
        return Answer({})

    def preupload(self, request, repo_id, revision):
        commit = self._commit_at(self._repository(request, repo_id, write=True), revision)
        files = []
        for wanted in request.json()["files"]:
            path = wanted["path"]
            answer = {"path": path, "uploadMode": "lfs" if _belongs_in_lfs(path) else "regular", "shouldIgnore": False}
            files.append(answer | ({"oid": commit.files[path].etag} if path in commit.files else {}))
        return Answer({"commitOid": commit.oid, "files": files})

    def lfs_batch(self, request, repo_id):
        self._repository(request, repo_id)  # who may only open a pull request uploads here too
        self._signed_in(request)
        objects = []
        for item in request.json()["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.objects:
                upload = {"href": f"{self.cdn_url}/object/{item['oid']}?signature=0"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/lfs-verify"}}
            objects.append(answer)
        return Answer({"transfer": "basic", "objects": objects})

    def lfs_verify(self, request):
        wanted = request.json()
        if len(self.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, "Object not found or of another size")
        return Answer({})

    def apply_commit(self, request, repo_id, revision):
        repository, branch = self._repository(request, repo_id, write=True), unquote(revision)
        if branch not in repository.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = repository.resolve(branch)
        header, *lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        if not head.oid.startswith(header["value"].get("parentCommit") or ""):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        commit = repository.add_commit(head.oid, self.applied(dict(head.files), lines), header["value"]["summary"])
        body = {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.url}/{repo_id}/commit/{commit.oid}"}
        if request.query.get("create_pr") == "1":
            repository.pull_requests.append(commit)
            body["pullRequestUrl"] = f"{self.url}/{repo_id}/discussions/{len(repository.pull_requests)}"
        else:
            repository.branches[branch] = commit.oid
        return Answer(body)

    def applied(self, tree: dict[str, StoredFile], lines: list[dict]) -> dict[str, StoredFile]:
        """The files after the operations of a commit."""
        for line in lines:
            key, value = line["key"], line["value"]
            path = value.get("path", "")
            if key == "file":
                tree[path] = StoredFile(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.objects:
                    message = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
                    raise HubError(400, f"{message} Offending file: - {path}")
                tree[path] = StoredFile(self.objects[value["oid"]], lfs=True)
            elif key == "deletedFile":
                if path not in tree:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                del tree[path]
        return tree

    def resolve_file(self, request, repo_id, revision, path):
        repository = self._repository(request, repo_id)
        commit = self._commit_at(repository, revision)
        stored = commit.files.get(unquote(path))
        if stored is None:
            error = HubError(404, "Entry not found", "EntryNotFound")
            error.answer.headers["X-Repo-Commit"] = commit.oid
            raise error
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{stored.etag}"'}
        if not stored.lfs:
            return Answer(stored.data, headers=headers)
        headers |= {"X-Linked-Etag": f'"{stored.sha256}"', "X-Linked-Size": str(len(stored.data))}
        return Answer(b"", 302, headers | {"Location": f"{self.cdn_url}/object/{stored.sha256}?signature=0"})

    # CDN

    def put_object(self, request, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the sha256 that was announced")
        self.objects[oid] = request.body
        return Answer(headers={"ETag": f'"{oid}"'})

    def get_object(self, request, oid):
        if oid not in self.objects:
            raise HubError(404, "NoSuchKey")
        return Answer(self.objects[oid], headers={"ETag": f'"{oid}"'})


_ID, _REV, _OID = r"([^/]+/[^/]+)", r"([^/]+)", "([0-9a-f]{64})"
ROUTES = [
    ("POST", "/api/repos/create", HubServer.create_repo),
    ("POST", "/api/validate-yaml", HubServer.validate_yaml),
    ("GET", f"/api/models/{_ID}", HubServer.info),
    ("GET", f"/api/models/{_ID}/revision/{_REV}", HubServer.info),
    ("GET", f"/api/models/{_ID}/tree/{_REV}", HubServer.tree),
    ("GET", f"/api/models/{_ID}/tree/{_REV}/(.+)", HubServer.tree),
    ("GET", f"/api/models/{_ID}/discussions", HubServer.discussions),
    ("POST", f"/api/models/{_ID}/branch/{_REV}", HubServer.create_branch),
    ("POST", f"/api/models/{_ID}/preupload/{_REV}", HubServer.preupload),
    ("POST", f"/api/models/{_ID}/commit/{_REV}", HubServer.apply_commit),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    ("POST", "/lfs-verify", HubServer.lfs_verify),
    ("GET", f"/{_ID}/resolve/{_REV}/(.+)", HubServer.resolve_file),
]
CDN_ROUTES = [("PUT", f"/object/{_OID}", HubServer.put_object), ("GET", f"/object/{_OID}", HubServer.get_object)]


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: str, name: str, hub: HubServer):
        self.name, self.hub = name, hub
        super().__init__((address, 0), _Handler)
        self.url = f"http://{address}:{self.server_port}"

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients may hang up
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        hub: HubServer = self.server.hub
        headers = {key.lower(): value for key, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))  # before any answer: keep-alive stays in step
        request = Request(self.server.name, self.command, self.path, headers, body)
        answer = hub.serve(request)
        if answer is None:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        else:
            request.status = answer.status
            self._send(answer)

    do_HEAD = do_POST = do_PUT = do_GET

    def _send(self, answer: Answer):
        body, kind = answer.body, "application/octet-stream"
        if isinstance(body, dict | list):
            body, kind = json.dumps(body).encode(), "application/json"
        self.send_response(answer.status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def _belongs_in_lfs(path: str) -> bool:
    return path.endswith(".safetensors")
