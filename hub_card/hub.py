"""One branch of one repository on the Hub: read it, and move it by one commit or not at all.

The commit names its parent, so a push that raced with another is refused by the Hub and overwrites nothing. It carries
a random mark, so that when the answer is lost the branch's history tells whether the commit landed.
"""

import json
import re
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from .errors import PushFailed, PushRefused
from .publishable import Staged, StagedFile

try:  # httpx with huggingface_hub 1.x, httpx2 with 2.x
    from huggingface_hub.utils import httpx

    TransportError: type[Exception] = httpx.TransportError
except ImportError:  # huggingface_hub 0.x
    import requests

    TransportError = requests.exceptions.RequestException

ATTEMPTS = 5
LONGEST_WAIT = 300  # seconds; asked to wait longer, we stop and say so
RETRIED = (408, 429, 500, 502, 503, 504)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Published:
    """Where the files stand. `changed` is False if they stood there before."""

    repo_id: str
    oid: str
    url: str
    changed: bool
    pr_url: str | None = None


class Branch:
    """A branch (or `refs/pr/N`) of a model repository, which may not exist yet."""

    def __init__(self, api: HfApi, repo_id: str, name: str):
        self.api, self.repo_id, self.name = api, repo_id, name

    def head(self) -> str | None:
        """The branch's commit; None if the repository or the branch does not exist."""
        try:
            return self._ask("reading the branch", lambda: self.api.model_info(self.repo_id, revision=self.name).sha)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            if isinstance(error, GatedRepoError):
                raise self._failed("reading the branch", error) from None
            return None

    def check_card(self, card: str) -> None:
        """Raises PushRefused if the Hub would not accept the card, before anything is created for it."""

        def checked():
            # Not ModelCard.validate: before huggingface_hub 2.0 it asks huggingface.co, whatever HF_ENDPOINT says.
            content = {"content": card, "repoType": "model"}
            url = f"{self.api.endpoint}/api/validate-yaml"
            answer = get_session().post(url, json=content, headers=build_hf_headers())
            if answer.status_code == 400:
                raise PushRefused(
                    "the Hub rejects the card: " + "; ".join(e["message"] for e in answer.json()["errors"])
                )
            hf_raise_for_status(answer)
            answer.json()

        self._do("checking the card", checked)

    def create(self, private: bool) -> str:
        """Make what is missing, the repository or the branch, and return the branch's commit."""
        main = Branch(self.api, self.repo_id, "main")
        if main.head() is None:
            self._do(
                "creating the repository",
                lambda: self.api.create_repo(self.repo_id, private=private or None, exist_ok=True),
            )
        if self.head() is None:
            self._do(
                "creating the branch",
                lambda: self.api.create_branch(self.repo_id, branch=self.name, exist_ok=True),
            )
        head = self.head()
        if head is None:
            raise PushFailed(f"{self} was created but cannot be read; wait a moment and run the command again")
        return head

    def files(self, oid: str) -> dict[str, tuple[str | None, str]]:
        """Path -> (sha256 if it is an LFS file, the name git gives the blob) of every file at a commit."""

        def listing():
            entries = self.api.list_repo_tree(self.repo_id, recursive=True, revision=oid)
            files = [entry for entry in entries if hasattr(entry, "blob_id")]  # the rest are folders
            return {file.path: (file.lfs.sha256 if file.lfs else None, file.blob_id) for file in files}

        return self._do("listing the files", listing)

    def differences(self, oid: str, staged: Staged) -> tuple[list[StagedFile], list[str]]:
        """Which staged files a commit lacks or holds otherwise, and which of its files are stale."""
        remote = self.files(oid)
        changed = [file for file in staged.files if not _same(remote.get(file.path), file)]
        return changed, sorted(path for path in remote if staged.is_stale(path))

    def refuse_unfit(self, oid: str, staged: Staged) -> None:
        """Raises PushRefused if the repository would not hold the files as they are, or holds something else."""
        remote = self.files(oid)
        if ".gitignore" in remote:
            raise PushRefused(
                f"{self.repo_id} holds a .gitignore, and the Hub silently drops files that match it; delete it first"
            )
        other = "config.json" if staged.is_adapter else "adapter_config.json"
        if other in remote:
            kinds = ("adapter", "model") if staged.is_adapter else ("model", "adapter")
            raise PushRefused(f"{self.repo_id} holds a {kinds[1]}; publish the {kinds[0]} in a repository of its own")

    def publish(self, staged: Staged, parent: str, message: str, create_pr: bool) -> Published:
        """One commit on top of `parent` that makes the branch hold the staged files and no stale ones.

        Raises:
            PushRefused: the Hub rejects the card.
            PushFailed: somebody pushed in between, or the Hub did not accept the commit; the branch was not touched.
        """
        mark = f"sam-split push {uuid.uuid4()}"
        requests_before = self._pull_requests() if create_pr else {}
        for attempt in range(ATTEMPTS):
            changed, stale = self.differences(parent, staged)
            operations = [CommitOperationAdd(file.path, file.location) for file in changed]
            operations += [CommitOperationDelete(path) for path in stale]
            try:
                commit = self.api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=message,
                    commit_description=mark,
                    revision=self.name,
                    parent_commit=parent,
                    create_pr=create_pr or None,
                )
                published = Published(self.repo_id, commit.oid, commit.commit_url, True, commit.pr_url)
                break
            except Exception as error:
                wait, status = _wait(error, attempt), _status(error)
                if type(error) is ValueError or status in (400, 401, 402, 403, 404):  # the Hub said no and did nothing
                    raise self._failed("pushing", error) from None
                # The Hub may have done it and the answer been lost on the way: look before another attempt.
                try:
                    landed = self._find_pull_request(requests_before, mark) if create_pr else self._find(parent, mark)
                    moved = not landed and self.head() != parent
                except PushFailed as second:
                    raise PushFailed(
                        f"no answer to the commit, and {self} cannot be read to see whether it landed ({second}); "
                        "run the command again, it will find out"
                    ) from None
                if landed:
                    print("The Hub's answer was lost, but the commit is there.")
                    published = landed
                    break
                if moved:
                    raise PushFailed(self._conflict(parent)) from None
                if attempt == ATTEMPTS - 1 or (wait is None and status != 412):
                    raise self._failed("pushing", error) from None
                _sleep("pushing", error, wait or 1.0)
        try:
            wrong, left = self.differences(published.oid, staged)
        except PushFailed as error:
            raise PushFailed(
                f"{published.oid} is on the Hub, but its files could not be compared ({error}); run the command again"
            ) from None
        if wrong or left:
            names = ", ".join([file.path for file in wrong] + left)
            raise PushFailed(
                f"{self.repo_id} at {published.oid} is not what was pushed; these files differ: {names}. Run again"
            )
        return published

    def find_open_request(self, staged: Staged) -> Published | None:
        """An open pull request of ours that already brings exactly the staged files."""
        name = self._do("asking who we are", self.api.whoami)["name"]

        def opened():
            return list(self.api.get_repo_discussions(self.repo_id, discussion_type="pull_request"))

        for request in self._do("listing pull requests", opened):
            if request.status == "open" and request.author == name:
                head = Branch(self.api, self.repo_id, request.git_reference).head()
                if head and not any(self.differences(head, staged)):
                    return Published(self.repo_id, head, self._url(head), False, request.url)
        return None

    def _find(self, parent: str, mark: str) -> Published | None:
        """Our commit among those since `parent`, whatever came on top of it."""
        for commit in self._since(parent):
            if mark in commit.message:
                return Published(self.repo_id, commit.commit_id, self._url(commit.commit_id), True)
        return None

    def _find_pull_request(self, before: dict[str, str], mark: str) -> Published | None:
        for ref, oid in self._pull_requests().items():
            if ref in before:
                continue
            commit = self._commits(ref)[0]
            if mark in commit.message:
                url = f"{self.api.endpoint}/{self.repo_id}/discussions/{ref.rpartition('/')[2]}"
                return Published(self.repo_id, oid, self._url(oid), True, url)
        return None

    def _since(self, parent: str) -> list:
        """Commits newer than `parent`, newest first."""
        commits = []
        for commit in self._commits(self.name):
            if commit.commit_id == parent:
                break
            commits.append(commit)
        return commits

    def _commits(self, revision: str) -> list:
        return self._do("reading the history", lambda: self.api.list_repo_commits(self.repo_id, revision=revision))

    def _pull_requests(self) -> dict[str, str]:
        refs = self._do(
            "listing pull requests", lambda: self.api.list_repo_refs(self.repo_id, include_pull_requests=True)
        )
        return {ref.ref: ref.target_commit for ref in refs.pull_requests or []}

    def _conflict(self, parent: str) -> str:
        newer = [f"{', '.join(c.authors)} ({c.commit_id[:8]}: {c.title})" for c in reversed(self._since(parent))]
        return (
            f"{self} moved while this push was under way: {'; '.join(newer)}. Nothing was overwritten; "
            "look at that commit, then run the command again to put these files on top of it"
        )

    def _do(self, step: str, call: Callable[[], Answer]) -> Answer:
        """`call()`, tried again while the Hub is busy; every other error becomes one clear PushFailed."""
        try:
            return self._ask(step, call)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise self._failed(step, error) from None

    def _ask(self, step: str, call: Callable[[], Answer]) -> Answer:
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except (RepositoryNotFoundError, RevisionNotFoundError, PushRefused):
                raise
            except Exception as error:
                wait = _wait(error, attempt)
                if wait is None or attempt == ATTEMPTS - 1:
                    raise self._failed(step, error) from None
                _sleep(step, error, wait)
        raise AssertionError("the last attempt returns or raises")

    def _failed(self, step: str, error: Exception) -> Exception:
        said = redact(_said(error))
        status = _status(error)
        if isinstance(_cause(error), GatedRepoError):
            return PushFailed(f"{self.repo_id} is gated and this account has no access; ask for it on its page")
        if status == 401:
            return PushFailed(
                f"the Hub does not accept the token (401, {step}: {said}); run `hf auth login`, or set HF_TOKEN"
            )
        if status == 403:
            return PushFailed(f"this account may not do that to {self.repo_id} (403, {step}: {said})")
        if status == 404:
            return PushFailed(f"{self} was not found, or this account cannot see it (404, {step})")
        if type(error) is ValueError:  # the client's words for a card with bad metadata; what the Hub answers is HTTP
            return PushRefused(f"the Hub rejects these files: {redact(' '.join(str(error).split()))}")
        asked = _asked_wait(_cause(error).response.headers) if status in RETRIED else None
        if asked is not None and asked > LONGEST_WAIT:
            return PushFailed(
                f"{step}: the Hub asks to wait {asked:.0f} s ({status}); run the command again after that"
            )
        return PushFailed(f"{step}: {said}. {self} was not changed by this; run the command again")

    def _url(self, oid: str) -> str:
        return f"{self.api.endpoint}/{self.repo_id}/commit/{oid}"

    def __str__(self):
        return f"{self.repo_id}@{self.name}"


