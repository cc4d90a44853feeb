"""A Hugging Face Hub small enough to read: repositories in memory, no git, faults on demand.

    with HubServer() as hub:                        # the Hub on 127.0.0.1, its file store ("CDN") on 127.0.0.2
        environment = hub.environment(home)         # for the process that imports huggingface_hub
        hub.fail("POST /api/models/.*/commit/", 503, times=2)

It answers what unmodified clients ask when they push and load: repositories, branches, tags, pull requests, commits
that apply whole or not at all, LFS (one part or several) and, where hf_xet can run its file-system store, xet. It
listens on loopback alone, and stops at the end of the `with` block or of the process.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote

TOKEN = "hf_AliceWritesHere0123456789abcdefghi"
OTHER_TOKEN = "hf_BobbyReadsHere0123456789abcdefghij"
LFS_ATTRIBUTES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.onnx", "*.png", "*.jpg", "*.zip")
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_ATTRIBUTES).encode()
LFS_THRESHOLD = 10_000_000  # bytes; larger files go to LFS whatever they are
LICENCES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "openrail", "other"}


def git_blob_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit. `oid` is what git would call it: for an LFS file, the name of its pointer."""

    data: bytes
    lfs: bool
    xet_hash: str | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        line = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
        return line.format(self.sha256, len(self.data)).encode()

    @property
    def oid(self) -> str:
        return git_blob_sha1(self.pointer if self.lfs else self.data)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    files: dict[str, StoredFile]
    title: str
    message: str
    author: str
    date: str


@dataclass
class Repository:
    id: str
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[int, dict] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def refs(self) -> dict[str, str]:
        requests = {f"refs/pr/{number}": request["head"] for number, request in self.pull_requests.items()}
        return {**self.tags, **self.branches, **requests}

    def resolve(self, revision: str) -> str | None:
        """The sha that a branch, a tag, `refs/pr/N`, or the start of a sha names."""
        revision = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        if revision in self.refs():
            return self.refs()[revision]
        matches = [
            oid for oid in self.commits if re.fullmatch("[0-9a-f]{5,40}", revision) and oid.startswith(revision)
        ]
        return matches[0] if len(matches) == 1 else None

    def history(self, oid: str | None) -> list[Commit]:
        """Newest first."""
        commits = []
        while oid is not None:
            commits.append(self.commits[oid])
            oid = commits[-1].parent
        return commits

    def add_commit(
        self, parent: str | None, files: dict[str, StoredFile], title: str, message: str, author: str
    ) -> str:
        listing = json.dumps({path: stored.oid for path, stored in sorted(files.items())})
        seed = f"{parent}{title}{message}{author}{listing}{len(self.commits)}"
        oid = hashlib.sha1(seed.encode()).hexdigest()
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        self.commits[oid] = Commit(oid, parent, files, title, message, author, date)
        return oid


@dataclass
class Request:
    """One request as it arrived, and the status it got (0 if the connection was cut)."""

    server: str
    method: str
    target: str
    headers: dict[str, str]
    body: bytes = field(repr=False)
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
    status: int = 200
    body: bytes | dict | list = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    pattern: re.Pattern
    times: int
    answer: Answer | None = None  # sent instead of the true one
    cut: str | None = None  # the connection is closed "before" the deed, "during" a body, or "after" the deed
    after: bool = False  # `answer` is sent after the deed was done
    call: Callable[[], None] | None = None  # runs before the request is served
    skip: int = 0


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(status, {"error": message}, headers)


