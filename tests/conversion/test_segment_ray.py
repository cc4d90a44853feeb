"""`examples/segment_ray.py`: its rows are what `sam-split segment` finds, whichever actor or run of it was killed."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
import ray
import torch
from PIL import Image
from pycocotools.mask import decode
from skimage import data
from trained_adapters import trained
from transformers import AutoProcessor

from conversion import convert
from conversion.cli import main
from conversion.cli.demo import TINY_SAM
from conversion.rows import MASKS, ImageRows, summary
from sam_split import SamSplitModel

pytestmark = pytest.mark.slow  # processes that import torch and transformers

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "segment_ray.py"
FLAGS = ["--points", "12", "--min-iou", "0.5", "--min-stability", "0.6"]

spec = importlib.util.spec_from_file_location("segment_ray", SCRIPT)
segment_ray = importlib.util.module_from_spec(spec)
spec.loader.exec_module(segment_ray)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A model, and photographs in a folder and in Parquet."""
    here = tmp_path_factory.mktemp("ray")
    convert(TINY_SAM, here / "sam-split-vit-base", progress=False)
    coins, coffee = data.coins(), data.coffee()
    photos = {f"coins/{n}.png": coins[20 * n : 20 * n + 150, :230] for n in range(7)}
    photos |= {"coffee.JPG": coffee[150:290, 150:350], "plain.png": np.zeros((40, 50), np.uint8)}
    for name, pixels in photos.items():
        path = here / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    paths = [str(here / "photos" / name) for name in photos]
    files = {"path": paths, "bytes": [Path(path).read_bytes() for path in paths]}
    pa.parquet.write_table(pa.table(files), here / "photos.parquet")
    return here


@pytest.fixture(scope="module")
def expected(here, tmp_path_factory):
    """path -> the row that `sam-split segment` gives, in one process."""
    out = tmp_path_factory.mktemp("one") / "out"
    assert main(["segment", str(here / "sam-split-vit-base"), str(here / "photos"), str(out), *FLAGS, "--quiet"]) == 0
    coco = json.loads((out / "annotations.json").read_text())
    rows = {}
    for image in coco["images"]:
        found = [annotation for annotation in coco["annotations"] if annotation["image_id"] == image["id"]]
        path = str(here / "photos" / image["file_name"])
        rows[path] = {
            "path": path,
            "height": image["height"],
            "width": image["width"],
            "scores": [mask["score"] for mask in found],
            "boxes": [[x, y, x + w - 1, y + h - 1] for x, y, w, h in (mask["bbox"] for mask in found)],
            "areas": [mask["area"] for mask in found],
            "counts": [mask["segmentation"]["counts"] for mask in found],
        }
    assert sum(len(row["counts"]) for row in rows.values()) > 20
    assert rows[str(here / "photos/plain.png")]["counts"] == []
    return rows


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs of this machine, and no process of it left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # which writes a token into the home folder otherwise
        patch.setenv("RAY_worker_niceness", "0")  # a busy machine would hardly run them at Ray's 15
        context = ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=2**27)
        patch.setenv("RAY_ADDRESS", context.address_info["address"])
        started = psutil.Process().children(recursive=True)
        assert started
        yield
        ray.shutdown()
    psutil.wait_procs(started, timeout=20)
    assert [process for process in psutil.Process().children(recursive=True) if "ray" in process.name()] == []


def rows_of(folder):
    """path -> row; each image once."""
    rows = pa.dataset.dataset(folder).to_table().to_pylist()
    assert len({row["path"] for row in rows}) == len(rows)
    return {row["path"]: row for row in rows}


def finished(out):
    """Paths of the images that Ray has noted as finished."""
    files = [path for path in out.glob("masks.finished/*.parquet") if not path.name.endswith(".pending.parquet")]
    return {row["path"] for path in files for row in pa.parquet.read_table(path).to_pylist()}


def logging(folder, marker=None):
    """`ImageRows` that notes what it computes; with a marker, one actor dies after it has computed its second task."""

    class Logging(ImageRows):
        tasks = 0

        def __call__(self, files):
            table = super().__call__(files)
            for path in files["path"].to_pylist():
                (folder / uuid.uuid4().hex).write_text(json.dumps([path, os.getpid()]))
            self.tasks += 1
            if marker is not None and self.tasks == 2:
                try:
                    marker.touch(exist_ok=False)
                except FileExistsError:
                    return table
                os.kill(os.getpid(), signal.SIGKILL)
            return table

    folder.mkdir()
    return Logging


def computed(folder):
    return [json.loads(path.read_text()) for path in folder.iterdir()]


def test_rows_are_what_segment_writes(here, expected):
    options = {"points_per_crop": 12, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.6}  # FLAGS
    rows = ImageRows(here / "sam-split-vit-base", **options)
    assert {row["path"]: row for row in rows(pa.parquet.read_table(here / "photos.parquet")).to_pylist()} == expected


