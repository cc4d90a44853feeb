"""Segment everything in many images on Ray Data: on this machine, or on the cluster that RAY_ADDRESS names.

OUT/masks/*.parquet gets a row per image: path, height, width and, best mask first, the predicted IoU (scores), box
(x0, y0, x1, y1), area and run lengths of each: {"size": [height, width], "counts": counts[i]} suits pycocotools.
OUT/embeddings/*.parquet (--embeddings) gets path and embedding, (C, H, W).

A run that was stopped goes on when the command is repeated, and adds new images: OUT has the paths of finished ones.
The images of an actor that died go to another one. Each node of a cluster needs sam-split[ray] and the same files: a
shared disk, or a Hub id as MODEL and s3://bucket/photos for IMAGES and OUT. If there are GPUs, each actor has one.
"""

import argparse
import json
import os

import ray
from pyarrow.fs import FileSystem
from ray.data.checkpoint import CheckpointConfig

from conversion.cli.parser import Parser, at_least, share
from conversion.image_files import SUFFIXES
from conversion.rows import ImageRows, summary
from conversion.sources import fetch, open_checkpoint

IMAGES = 8  # of a task; its rows fit into one of Ray's blocks (128 MB), so none is written before a task is repeated


def begin(out, kind, settings):
    """Note what `out` is made with, or raise ValueError if it was begun with something else."""
    files, root = FileSystem.from_uri(out)
    files.create_dir(root)
    note = f"{root}/{kind}.json"
    if not files.get_file_info(note).is_file:
        with files.open_output_stream(note) as file:
            file.write(json.dumps(settings).encode())
    with files.open_input_stream(note) as file:
        if (before := json.loads(file.read())) != settings:
            raise ValueError(f"{out} was begun with {before}, and this is {settings}; name another folder")


def run(args):
    open_checkpoint(args.model)
    if args.adapter:
        fetch(args.adapter, None, ["adapter_config.json"])
    given = args.model, args.adapter, args.images  # an actor may start in another folder
    model, adapter, images = (os.path.abspath(name) if name and os.path.exists(name) else name for name in given)
    out = args.out if "://" in args.out else os.path.abspath(args.out)
    if "://" not in images and not os.path.exists(images):
        raise ValueError(f"{images} does not exist; expected a folder of images, Parquet, or the URI of one of these")
    kind = "embeddings" if args.embeddings else "masks"
    options = {"points_per_crop": args.points, "pred_iou_thresh": args.min_iou}
    options = {} if args.embeddings else {**options, "stability_score_thresh": args.min_stability}
    begin(out, kind, {"model": model, "adapter": adapter, **options})
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent unless it is asked for
    ray.init(ignore_reinit_error=True)
    if images.endswith(".parquet"):
        files = ray.data.read_parquet(images).select_columns(["path", "bytes"])
    else:
        files = ray.data.read_binary_files(images, include_paths=True, file_extensions=list(SUFFIXES))
    context, done = files.context, f"{out}/{kind}.finished"
    context.checkpoint_config = CheckpointConfig("path", done, delete_checkpoint_on_success=False)
    context.raise_original_map_exception = True  # whose first line is ours
    cpus, gpus = (int(ray.cluster_resources().get(name, 0)) for name in ("CPU", "GPU"))
    actors = args.actors or gpus or max(1, cpus - 2)  # Ray needs two CPUs: for files, and to leave out what is done
    files.repartition(target_num_rows_per_block=IMAGES).map_batches(
        ImageRows,
        fn_constructor_args=(model, adapter, kind),
        fn_constructor_kwargs={**options, "batch_size": args.batch, "skip_bad": args.skip_bad},
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=1 if gpus else None,
        num_cpus=None if gpus else min(1, 100 * max(0, cpus - 2) // actors / 100),
    ).write_parquet(f"{out}/{kind}")
    print(summary(f"{out}/{kind}"))


def main(arguments=None):
    parser = Parser(prog="segment_ray.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="split folder, Hub id, or a checkpoint in any format")
    parser.add_argument("images", metavar="IMAGES", help="folder; or NAME.parquet: a unique `path`, a file's `bytes`")
    parser.add_argument("out", metavar="OUT", help="folder to make, or to go on with")
    parser.add_argument("--adapter", help="PEFT folder or Hub id, merged into MODEL in memory")
    parser.add_argument("--embeddings", action="store_true", help="image embeddings instead of masks")
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--actors", metavar="N", type=at_least(1), help="models at once (one per GPU, or CPU but two)")
    parser.add_argument("--batch", metavar="N", type=at_least(1), default=1, help="images in the encoder at once (1)")
    parser.add_argument("--points", metavar="N", type=at_least(1), default=32, help="along a side of the grid (32)")
    least = {"metavar": "X", "type": share(ends=True)}
    parser.add_argument("--min-iou", **least, default=0.88, help="predicted IoU of a mask (0.88)")
    parser.add_argument("--min-stability", **least, default=0.95, help="stability of a mask (0.95)")
    try:
        run(parser.parse_args(arguments))
    except KeyboardInterrupt:
        parser.exit(130, "segment_ray: interrupted; the same command goes on, no finished image is done again\n")
    except (OSError, ValueError, ray.exceptions.RayError) as error:
        parser.error(str(getattr(error, "cause", error)).splitlines()[0])


if __name__ == "__main__":
    main()
