"""One branch of one repository on the Hub: read it, and move it by one commit or not at all.

The commit names its parent, so the Hub refuses a push that raced with another and nothing is overwritten. Where an
answer is lost, the files on the Hub tell whether the commit landed. huggingface_hub repeats the requests of an upload
while the Hub is busy; any other error ends the push, and the next run does what is left.
"""

import contextlib
import dataclasses
import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from .errors import TOKEN, PushFailed, PushRefused
from .publishable import Staged


@dataclasses.dataclass(frozen=True)
class Published:
    """Where the files stand. `changed` is False if they stood there before."""

    repo_id: str
    oid: str
    changed: bool
    repo_type: str = "model"
    pr_url: str | None = None

    @property
    def repo_url(self) -> str:
        return f"{constants.ENDPOINT}/{'spaces/' * (self.repo_type == 'space')}{self.repo_id}"

    @property
    def url(self) -> str:
        return f"{self.repo_url}/commit/{self.oid}"


class Branch:
    """A branch (or `refs/pr/N`) of a model repository or a static Space, which may not exist yet.

    `where` is the repository, as arguments of HfApi.
    """

    def __init__(self, api: HfApi, repo_id: str, name: str = "main", repo_type: str = "model"):
        self.api, self.repo_id, self.name = api, repo_id, name
        self.where = {"repo_id": repo_id, "repo_type": repo_type}

    def __str__(self):
        return f"{self.repo_id}@{self.name}"

    def head(self) -> str | None:
        """The branch's commit; None if the repository or the branch does not exist."""
        with self._step("reading the branch"):
            try:
                return self.api.repo_info(**self.where, revision=self.name).sha
            except GatedRepoError:
                raise
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None

    def create(self, private: bool) -> str:
        """Make what is missing, the repository or the branch, and return the branch's commit."""
        with self._step("creating the repository"):
            sdk = "static" if self.where["repo_type"] == "space" else None
            self.api.create_repo(**self.where, space_sdk=sdk, private=private or None, exist_ok=True)
        if self.name != "main":
            with self._step("creating the branch"):
                self.api.create_branch(**self.where, branch=self.name, exist_ok=True)
        head = self.head()
        if head is None:
            raise PushFailed(f"{self} was created but cannot be read; wait a moment and run the command again")
        return head

    def differences(self, oid: str, staged: Staged) -> list[CommitOperationAdd | CommitOperationDelete]:
        """What a commit on top of `oid` must do: write files that differ or are not there, delete stale ones."""
        remote = self._files(oid)
        changed = [file for file in staged.files if not _holds(remote.get(file.path_in_repo), file)]
        return changed + [CommitOperationDelete(path) for path in sorted(remote) if staged.is_stale(path)]

    def refuse_unfit(self, oid: str, staged: Staged) -> None:
        """Raises PushRefused if the Hub would drop some of the files, or if the repository is of another kind."""
        remote = self._files(oid)
        if ".gitignore" in remote:
            raise PushRefused(
                f"{self.repo_id} holds a .gitignore, and the Hub silently drops files that match it; delete it first"
            )
        for other in filter(staged.kind.foreign.fullmatch, sorted(remote)):
            raise PushRefused(f"{self.repo_id} holds {other} already; publish this one in a repository of its own")
        if self.where["repo_type"] == "space":
            with self._step("reading the Space"):
                sdk = self.api.space_info(self.repo_id).sdk
            if sdk not in (None, "static"):
                raise PushRefused(f"{self.repo_id} is a Space made with {sdk}; publish this one in a Space of its own")

    def publish(self, staged: Staged, parent: str, operations: list, message: str, create_pr: bool) -> Published:
        """One commit on top of `parent` that makes the branch hold the staged files and no stale ones.

        Args:
            operations: what `differences` found at `parent`.

        Raises:
            PushRefused: the Hub rejects the card.
            PushFailed: somebody pushed in between, or the Hub did not accept the commit; the branch was not touched.
        """
        try:
            commit = self.api.create_commit(
                **self.where,
                operations=operations,
                commit_message=message,
                revision=self.name,
                parent_commit=parent,
                create_pr=create_pr or None,
            )
            published = Published(**self.where, oid=commit.oid, changed=True, pr_url=commit.pr_url)
        except Exception as error:
            # The commit may have landed and the answer been lost: what the Hub holds decides.
            landed = self.find_open_request(staged) if create_pr else self._holding(staged)
            if landed is None:
                if self.head() != parent:
                    raise PushFailed(
                        f"somebody else pushed to {self} after {parent}. Nothing was overwritten; "
                        "look at the newer commit, then run the command again to put these files on top of it"
                    ) from None
                raise self._failed("pushing", error) from None
            print("The Hub's answer was lost, but the commit is there.")
            published = dataclasses.replace(landed, changed=True)
        wrong = ", ".join(operation.path_in_repo for operation in self.differences(published.oid, staged))
        if wrong:
            raise PushFailed(
                f"{self.repo_id} at {published.oid} is not what was pushed; these files differ: {wrong}. "
                "Run the command again"
            )
        return published

    def find_open_request(self, staged: Staged) -> Published | None:
        """An open pull request that already brings exactly the staged files."""
        with self._step("listing pull requests"):
            kind = {"discussion_type": "pull_request", "discussion_status": "open"}
            requests = list(self.api.get_repo_discussions(**self.where, **kind))
        for request in requests:
            found = Branch(self.api, **self.where, name=request.git_reference)._holding(staged, request.url)
            if found:
                return found
        return None

    def _holding(self, staged: Staged, pr_url: str | None = None) -> Published | None:
        """The branch's commit, if it holds exactly the staged files."""
        head = self.head()
        if head is None or self.differences(head, staged):
            return None
        return Published(**self.where, oid=head, changed=False, pr_url=pr_url)

    def _files(self, oid: str) -> dict[str, RepoFile]:
        with self._step("listing the files"):
            entries = self.api.list_repo_tree(**self.where, recursive=True, revision=oid)
            return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}  # the rest are folders

    @contextlib.contextmanager
    def _step(self, step: str):
        try:
            yield
        except Exception as error:
            raise self._failed(step, error) from None

    def _failed(self, step: str, error: Exception) -> Exception:
        """The one-line error for whatever huggingface_hub raised."""
        if type(error) is ValueError:  # the client's words for a card with bad metadata; what the Hub answers is HTTP
            return PushRefused(f"the Hub rejects these files: {_one_line(error)}")
        cause: BaseException = error  # an upload's RuntimeError has the error of the connection behind it
        while cause.__cause__ is not None and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        said = _one_line(cause)
        if isinstance(error, json.JSONDecodeError):
            said = "the answer is not JSON (a proxy or a login page in between?)"
        answered = f" (the Hub answered {status})" if status else ""
        refusals: dict[int | None, str] = {
            401: f"the Hub does not accept the token (401, {step}: {said}); run `hf auth login`, or set HF_TOKEN",
            403: f"this account has no permission for {self.repo_id} (403, {step}: {said})",
            404: f"{self} was not found, or this account cannot see it (404, {step})",
        }
        again = f"{step}{answered}: {said}; run the command again, it does what is left"
        return PushFailed(refusals.get(status, again))


def _holds(entry: RepoFile | None, file: CommitOperationAdd) -> bool:
    """Whether that is this file's content: the Hub names an LFS file by its sha256, any other by git's hash."""
    if entry is None:
        return False
    if entry.lfs:
        return entry.lfs.sha256 == file.upload_info.sha256.hex()
    return entry.blob_id == git_hash(Path(file.path_or_fileobj).read_bytes())


def redact(text: str) -> str:
    """`text` without the token, should a server or a proxy have quoted it, and without anything like one."""
    token = get_token()
    if token:
        text = text.replace(token, "<token>")
    return TOKEN.sub("<token>", text)


def _one_line(error: BaseException) -> str:
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return redact(" ".join(said.split()).rstrip("."))