class HubServer:
    """The Hub and its CDN, in two threads of this process.

    Attributes:
        requests: every request seen, in order of arrival.
        tokens: token -> user name.
        per_page: entries in one page of a tree listing.
        part_size: LFS uploads larger than this are asked for in parts of this many bytes; None for a single PUT.
        xet: offer xet (needs hf_xet's file-system store; see `xet_works`).
    """

    def __init__(self, *, per_page: int = 1000, part_size: int | None = None, xet: bool = False):
        self.per_page, self.part_size, self.xet = per_page, part_size, xet
        self.tokens = {TOKEN: "alice", OTHER_TOKEN: "bob"}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # sha256 -> bytes, whether or not a commit points there
        self.xet_hashes: dict[str, str] = {}  # sha256 -> xet hash
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.scratch = Path(tempfile.mkdtemp(prefix="hub-server-"))
        self.write_folders: list[Path] = []
        self._listeners = [_Listener("127.0.0.1", "hub", self), _Listener("127.0.0.2", "cdn", self)]
        self.url, self.cdn_url = (listener.url for listener in self._listeners)

    def __enter__(self):
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def environment(self, home: str | Path, token: str | None = TOKEN) -> dict[str, str]:
        """What a client's process must be started with; huggingface_hub reads it once, at import."""
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
        }
        kept |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "NO_PROXY": "127.0.0.1,127.0.0.2",
        }
        return kept | ({"HF_TOKEN": token} if token else {})

    # Faults

    def fail(self, pattern: str, status: int, body=b"", headers=None, *, times: int = 1, after=False, skip: int = 0):
        """Answer `status` to the next `times` requests that match `pattern`, a regex on "METHOD /path"."""
        answer = Answer(status, body or {"error": f"fault {status}"}, headers or {})
        self.faults.append(Fault(re.compile(pattern), times, answer=answer, after=after, skip=skip))

    def cut(self, pattern: str, when: str = "before", *, times: int = 1, skip: int = 0):
        """Close the connection "before" the deed, "during" the body (sent or received), or "after" the deed."""
        self.faults.append(Fault(re.compile(pattern), times, cut=when, skip=skip))

    def hook(self, pattern: str, call: Callable[[], None], *, times: int = 1):
        """Call something before the next `times` matching requests are served."""
        self.faults.append(Fault(re.compile(pattern), times, call=call))

    def reset(self):
        """Forget every repository, fault and request."""
        with self.lock:
            for forgotten in (
                self.repositories,
                self.objects,
                self.xet_hashes,
                self.parts,
                self.requests,
                self.faults,
            ):
                forgotten.clear()

    def take_faults(self, request: Request) -> list[Fault]:
        with self.lock:
            due = []
            for fault in self.faults:
                if fault.times and fault.pattern.match(f"{request.method} {request.path}"):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    due.append(fault)
            return due

    # Straight to the store, without a client

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, *, private=False, gated=False) -> Repository:
        with self.lock:
            repository = self.repositories[repo_id] = Repository(repo_id, private, gated)
            attributes = {".gitattributes": StoredFile(GITATTRIBUTES, lfs=False)}
            repository.branches["main"] = repository.add_commit(None, attributes, "initial commit", "", "system")
        if files:
            self.commit(repo_id, files)
        return repository

    def commit(
        self, repo_id: str, files: dict[str, bytes | None], *, author="bob", title="Edit", branch="main"
    ) -> str:
        """Add files (None deletes) as somebody else would, behind the back of the client under test."""
        with self.lock:
            repository = self.repositories[repo_id]
            parent = repository.branches[branch]
            tree = dict(repository.commits[parent].files)
            for path, data in files.items():
                if data is None:
                    del tree[path]
                else:
                    tree[path] = StoredFile(data, _belongs_in_lfs(path, len(data), data[:512]))
                    if tree[path].lfs:
                        self.objects[tree[path].sha256] = data
            repository.branches[branch] = repository.add_commit(parent, tree, title, "", author)
            return repository.branches[branch]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return {path: stored.data for path, stored in repository.commits[repository.resolve(revision)].files.items()}

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
        header = request.headers.get("authorization", "")
        token = header.removeprefix("Bearer ")
        if header and token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def _signed_in(self, request: Request) -> str:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        return request.user

    def _repository(self, request: Request, repo_id: str, *, write=False) -> Repository:
        repo_id = unquote(repo_id)
        repository = self.repositories.get(repo_id)
        owner = repo_id.split("/")[0]
        if repository is None or (repository.private and request.user != owner):
            # huggingface.co leaves the code out for anonymous users; its client knows that case by https alone.
            raise HubError(404 if request.user else 401, "Repository not found", "RepoNotFound")
        if write and self._signed_in(request) != owner and request.query.get("create_pr") != "1":
            raise HubError(403, f"You don't have the rights to write to {repo_id}")
        return repository

    def _commit_at(self, repository: Repository, revision: str) -> Commit:
        oid = repository.resolve(unquote(revision))
        if oid is None:
            raise HubError(404, f"Invalid rev id: {unquote(revision)}", "RevisionNotFound")
        return repository.commits[oid]

    def whoami(self, request):
        name = self._signed_in(request)
        access = {"accessToken": {"displayName": "test", "role": "write"}}
        return Answer(body={"type": "user", "name": name, "fullname": name, "orgs": [], "auth": access})

    def create_repo(self, request):
        user, wanted = self._signed_in(request), request.json()
        repo_id = f"{wanted.get('organization') or user}/{wanted['name']}"
        url = f"{self.url}/{repo_id}"
        if repo_id.split("/")[0] != user:
            raise HubError(
                403, f"You don't have the rights to create a model under the namespace {repo_id.split('/')[0]}"
            )
        if repo_id in self.repositories:
            return Answer(409, {"error": "You already created this model repo", "url": url})
        self.create(repo_id, private=wanted.get("private", False) or wanted.get("visibility") == "private")
        return Answer(body={"url": url, "name": repo_id, "id": repo_id})

    def validate_yaml(self, request):
        content = request.json()["content"]
        match = re.match(r"---\s*\n(.*?)\n?---\s*(\n|$)", content, re.DOTALL)
        if not match:
            return Answer(
                body={"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
            )
        errors = []
        for line in match.group(1).splitlines():
            key, colon, value = line.partition(":")
            if line.startswith("\t") or (line and line[0] not in " -#" and not colon):
                errors.append({"message": f"YAML: bad line {line!r}"})
            if key == "license" and value.strip() not in LICENCES:
                errors.append({"message": f'"license" must be one of {sorted(LICENCES)}'})
        return Answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, request, repo_id, revision="main"):
        repository = self._repository(request, repo_id)
        commit = self._commit_at(repository, revision)
        siblings = []
        for path, stored in sorted(commit.files.items()):
            entry = {"rfilename": path}
            if request.query.get("blobs"):
                entry |= {"size": len(stored.data), "blobId": stored.oid}
                entry |= {"lfs": {"sha256": stored.sha256, "size": len(stored.data)}} if stored.lfs else {}
            siblings.append(entry)
        known = {
            "id": repository.id,
            "modelId": repository.id,
            "author": repository.id.split("/")[0],
            "sha": commit.oid,
        }
        known |= {"private": repository.private, "gated": "manual" if repository.gated else False, "tags": []}
        known |= {"lastModified": commit.date, "createdAt": commit.date, "downloads": 0, "likes": 0}
        return Answer(body={**known, "siblings": siblings})

    def tree(self, request, repo_id, revision, folder=""):
        commit = self._commit_at(self._repository(request, repo_id), revision)
        prefix = f"{unquote(folder)}/" if folder else ""
        if prefix and not any(path.startswith(prefix) for path in commit.files):
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        entries = {}
        for path, stored in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            parents = [
                prefix + path[len(prefix) :][: found.start()] for found in re.finditer("/", path[len(prefix) :])
            ]
            recursive = request.query.get("recursive", "").lower() in ("1", "true")
            for parent in parents if recursive else parents[:1]:
                entries[parent] = {
                    "type": "directory",
                    "oid": git_blob_sha1(parent.encode()),
                    "size": 0,
                    "path": parent,
                }
            if recursive or not parents:
                entries[path] = self._entry(path, stored)
        start = int(request.query.get("cursor", 0))
        headers = {}
        if start + self.per_page < len(entries):
            query = "&".join(f"{key}={quote(value)}" for key, value in request.query.items() if key != "cursor")
            headers["Link"] = f'<{self.url}{request.path}?{query}&cursor={start + self.per_page}>; rel="next"'
        return Answer(body=list(entries.values())[start : start + self.per_page], headers=headers)

    def _entry(self, path: str, stored: StoredFile) -> dict:
        entry = {"type": "file", "oid": stored.oid, "size": len(stored.data), "path": path}
        if stored.lfs:
            pointer = len(stored.pointer)
            entry["lfs"] = {"oid": stored.sha256, "size": len(stored.data), "pointerSize": pointer}
        return entry | ({"xetHash": stored.xet_hash} if stored.xet_hash else {})

    def paths_info(self, request, repo_id, revision):
        commit = self._commit_at(self._repository(request, repo_id), revision)
        if "json" in request.headers.get("content-type", ""):
            paths = request.json()["paths"]
        else:
            paths = parse_qs(request.body.decode()).get("paths", [])
        return Answer(body=[self._entry(path, commit.files[path]) for path in paths if path in commit.files])

    def refs(self, request, repo_id):
        repository = self._repository(request, repo_id)

        def listing(kind, refs):
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        body = {
            "branches": listing("heads", repository.branches),
            "tags": listing("tags", repository.tags),
            "converts": [],
        }
        if request.query.get("include_prs"):
            requests = {str(number): opened["head"] for number, opened in repository.pull_requests.items()}
            body["pullRequests"] = listing("pr", requests)
        return Answer(body=body)

    def commits(self, request, repo_id, revision):
        repository = self._repository(request, repo_id)
        history = repository.history(self._commit_at(repository, revision).oid)
        body = []
        for commit in history:
            entry = {"id": commit.oid, "title": commit.title, "message": commit.message, "date": commit.date}
            body.append({**entry, "authors": [{"user": commit.author}]})
        return Answer(body=body, headers={"X-Total-Count": str(len(history))})

    def discussions(self, request, repo_id):
        repository = self._repository(request, repo_id)
        listed = []
        for number, opened in sorted(repository.pull_requests.items(), reverse=True):
            entry = {"num": number, "title": opened["title"], "status": opened["status"], "isPullRequest": True}
            entry |= {"author": {"name": opened["author"]}, "repo": {"name": repository.id, "type": "model"}}
            listed.append({**entry, "createdAt": repository.commits[opened["head"]].date})
        return Answer(body={"discussions": listed, "count": len(listed), "start": 0})

    def change_branch(self, request, repo_id, name):
        repository, name = self._repository(request, repo_id, write=True), unquote(name)
        if request.method == "DELETE":
            repository.branches.pop(name, None)
        elif name in repository.branches:
            return Answer(409, {"error": "Reference already exists"})
        else:
            start = (request.json() if request.body else {}).get("startingPoint", "main")
            repository.branches[name] = self._commit_at(repository, start).oid
        return Answer(body={})

    def create_tag(self, request, repo_id, revision):
        repository = self._repository(request, repo_id, write=True)
        tag = request.json()["tag"]
        if tag in repository.tags:
            return Answer(409, {"error": "Tag reference exists already"})
        repository.tags[tag] = self._commit_at(repository, revision).oid
        return Answer(body={})

    def preupload(self, request, repo_id, revision):
        repository = self._repository(request, repo_id, write=True)
        commit = self._commit_at(repository, revision)
        ignored = commit.files[".gitignore"].data.decode().split() if ".gitignore" in commit.files else []
        files = []
        for wanted in request.json()["files"]:
            path = wanted["path"]
            lfs = _belongs_in_lfs(path, wanted["size"], base64.b64decode(wanted.get("sample", "")))
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular"}
            answer["shouldIgnore"] = any(fnmatch(path, pattern) for pattern in ignored)
            files.append(answer | ({"oid": commit.files[path].etag} if path in commit.files else {}))
        return Answer(body={"commitOid": commit.oid, "files": files})

    def lfs_batch(self, request, repo_id):
        self._repository(request, repo_id)  # who may only open a pull request uploads here too
        self._signed_in(request)
        wanted = request.json()
        if self.xet and "xet" in wanted["transfers"]:  # huggingface_hub before 1.0 asks; later ones know
            objects = [{"oid": item["oid"], "size": item["size"]} for item in wanted["objects"]]
            return Answer(body={"transfer": "xet", "objects": objects})
        several = self.part_size is not None and "multipart" in wanted["transfers"]
        objects = []
        for item in wanted["objects"]:
            oid, size = item["oid"], item["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self.objects:
                verify = {"href": f"{self.url}/lfs-verify"}
                upload = {"href": f"{self.cdn_url}/object/{oid}?signature=0"}
                if several and size > self.part_size:
                    numbers = range(1, -(-size // self.part_size) + 1)
                    header = {f"{number:05d}": f"{self.cdn_url}/part/{oid}/{number}?signature=0" for number in numbers}
                    upload = {
                        "href": f"{self.url}/lfs-complete",
                        "header": {"chunk_size": str(self.part_size), **header},
                    }
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return Answer(body={"transfer": "multipart" if several else "basic", "objects": objects})

    def lfs_complete(self, request):
        wanted = request.json()
        parts = self.parts.pop(wanted["oid"], {})
        data = b"".join(parts[entry["partNumber"]] for entry in sorted(wanted["parts"], key=lambda e: e["partNumber"]))
        return self._store(wanted["oid"], data)

    def lfs_verify(self, request):
        wanted = request.json()
        if len(self.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, "Object not found or of another size")
        return Answer(body={})

    def _store(self, oid: str, data: bytes) -> Answer:
        if hashlib.sha256(data).hexdigest() != oid:
            raise HubError(400, "The content does not have the sha256 that was announced")
        self.objects[oid] = data
        return Answer(headers={"ETag": f'"{oid}"'})

    def apply_commit(self, request, repo_id, revision):
        repository = self._repository(request, repo_id, write=True)
        author = self._signed_in(request)
        opens_request = request.query.get("create_pr") == "1"
        branch = unquote(revision)
        number = int(branch.removeprefix("refs/pr/")) if branch.startswith("refs/pr/") else None
        if branch not in repository.branches and number not in repository.pull_requests:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = repository.refs()[branch]
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if not head.startswith(header.get("parentCommit") or ""):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        tree = self._applied(dict(repository.commits[head].files), lines)
        oid = repository.add_commit(head, tree, header["summary"], header.get("description", ""), author)
        body = {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.url}/{repository.id}/commit/{oid}",
            "hookOutput": "",
        }
        if opens_request:
            number = len(repository.pull_requests) + 1
            opened = {"head": oid, "title": header["summary"], "author": author, "status": "open"}
            repository.pull_requests[number] = opened
            body["pullRequestUrl"] = f"{self.url}/{repository.id}/discussions/{number}"
        elif number is not None:
            repository.pull_requests[number]["head"] = oid
        else:
            repository.branches[branch] = oid
        return Answer(body=body)

    def _applied(self, tree: dict[str, StoredFile], lines: list[dict]) -> dict[str, StoredFile]:
        for line in lines:
            key, value = line["key"], line["value"]
            path = value.get("path", "")
            if path.startswith("/") or ".." in path.split("/"):
                raise HubError(400, f"Invalid path {path!r}")
            if key == "file":
                tree[path] = StoredFile(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                oid = value["oid"]
                if oid not in self.objects and not self._fetch_from_xet(oid):
                    message = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
                    raise HubError(400, f"{message} Offending file: - {path}")
                tree[path] = StoredFile(self.objects[oid], lfs=True, xet_hash=self.xet_hashes.get(oid))
            elif key == "deletedFile":
                if path not in tree:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                del tree[path]
            elif key == "deletedFolder":
                for inside in [name for name in tree if name.startswith(path.rstrip("/") + "/")]:
                    del tree[inside]
        return tree

    def resolve_file(self, request, repo_id, revision, path):
        repository = self._repository(request, repo_id)
        commit = self._commit_at(repository, revision)
        if repository.gated and request.user != repository.id.split("/")[0]:
            status = 403 if request.user else 401
            raise HubError(status, f"Access to model {repository.id} is restricted", "GatedRepo")
        stored = commit.files.get(unquote(path))
        if stored is None:
            error = HubError(404, "Entry not found", "EntryNotFound")
            error.answer.headers["X-Repo-Commit"] = commit.oid
            raise error
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes", "ETag": f'"{stored.etag}"'}
        if not stored.lfs:
            return _ranged(request, stored.data, headers)
        headers |= {"X-Linked-Etag": f'"{stored.sha256}"', "X-Linked-Size": str(len(stored.data))}
        if stored.xet_hash and self.xet:
            link = f"{self.url}/api/models/{repository.id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": stored.xet_hash, "Link": f'<{link}>; rel="xet-auth"'}
        return Answer(302, b"", headers | {"Location": f"{self.cdn_url}/object/{stored.sha256}?signature=0"})

    # xet: hf_xet carries a store on the file system for its own tests, at addresses that start with local://

    def xet_token(self, request, repo_id, kind, revision):
        self._repository(request, repo_id, write=kind == "write")
        if not self.xet:
            raise HubError(404, "xet is not enabled")
        # One process at a time can open such a store, so everybody gets a folder of their own.
        folder = Path(tempfile.mkdtemp(prefix=f"xet-{kind}-", dir=self.scratch))
        if kind == "write":
            self.write_folders.append(folder)
        elif (self.scratch / "pool").exists():
            shutil.copytree(self.scratch / "pool", folder, dirs_exist_ok=True)
        expires = int(time.time()) + 3600
        body = {"accessToken": "xet-token", "exp": expires, "casUrl": f"local://{folder}"}
        headers = {"X-Xet-Access-Token": "xet-token", "X-Xet-Token-Expiration": str(expires)}
        return Answer(body=body, headers={**headers, "X-Xet-Cas-Url": body["casUrl"]})

    def _fetch_from_xet(self, sha256: str) -> bool:
        """Find an uploaded file in the folders that were handed out, and move it into the store and the read pool."""
        for folder in self.write_folders:
            for shard in (folder / "xet" / "xorbs" / "shards").glob("*.mdb"):
                found = _shard_files(shard.read_bytes()).get(sha256)
                if found is None:
                    continue
                copy = Path(tempfile.mkdtemp(dir=self.scratch))  # the client may still have the folder open
                shutil.copytree(folder / "xet" / "xorbs", copy / "xet" / "xorbs")
                data = _xet_download(copy, *found)
                if hashlib.sha256(data).hexdigest() == sha256:
                    self.objects[sha256] = data
                    self.xet_hashes[sha256] = _xet_upload(self.scratch / "pool", data)
                    return True
        return False

    # CDN

    def put_object(self, request, oid):
        return self._store(oid, request.body)

    def put_part(self, request, oid, number):
        self.parts.setdefault(oid, {})[int(number)] = request.body
        return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    def get_object(self, request, oid):
        if oid not in self.objects:
            raise HubError(404, "NoSuchKey")
        return _ranged(request, self.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


_ID, _REV = r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES = [
    ("GET", "/api/agent-harnesses", lambda hub, request: Answer(body={"standardEnvVars": [], "harnesses": {}})),
    ("GET", "/api/whoami-v2", HubServer.whoami),
    ("POST", "/api/repos/create", HubServer.create_repo),
    ("POST", "/api/validate-yaml", HubServer.validate_yaml),
    ("GET", f"/api/models/{_ID}", HubServer.info),
    ("GET", f"/api/models/{_ID}/revision/{_REV}", HubServer.info),
    ("GET", f"/api/models/{_ID}/tree/{_REV}", HubServer.tree),
    ("GET", f"/api/models/{_ID}/tree/{_REV}/(.+)", HubServer.tree),
    ("POST", f"/api/models/{_ID}/paths-info/{_REV}", HubServer.paths_info),
    ("GET", f"/api/models/{_ID}/refs", HubServer.refs),
    ("GET", f"/api/models/{_ID}/commits/{_REV}", HubServer.commits),
    ("GET", f"/api/models/{_ID}/discussions", HubServer.discussions),
    ("POST", f"/api/models/{_ID}/branch/{_REV}", HubServer.change_branch),
    ("DELETE", f"/api/models/{_ID}/branch/{_REV}", HubServer.change_branch),
    ("POST", f"/api/models/{_ID}/tag/{_REV}", HubServer.create_tag),
    ("POST", f"/api/models/{_ID}/preupload/{_REV}", HubServer.preupload),
    ("POST", f"/api/models/{_ID}/commit/{_REV}", HubServer.apply_commit),
    ("GET", f"/api/models/{_ID}/xet-(read|write)-token/{_REV}", HubServer.xet_token),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    ("POST", "/lfs-complete", HubServer.lfs_complete),
    ("POST", "/lfs-verify", HubServer.lfs_verify),
    ("GET", f"/{_ID}/resolve/{_REV}/(.+)", HubServer.resolve_file),
]
CDN_ROUTES = [
    ("PUT", "/object/([0-9a-f]{64})", HubServer.put_object),
    ("GET", "/object/([0-9a-f]{64})", HubServer.get_object),
    ("PUT", r"/part/([0-9a-f]{64})/(\d+)", HubServer.put_part),
]


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
        request = Request(self.server.name, self.command, self.path, headers, b"")
        with hub.lock:
            hub.requests.append(request)
        faults = hub.take_faults(request)
        cut = next((fault.cut for fault in faults if fault.cut), None)
        for fault in faults:
            if fault.call:
                fault.call()
        if cut == "during" and self.command in ("PUT", "POST"):
            self.rfile.read(int(headers.get("content-length", 2)) // 2)
            return self._hang_up()
        request.body = self._read_body(headers)  # in full before any answer, or keep-alive gets out of step
        if cut == "before":
            return self._hang_up()
        replaced = next((fault for fault in faults if fault.answer), None)
        if replaced and not replaced.after:
            answer = replaced.answer
        else:
            answer = hub.answer(request)
            answer = replaced.answer if replaced else answer
        if cut == "after":
            return self._hang_up()
        request.status = answer.status
        self._send(answer, half=cut == "during")

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read_body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, answer: Answer, half: bool):
        body, kind = answer.body, "application/octet-stream"
        if isinstance(body, dict | list):
            body, kind = json.dumps(body).encode(), "application/json"
        elif body.lstrip()[:1] == b"<":
            kind = "text/html"
        self.send_response(answer.status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if half:
            self.wfile.write(body[: len(body) // 2])
            return self._hang_up()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _hang_up(self):
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_):
        pass


def _belongs_in_lfs(path: str, size: int, sample: bytes) -> bool:
    return any(fnmatch(path, pattern) for pattern in LFS_ATTRIBUTES) or size > LFS_THRESHOLD or b"\0" in sample


def _ranged(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not match:
        return Answer(200, data, headers)
    start, stop = int(match[1]), int(match[2] or len(data) - 1) + 1
    return Answer(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


def _shard_files(shard: bytes) -> dict[str, tuple[str, int]]:
    """sha256 -> (xet hash, size) of the files that an uploaded shard describes.

    After a header of 48 bytes comes, per file, a row of 48 bytes (hash, flags, number of segments), that many rows of
    segments, as many of verification if bit 31 of the flags is set, and one that opens with the sha256 if bit 30 is. A
    hash of all ones ends the list.
    """
    files, at = {}, 48
    while at + 48 <= len(shard) and shard[at : at + 32] != b"\xff" * 32:
        name = _xet_name(shard[at : at + 32])
        flags, segments = (int.from_bytes(shard[at + offset : at + offset + 4], "little") for offset in (32, 36))
        rows = range(at + 48, at + 48 * (segments + 1), 48)
        size = sum(int.from_bytes(shard[row + 36 : row + 40], "little") for row in rows)
        at += 48 * (1 + segments * (2 if flags >> 31 & 1 else 1))
        if flags >> 30 & 1:
            files[_xet_name(shard[at : at + 32])] = (name, size)
            at += 48
    return files


def _xet_name(raw: bytes) -> str:
    return "".join(f"{int.from_bytes(raw[at : at + 8], 'little'):016x}" for at in range(0, 32, 8))


def _xet_upload(folder: Path, data: bytes) -> str:
    import hf_xet

    folder.mkdir(parents=True, exist_ok=True)
    session = hf_xet.XetSession()
    with session.new_upload_commit(endpoint=f"local://{folder}") as commit:
        handle = commit.start_upload_bytes(data, sha256=hf_xet.COMPUTE_SHA256)
    return handle.result().xet_info.hash


def _xet_download(folder: Path, name: str, size: int) -> bytes:
    import hf_xet

    target = folder / "rebuilt"
    session = hf_xet.XetSession()
    with session.new_file_download_group(endpoint=f"local://{folder}") as group:
        group.start_download_file(hf_xet.XetFileInfo(name, size), str(target))
    return target.read_bytes()


def xet_works() -> bool:
    """Whether this hf_xet has the file-system store: it is not documented, so it is tried."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            data = bytes(range(256)) * 64
            name = _xet_upload(Path(folder), data)
            return _xet_download(Path(folder), name, len(data)) == data
        except Exception:
            return False


def main():
    """Serve until standard input closes, and print the environment a client needs."""
    with HubServer(xet=xet_works()) as hub, tempfile.TemporaryDirectory() as home:
        for key, value in hub.environment(home).items():
            if key.startswith("HF_") or key == "NO_PROXY":
                print(f"export {key}={value}", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
