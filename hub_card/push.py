"""Publish a folder: stage it, load what is staged, then put it on the Hub in one commit.

    sam-split push FOLDER NAME/REPOSITORY

Nothing is sent before the staged copy of a model or an adapter has loaded in a fresh interpreter that cannot import
this package, with every tensor equal to the folder's, or exported graphs have loaded in onnxruntime. Afterwards every
file on the Hub is compared with the local one by hash.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

from .errors import PushRefused
from .folder import Base, is_adapter, read_base
from .hub import Branch, Published, redact
from .onnx_folder import load_graphs
from .publishable import ADAPTER, EXPORT, SPACE, Staged, check_repo_id, kind_of, stage, what


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    branch: str = "main",
    create_pr: bool = False,
    message: str | None = None,
    dry_run: bool = False,
    allow_modified_code: bool = False,
    base: Base | None = None,
    space: bool = False,
    demo: str | None = None,
) -> Published | None:
    """Publish a split model, an adapter, or what was exported of one, and say where.

    The arguments are the options of the command, which `sam-split push --help` explains; `base` is what the adapter
    or the weights were made from, where the folder itself does not say.

    Returns:
        Where the files stand; None after a dry run.

    Raises:
        PushRefused: the input is at fault; nothing was sent.
        PushFailed: the Hub refused or failed; the branch holds what it held before.
    """
    check_repo_id(repo_id)
    kind_of(folder, space)  # raises for what is none, before the Hub is asked
    if constants.HF_HUB_OFFLINE:
        raise PushRefused("HF_HUB_OFFLINE is set; unset it to reach the Hub, which a dry run reads as well")
    if not dry_run and get_token() is None:
        raise PushRefused("no Hub token found; run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    target = Branch(api, repo_id, branch, "space" if space else "model")
    if demo:
        check_repo_id(demo)
        if Branch(api, demo, repo_type="space").head() is None:
            raise PushRefused(f"the Space {demo} is not on the Hub; push it first: sam-split push PAGE {demo} --space")
    with tempfile.TemporaryDirectory(prefix="sam-split-push-") as scratch:
        staged_folder = Path(scratch, "staged")
        staged_folder.mkdir()
        if is_adapter(folder) and not space:
            base = _pinned(api, read_base(folder, base))
        staged = stage(
            folder,
            staged_folder,
            repo_id,
            allow_modified_code=allow_modified_code,
            base=base,
            space=space,
            demo=demo,
        )
        _print_table(staged, target)
        if staged.kind in (EXPORT, SPACE):
            print("Loading the graphs in onnxruntime ...", flush=True)
            print(load_graphs(staged_folder, [file.path_in_repo for file in staged.files]))
        else:
            print("Loading the staged files in a fresh process, without this package ...", flush=True)
            print(load_in_fresh_process(staged, folder))

        head = target.head()
        if head is None and dry_run:
            print(f"Dry run: {target} does not exist yet; it would be created with these files.")
            return None
        head = head or target.create(private)
        target.refuse_unfit(head, staged)
        published, operations = Published(**target.where, oid=head, changed=False), target.differences(head, staged)
        if operations:
            print(f"{'Dry run: a push would, in' if dry_run else 'In'} one commit on top of {head}:")
            for operation in operations:
                verb = "write " if isinstance(operation, CommitOperationAdd) else "delete"
                print(f"  {verb} {operation.path_in_repo}")
            if dry_run:
                return None
            title = message or f"Upload SamSplit {staged.kind.name}"
            found = target.find_open_request(staged) if create_pr else None
            published = found or target.publish(staged, head, operations, title, create_pr)
    _print_result(published, staged)
    return None if dry_run else published


def load_in_fresh_process(staged: Staged, folder: str | Path) -> str:
    """Run `fresh_load.py` on the staged files of `folder` and return what it found, in a sentence.

    Raises:
        PushRefused: they do not load, or not as what the folder holds.
    """
    script = Path(__file__).with_name("fresh_load.py")
    arguments = [str(staged.folder)]
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="sam-split-modules-") as scratch:
        environment["HF_MODULES_CACHE"] = scratch  # or an earlier load's code could answer for this one's
        if staged.base:
            arguments += [staged.base.repo_id, staged.base.revision or "main"]
        else:
            environment["HF_HUB_OFFLINE"] = "1"
            environment["HF_HOME"] = scratch  # the usual one may hold a token, which the folder's code must not see
            for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
                environment.pop(name, None)
        done = subprocess.run(
            [sys.executable, str(script), *arguments], env=environment, cwd=scratch, capture_output=True, text=True
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        raise PushRefused(f"{folder} does not load in a fresh process: {redact(lines[-1])}")
    return done.stdout.strip().splitlines()[-1]


def _pinned(api: HfApi, base: Base) -> Base:
    """`base` with a commit for its revision: an adapter is for these very weights."""
    head = Branch(api, base.repo_id, base.revision or "main").head()
    if head is None:
        raise PushRefused(
            f"the adapter's base {base.repo_id} (revision {base.revision or 'main'}) is not on the Hub; push it first"
        )
    return dataclasses.replace(base, revision=head)


def _print_table(staged: Staged, target: Branch) -> None:
    width = max(len(file.path_in_repo) for file in staged.files)
    print(f"For {target}:")
    for file in staged.files:
        size = f"{file.upload_info.size:>13,} bytes"
        print(f"  {file.path_in_repo:<{width}}  {size}  {what(file.path_in_repo)}")
    if staged.left_out:
        print(f"Left out: {', '.join(staged.left_out)}")


def _print_result(published: Published, staged: Staged) -> None:
    if published.changed:
        print(f"Published: {published.url}")
    else:
        print(f"Nothing to do, these files are there already: {published.url}")
    if published.pr_url:
        print(f"Pull request: {published.pr_url}")
    print("Every file was compared with the Hub's by hash.")
    if staged.kind is SPACE:
        print(f"The page: {published.repo_url}")
        print(f"A model's card links to it after: sam-split push MODEL REPO_ID --demo {published.repo_id}")
        return
    print("Load exactly this with")
    where = f'"{published.repo_id}", revision="{published.oid}"'
    if staged.kind is EXPORT:
        print(f'  SamModel.from_pretrained("{published.repo_id}", {{ revision: "{published.oid}" }})')
    elif staged.kind is ADAPTER:
        print(f"  PeftModel.from_pretrained(base, {where})")
    else:
        print(f'  AutoModel.from_pretrained({where}, code_revision="{published.oid}", trust_remote_code=True)')