@pytest.mark.night
def test_two_actors_of_which_one_is_killed_find_what_one_process_finds(
    here, expected, cluster, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(segment_ray, "ImageRows", logging(tmp_path / "log", tmp_path / "killed"))
    monkeypatch.setattr(segment_ray, "IMAGES", 1)
    segment_ray.main(
        [
            str(here / "sam-split-vit-base"),
            str(here / "photos.parquet"),
            str(tmp_path / "out"),
            *FLAGS,
            "--actors",
            "2",
        ]
    )
    assert rows_of(tmp_path / "out/masks") == expected
    assert f"{tmp_path / 'out/masks'}: {len(expected)} rows\n" in capsys.readouterr().out
    assert (tmp_path / "killed").exists()
    done = computed(tmp_path / "log")
    assert {path for path, _ in done} == set(expected)
    assert len(done) > len(expected), "what the killed actor had computed is computed again"
    assert len({process for _, process in done}) > 1
    table = pa.dataset.dataset(tmp_path / "out/masks").to_table()
    assert table.schema.equals(MASKS)
    for row in table.to_pylist():
        for counts, area in zip(row["counts"], row["areas"], strict=True):
            assert decode({"size": [row["height"], row["width"]], "counts": counts}).sum() == area


@pytest.mark.night
def test_the_pages_command_is_killed_and_goes_on(here, expected, cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(here)
    (line,) = re.findall(
        r"^python examples/segment_ray.py (.*)$", (ROOT / "docs/everything.md").read_text(), re.MULTILINE
    )
    argv, out = [*line.split(), *FLAGS], here / "rows"
    with (tmp_path / "printed").open("w") as printed:
        process = subprocess.Popen([sys.executable, str(SCRIPT), *argv], stdout=printed, stderr=printed)
        while process.poll() is None and not finished(out):
            time.sleep(0.005)
        process.kill()
    assert process.wait() == -signal.SIGKILL, (tmp_path / "printed").read_text()
    time.sleep(2)  # Ray ends the workers of a dead driver
    before = finished(out)
    assert set() < before < set(expected)
    monkeypatch.setattr(segment_ray, "ImageRows", logging(tmp_path / "log"))
    segment_ray.main(argv)
    assert sorted(path for path, _ in computed(tmp_path / "log")) == sorted(set(expected) - before)
    assert rows_of(out / "masks") == expected


@pytest.fixture(scope="module")
def adapted(here):
    """The model with an adapter that changes what it computes, and the adapter's folder."""
    model = SamSplitModel.from_pretrained(here / "sam-split-vit-base")
    return trained(model, here / "lora", r=2, target_modules=["q", "v"]).merge_and_unload(), here / "lora"


@torch.no_grad()
def assert_embeddings_are(model, table, processor):
    embeddings = torch.from_numpy(table["embedding"].combine_chunks().to_numpy_ndarray())
    assert len(set(table["path"].to_pylist())) == len(embeddings) == 9
    for path, embedding in zip(table["path"].to_pylist(), embeddings, strict=True):
        inputs = processor(Image.open(path).convert("RGB"), return_tensors="pt")
        torch.testing.assert_close(model.get_image_embeddings(inputs["pixel_values"])[0], embedding)


def test_embeddings_are_the_adapted_models(here, adapted):
    (model, lora), source = adapted, here / "sam-split-vit-base"
    table = ImageRows(source, lora, "embeddings", batch_size=2)(pa.parquet.read_table(here / "photos.parquet"))
    assert_embeddings_are(model, table, AutoProcessor.from_pretrained(source))


@pytest.mark.night
def test_a_bad_image_ends_a_run_that_goes_on_without_it(here, adapted, cluster, tmp_path, capsys):
    (model, lora), source = adapted, here / "sam-split-vit-base"
    photos = shutil.copytree(here / "photos", tmp_path / "photos")
    (photos / "bad.png").write_bytes(b"no image")
    argv = [str(source), str(photos), str(tmp_path / "out"), "--embeddings", "--adapter", str(lora), "--batch", "2"]
    error = f"segment_ray.py: error: {photos / 'bad.png'} cannot be read as an image ("
    assert refused(argv, capsys).startswith(error)
    segment_ray.main([*argv, "--skip-bad"])
    table = pa.dataset.dataset(tmp_path / "out/embeddings").to_table()
    assert_embeddings_are(model, table, AutoProcessor.from_pretrained(source))


def refused(argv, capsys):
    """The last line that a command prints which exits with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        segment_ray.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_bad_commands_end_in_one_line_before_ray_starts(here, tmp_path, capsys):
    model, photos, out = (str(path) for path in (here / "sam-split-vit-base", here / "photos", tmp_path / "out"))
    assert "'nowhere' is not a path here" in refused(["nowhere", photos, out], capsys)
    assert "nowhere does not exist" in refused([model, "nowhere", out], capsys)
    assert "'nowhere' is not a path here" in refused([model, photos, out, "--adapter", "nowhere"], capsys)
    assert "must be an integer of at least 1, got 0" in refused([model, photos, out, "--actors", "0"], capsys)
    assert not (tmp_path / "out").exists()
    segment_ray.begin(out, "masks", {"points_per_crop": 12})
    segment_ray.begin(out, "masks", {"points_per_crop": 12})
    assert "was begun with {'points_per_crop': 12}, and this is" in refused([model, photos, out], capsys)


def test_a_run_that_finds_nothing_says_what_to_do(tmp_path):
    def saved(scores):
        lists = {name: [[]] * len(scores) for name in ("boxes", "areas", "counts")}
        path = [f"{n}.png" for n in range(len(scores))]
        row = {"path": path, "height": [8] * len(scores), "width": [8] * len(scores), "scores": scores, **lists}
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        pa.parquet.write_table(pa.table(row, schema=MASKS), folder / "part.parquet")
        return str(folder)

    nothing, something = saved([[], []]), saved([[], [0.9, 0.8]])
    assert summary(nothing) == (
        f"{nothing}: 2 rows, all without a mask; lower --min-iou or --min-stability, and name another OUT"
    )
    assert summary(something) == f"{something}: 2 rows"
    pa.parquet.write_table(pa.table({"path": ["a"], "embedding": [[0.0]]}), tmp_path / "part.parquet")
    assert summary(str(tmp_path / "part.parquet")) == f"{tmp_path / 'part.parquet'}: 1 rows"


def test_help_explains(capsys):
    with pytest.raises(SystemExit) as stop:
        segment_ray.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for word in ("MODEL", "IMAGES", "OUT", "--embeddings", "goes on when the command is repeated", "s3://"):
        assert word in printed
