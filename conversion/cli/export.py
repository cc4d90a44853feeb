"""`sam-split export`: ONNX graphs for browsers, Node and onnxruntime."""

from .parser import add_command, add_quiet, at_least, check_installed, say_next

EXPORT = """\
Write MODEL as ONNX graphs that transformers.js loads in a browser or in Node, and onnxruntime anywhere.

MODEL is a split folder, or any other checkpoint that `sam-split convert` reads; an adapter is merged into it.

OUT is a new folder, a repository of transformers.js:
  onnx/vision_encoder.onnx                 images to embeddings
  onnx/prompt_encoder_mask_decoder.onnx    clicks and boxes to masks
  onnx/mask_prompt_encoder.onnx            an earlier mask into the embedding
  config.json, preprocessor_config.json, README.md, LICENSE

It appears when onnxruntime has computed what torch computes, for every kind of prompt, or not at all. docs/deploy.md
has the inputs and outputs of the graphs.

With --page, OUT is also a web page that runs the model in the browser: `python -m http.server --directory OUT` serves
it. With --adapter as well, a switch compares the adapter with the base, whose other graphs are then in OUT/base.
`sam-split push OUT NAME/REPOSITORY --space` publishes it.
"""


def add_parser(subparsers) -> None:
    parser = add_command(
        subparsers,
        "export",
        run,
        help="ONNX graphs for transformers.js, in a browser or Node, and for onnxruntime",
        description=EXPORT,
        example="sam-split export sam-split-vit-base sam-onnx\n"
        "sam-split export facebook/sam-vit-base coins-onnx --adapter coins-adapter/adapter --dtype float16",
        positionals={"MODEL": "split folder, Hub id, or a checkpoint in any format", "OUT": "folder to make"},
    )
    parser.add_argument("--adapter", help="PEFT folder or Hub id, merged into MODEL in memory")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the weights (float32)")
    parser.add_argument(
        "--quantize", choices=("int8",), help="the image encoder's matrix products: less than a third of the size"
    )
    parser.add_argument("--opset", metavar="N", type=at_least(18), default=18, help="version of ONNX's operators (18)")
    parser.add_argument("--page", action="store_true", help="a web page as well, to click on images")
    add_quiet(parser)


def run(args) -> None:
    check_installed("sam-split export", "onnx", "onnxscript", "onnxruntime", extra="onnx")

    from ..errors import CheckFailed
    from ..onnx_export import export
    from ..onnx_page import export_page
    from ..verification import table

    try:
        rows = (export_page if args.page else export)(
            args.model,
            args.out,
            adapter=args.adapter,
            dtype=args.dtype,
            quantize=args.quantize,
            opset=args.opset,
            progress=not args.quiet,
        )
    except CheckFailed as error:
        print(table(error.rows))
        raise
    print(table(rows))
    print(f"wrote {args.out}; transformers.js loads it with SamModel.from_pretrained")
    serve = [["python", "-m", "http.server", "--directory", args.out]] if args.page else []
    say_next(*serve, ["sam-split", "push", args.out, "NAME/REPOSITORY", *["--space"] * args.page])
