"""`sam-split adapter fuse`, `adapter split`, `adapter import` and `merge`."""

import argparse

from .parser import add_command, add_quiet, say_next

ADAPTER = """\
Carry LoRA and DoRA adapters between SamSplit's q, k, v and stock SamModel's fused qkv, and out of other tools' files.

The adapted model computes the same on both sides; what cannot be carried over exactly is refused.
"""

FUSE = """\
Turn a PEFT adapter of SamSplit's q, k and v (any of them) into one of stock SamModel's qkv, which needs no SamSplit.
"""

SPLIT = """\
Turn a PEFT adapter of stock SamModel's qkv into one of SamSplit's q, k and v.
"""

IMPORT = """\
Turn a LoRA file of SAMed or Sam_LoRA (w_a_000, w_b_000, ...) into a PEFT adapter of SamSplit's q and v.
"""

MERGE = """\
Add an adapter to its base once and for all, and write the result in the format that is deployed.

BASE is a checkpoint in any format, ADAPTER a PEFT adapter of SamSplit's q, k, v or of stock's qkv.
"""


def add_parsers(subparsers) -> None:
    adapter = subparsers.add_parser(
        "adapter",
        help="carry LoRA and DoRA adapters between q, k, v and qkv",
        description=ADAPTER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = adapter.add_subparsers(metavar="ACTION", required=True)
    for name, help, description, source, example in (
        ("fuse", "from q, k, v to qkv", FUSE, "PEFT folder or Hub id", "my-lora my-lora-for-stock"),
        ("split", "from qkv to q, k, v", SPLIT, "PEFT folder or Hub id", "lora-for-stock my-lora"),
        ("import", "from a file of SAMed or Sam_LoRA", IMPORT, ".pth or .safetensors file", "samed.pth my-lora"),
    ):
        parser = add_command(
            actions,
            name,
            run_adapter,
            help=help,
            description=description,
            example=f"sam-split adapter {name} {example} --base facebook/sam-vit-base",
            positionals={"ADAPTER": source, "OUT": "folder to make"},
        )
        parser.add_argument(
            "--base",
            required=name == "import",
            help="the model that OUT is for" + ("" if name == "import" else "; an error says where it is needed"),
        )
        parser.set_defaults(action=name)

    parser = add_command(
        subparsers,
        "merge",
        run_merge,
        help="a base and its adapter to one model, in any format",
        description=MERGE,
        example="sam-split merge sam-split-vit-base my-lora sam_vit_b_mine.pth --format meta",
        positionals={
            "BASE": "a checkpoint in any format",
            "ADAPTER": "PEFT folder or Hub id",
            "OUT": "folder or, with --format meta, .pth file to make",
        },
    )
    parser.add_argument("--format", choices=("split", "transformers", "meta"), default="split")
    add_quiet(parser)


def run_adapter(args) -> None:
    from ..adapters import transport

    carry = {"fuse": transport.fuse_adapter, "split": transport.split_adapter, "import": transport.import_adapter}
    carry[args.action](args.adapter, args.out, base=args.base)
    print(f"wrote {args.out}; load it with PeftModel.from_pretrained(model, {args.out!r})")
    if args.action != "fuse":
        say_next(["sam-split", "merge", args.base or "BASE", args.out, "MERGED"])


def run_merge(args) -> None:
    from ..adapters.merge import merge

    merge(args.base, args.adapter, args.out, format=args.format, progress=not args.quiet)
    print(f"wrote {args.out}")
    publish = [["sam-split", "push", args.out, "NAME/REPOSITORY"]] if args.format == "split" else []
    say_next(*publish, ["sam-split", "export", args.out, "ONNX"])