def redact(text: str) -> str:
    """`text` without the token, should a server or a proxy have quoted it, and without anything like one."""
    token = get_token()
    if token:
        text = text.replace(token, "<token>")
    return re.sub(r"hf_[A-Za-z0-9]{20,}", "<token>", text)


def _same(remote: tuple[str | None, str] | None, file: StagedFile) -> bool:
    if remote is None:
        return False
    sha256, blob_id = remote
    return sha256 == file.sha256 if sha256 else blob_id == file.blob_id


def _cause(error: BaseException) -> Any:
    """The HTTP or transport error behind an upload's RuntimeError, or the error itself."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, HfHubHTTPError | TransportError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return error


def _status(error: Exception) -> int | None:
    response = getattr(_cause(error), "response", None)
    return getattr(response, "status_code", None)


def _wait(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before another attempt, or None if another one would end the same."""
    cause = _cause(error)
    status = _status(error)
    if status is not None:
        if status not in RETRIED:
            return None
        asked = _asked_wait(cause.response.headers)
        if asked is not None:
            return asked if asked <= LONGEST_WAIT else None
    elif not isinstance(cause, TransportError | ConnectionError | TimeoutError | json.JSONDecodeError):
        return None  # what hf_xet raises on a broken connection is the builtin ConnectionError
    return float(2**attempt)


def _asked_wait(headers) -> float | None:
    """What `Retry-After: 7` or `RateLimit: "api";r=0;t=7` asks for, in seconds."""
    asked = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", ""))
    asked = asked or re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    return float(asked[1]) + 1 if asked else None  # one more, as the Hub rounds down


def _sleep(step: str, error: Exception, seconds: float) -> None:
    reason = f"the Hub answered {_status(error)}" if _status(error) else "the connection broke"
    print(f"{step}: {reason}; again in {seconds:.0f} s", file=sys.stderr)
    time.sleep(seconds)


def _said(error: Exception) -> str:
    """One line of an error's text, the one that says most."""
    cause = _cause(error)
    if isinstance(cause, json.JSONDecodeError):
        return "the answer is not JSON (a proxy or a login page in between?)"
    message = getattr(cause, "server_message", None) or str(cause) or type(cause).__name__
    return " ".join(message.split())
