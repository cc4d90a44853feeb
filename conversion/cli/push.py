"""`sam-split push`, and `--push-to-hub` of the commands that make a folder."""

import sys

from hub_card.errors import PushFailed, PushRefused

from .parser import add_command

PUSH = """\
Publish FOLDER (a split model, a LoRA adapter, or what `sam-split export` wrote) as NAME/REPOSITORY, in one commit or
not at all. With --space, what `sam-split export --page` wrote becomes a static Space, a page for everybody.

The files to publish are listed, copied, and loaded in a fresh process before anything is sent (ONNX graphs: loaded in
onnxruntime, if it is installed). If somebody else pushes at the same time, nothing is overwritten. After an error, run
the command again: it does what is left. The token is read from HF_TOKEN or from `hf auth login`. What README.md says
of other weights than those in FOLDER is replaced in the published copy.
"""


def add_parser(subparsers) -> None:
    parser = add_command(
        subparsers,
        "push",
        run,
        help="publish a folder on the Hugging Face Hub",
        description=PUSH,
        example="sam-split push sam-split-vit-base you/sam-split-vit-base --dry-run",
        positionals={
            "FOLDER": "written by `sam-split convert` or `export`, or by save_pretrained",
            "REPO_ID": "name/repository; created if it does not exist",
        },
    )
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
    parser.add_argument("--space", action="store_true", help="publish an exported page, as a static Space")
    parser.add_argument("--demo", metavar="SPACE_ID", help="Space that shows the model: its card links there")


def add_push_to_hub(parser) -> None:
    """`--push-to-hub` and `--private`, for a command that writes `args.out`."""
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="then publish OUT there, as `sam-split push` does")
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: make it private")


def check_push_to_hub(args) -> None:
    """Raises PushRefused for a repository id that cannot be one, before hours of work are spent on it."""
    if args.push_to_hub is not None:
        from hub_card.publishable import check_repo_id

        check_repo_id(args.push_to_hub)
    elif args.private:
        raise PushRefused("--private is about the repository on the Hub; give its id with --push-to-hub as well")


def run_push_to_hub(args) -> int:
    """Publish `args.out` if `--push-to-hub` was given; the exit code."""
    if args.push_to_hub is None:
        return 0
    return _publish(args.out, args.push_to_hub, private=args.private)


def run(args) -> int:
    """`push` with parsed options; 0 when published or already there, 1 when the Hub failed, 2 for bad input."""
    from hub_card.folder import Base

    if args.base_revision and not args.base_model:
        raise PushRefused("--base-revision is a commit of the base; give its id with --base-model as well")
    base = Base(args.base_model, args.base_revision) if args.base_model else None
    names = ("private", "branch", "create_pr", "message", "dry_run", "allow_modified_code", "space", "demo")
    return _publish(args.folder, args.repo_id, base=base, **{name: getattr(args, name) for name in names})


def _publish(folder, repo_id, **options) -> int:
    from hub_card.hub import redact
    from hub_card.push import push

    try:
        push(folder, repo_id, **options)
    except (ValueError, PushFailed) as error:
        failed = isinstance(error, PushFailed)
        bar = "\n" * failed  # huggingface_hub leaves the line of its progress bar open
        print(f"{bar}sam-split: error: {redact(str(error))}", file=sys.stderr)
        return 1 if failed else 2
    return 0
