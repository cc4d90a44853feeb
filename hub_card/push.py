"""Publish a folder: stage it, load it without this package, then put it on the Hub in one commit.

    sam-split push FOLDER NAME/REPOSITORY

Nothing is sent before the staged copy has loaded in a fresh interpreter that cannot import this package, with every
tensor equal to the folder's. Afterwards every file on the Hub is compared with the local one by hash.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token

from .errors import PushFailed, PushRefused
from .hub import Branch, Published, redact
from .publishable import Staged, check_repo_id, stage, what
from .sections import Base, read_base
from .weight_files import is_adapter

DESCRIPTION = """\
Publish FOLDER (a split model, or a LoRA adapter) as NAME/REPOSITORY, in one commit or not at all.

The files to publish are listed, copied, and loaded in a fresh process before anything is sent. If somebody else pushes
at the same time, nothing is overwritten. After an error, run the command again: it does what is left. The token is
read from HF_TOKEN or from `hf auth login`. What README.md says of other weights than those in FOLDER is replaced in
the published copy.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "push",
        help="publish a folder on the Hugging Face Hub",
        description=DESCRIPTION,
        epilog="example:\n  sam-split push sam-split-vit-base you/sam-split-vit-base --dry-run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="written by `sam-split convert`, or by save_pretrained")
    parser.add_argument("repo_id", metavar="REPO_ID", help="name/repository; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="if the repository has to be created, make it private")
    parser.add_argument(
        "--branch", default="main", metavar="B", help="branch to push to; created if it does not exist"
    )
    parser.add_argument("--create-pr", action="store_true", help="open a pull request; the branch stays as it is")
    parser.add_argument("--message", metavar="M", help="title of the commit")
    parser.add_argument("--dry-run", action="store_true", help="do everything but write to the Hub")
    parser.add_argument(
        "--allow-modified-code",
        action="store_true",
        help="push code files that differ from this package's; the card says so",
    )
    parser.add_argument(
        "--base-model", metavar="REPO_ID", help="Hub id of the model an adapter or fine-tuned weights were made from"
    )
    parser.add_argument("--base-revision", metavar="SHA", help="commit of --base-model")
    parser.set_defaults(run=run)


def add_push_to_hub(parser) -> None:
    """`--push-to-hub` and `--private`, for a command that writes `args.out`."""
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="then publish OUT there, as `sam-split push` does")
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: make it private")


def check_push_to_hub(args) -> None:
    """Raises PushRefused for a repository id that cannot be one, before hours of work are spent on it."""
    if args.push_to_hub is None:
        if args.private:
            raise PushRefused("--private is about the repository on the Hub; give its id with --push-to-hub as well")
    else:
        check_repo_id(args.push_to_hub)


def run_push_to_hub(args) -> int:
    """Publish `args.out` if `--push-to-hub` was given; the exit code."""
    if args.push_to_hub is None:
        return 0
    return _publish(args.out, args.push_to_hub, private=args.private)


def run(args) -> int:
    """`push` with parsed options; 0 when published or already there, 1 when the Hub failed, 2 for bad input."""
    if args.base_revision and not args.base_model:
        raise PushRefused("--base-revision is a commit of the base; give its id with --base-model as well")
    base = Base(args.base_model, args.base_revision) if args.base_model else None
    names = ("private", "branch", "create_pr", "message", "dry_run", "allow_modified_code")
    return _publish(args.folder, args.repo_id, base=base, **{name: getattr(args, name) for name in names})


def _publish(folder, repo_id, **options) -> int:
    try:
        push(folder, repo_id, **options)
    except (ValueError, PushFailed) as error:
        failed = isinstance(error, PushFailed)
        bar = "\n" * failed  # huggingface_hub leaves the line of its progress bar open
        print(f"{bar}sam-split: error: {redact(str(error))}", file=sys.stderr)
        return 1 if failed else 2
    return 0


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
) -> Published | None:
    """Publish a split model, or an adapter, and say where.

    The arguments are the options of the command, which `sam-split push --help` explains; `base` is what the adapter
    or the weights were made from, where the folder itself does not say.

    Returns:
        Where the files stand; None after a dry run.

    Raises:
        PushRefused: the input is at fault; nothing was sent.
        PushFailed: the Hub refused or failed; the branch holds what it held before.
    """
    check_repo_id(repo_id)
    if constants.HF_HUB_OFFLINE:
        raise PushRefused("HF_HUB_OFFLINE is set; unset it to reach the Hub")
    if not dry_run and get_token() is None:
        raise PushRefused("no Hub token found; run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    target = Branch(api, repo_id, branch)
    with tempfile.TemporaryDirectory(prefix="sam-split-push-") as scratch:
        staged_folder = Path(scratch, "staged")
        staged_folder.mkdir()
        if is_adapter(folder):
            base = _pinned(api, read_base(folder, base))
        staged = stage(folder, staged_folder, repo_id, allow_modified_code=allow_modified_code, base=base)
        _print_table(staged, target)
        print("Loading the staged files in a fresh process, without this package ...", flush=True)
        print(load_in_fresh_process(staged, folder))

        head = target.head()
        if head is None and dry_run:
            print(f"Dry run: {target} does not exist yet; it would be created with these files.")
            return None
        head = head or target.create(private)
        target.refuse_unfit(head, staged)
        changes = target.differences(head, staged)
        if not any(changes):
            published = Published(repo_id, head, f"{api.endpoint}/{repo_id}/commit/{head}", False)
        else:
            print(f"{'Dry run: a push would, in' if dry_run else 'In'} one commit on top of {head}:")
            for file in changes[0]:
                print(f"  write  {file.path_in_repo}")
            for path in changes[1]:
                print(f"  delete {path}")
            if dry_run:
                return None
            title = message or f"Upload SamSplit {'adapter' if staged.is_adapter else 'model'}"
            published = target.find_open_request(staged) if create_pr else None
            published = published or target.publish(staged, head, changes, title, create_pr)
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
        if staged.is_adapter:
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
    found = json.loads(done.stdout.strip().splitlines()[-1])
    versions = f"transformers {found['transformers']}, torch {found['torch']}"
    return f"It loads: {found['tensors']} tensors, each equal to the one in the weight files ({versions})."


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
    print("Every file was compared with the Hub's by hash. Load exactly this with")
    where = f'"{published.repo_id}", revision="{published.oid}"'
    if staged.is_adapter:
        print(f"  PeftModel.from_pretrained(base, {where})")
    else:
        print(f'  AutoModel.from_pretrained({where}, code_revision="{published.oid}", trust_remote_code=True)')
