"""`sam-split segment`: its json is what `generate_masks` finds, wherever runs of it were stopped."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from models import stock_model
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.mask import decode, encode, toBbox
from skimage import data
from trained_adapters import trained

from conversion import atomic, convert, mask_images, segmentation
from conversion.cli import main
from conversion.cli.demo import TINY_SAM
from conversion.image_files import find_images
from sam_split import SamSplitModel

FLAGS = ["--points", "5", "--min-iou", "0.5", "--min-stability", "0.6"]
OPTIONS = {"points_per_crop": 5, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.6, "progress": False}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A model, and photographs of which two have one name; beside them what is none."""
    here = tmp_path_factory.mktemp("segment")
    convert(TINY_SAM, here / "split", progress=False)
    coins, coffee = data.coins(), data.coffee()
    for name, pixels in {
        "a/coins.png": coins[:150, :230],
        "b/coins.png": coins[150:, 100:250],
        "b/coins.jpg": coins[60:200, 200:330],
        "b/coffee.JPG": coffee[150:290, 150:350],
        "plain.png": np.zeros((40, 50), np.uint8),
        ".hidden/coins.png": coins,
    }.items():
        path = here / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (here / "photos" / "notes.txt").write_text("no image")
    return here


NAMES = ["a/coins.png", "b/coffee.JPG", "b/coins.jpg", "b/coins.png", "plain.png"]


def command(here, out, *more, images="photos", model="split"):
    images = [str(here / image) for image in images.split()]
    return ["segment", str(here / model), *images, str(out), *FLAGS, "--quiet", *more]


@pytest.fixture(scope="module")
def good(here, tmp_path_factory):
    """The folder of a run without fault."""
    out = tmp_path_factory.mktemp("good") / "out"
    assert main(command(here, out)) == 0
    return out


def loaded(folder):
    """The model on memory of its own: how weights are aligned in their file decides the last bit of a product."""
    model = SamSplitModel.from_pretrained(folder)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return model


def found(model, path, **more):
    return model.generate_masks(str(path), output_masks=True, output_details=True, **{**OPTIONS, **more})


def test_pycocotools_reads_the_masks_that_the_model_finds(here, good):
    model, coco = loaded(here / "split"), COCO(good / "annotations.json")
    images = coco.loadImgs(coco.getImgIds())
    assert [image["file_name"] for image in images] == NAMES
    assert [image["id"] for image in images] == [1, 2, 3, 4, 5]
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["object"]
    assert [annotation["id"] for annotation in coco.dataset["annotations"]] == list(range(1, len(coco.anns) + 1))
    masks = 0
    for image in images:
        expected = found(model, here / "photos" / image["file_name"])
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        for annotation, mask, score in zip(annotations, expected["masks"], expected["scores"], strict=True):
            assert (image["height"], image["width"]) == mask.shape
            assert np.array_equal(coco.annToMask(annotation), mask.numpy())
            assert annotation["bbox"] == toBbox(annotation["segmentation"]).tolist()
            assert annotation["area"] == mask.sum()
            assert annotation["score"] == score.item()
            assert (annotation["iscrowd"], annotation["category_id"]) == (0, 1)
            masks += 1
    assert masks == len(coco.anns) > 8
    assert not (good / segmentation.PARTIAL).exists()


def test_an_adapter_is_merged_and_changes_the_masks(here, good, tmp_path):
    adapted = trained(loaded(here / "split"), tmp_path / "lora", r=2, target_modules=["q", "v"])
    assert main(command(here, tmp_path / "out", "--adapter", str(tmp_path / "lora"), "--min-iou", "0.1")) == 0
    # Merged weights round otherwise, so the peer is merged as well.
    expected = found(adapted.merge_and_unload(), here / "photos/a/coins.png", pred_iou_thresh=0.1)
    annotations = json.loads((tmp_path / "out/annotations.json").read_text())["annotations"]
    ours = [annotation for annotation in annotations if annotation["image_id"] == 1]
    assert ours
    for annotation, mask in zip(ours, expected["masks"], strict=True):
        assert np.array_equal(decode(annotation["segmentation"]), mask.numpy())
    before = json.loads((good / "annotations.json").read_text())["annotations"]
    assert ours[0]["segmentation"] not in [annotation["segmentation"] for annotation in before]


@pytest.mark.parametrize("source", [TINY_SAM, "stock file.pth"], ids=["transformers", "missing"])
def test_any_checkpoint_is_taken(source, here, good, tmp_path, capsys):
    code = main(["segment", str(source), str(here / "photos"), str(tmp_path / "out"), *FLAGS, "--quiet"])
    if source == TINY_SAM:
        assert code == 0
        assert same(good, tmp_path / "out")
    else:
        assert code == 2
        assert "stock file.pth does not exist" in capsys.readouterr().err


def same(one, other):
    return (one / "annotations.json").read_bytes() == (other / "annotations.json").read_bytes()


def test_without_any_mask_it_says_what_to_lower(here, tmp_path, capsys):
    assert main(command(here, tmp_path / "out", "--min-iou", "1", images="photos/plain.png")) == 0
    assert "no mask passed; lower --min-iou" in capsys.readouterr().out
    dataset = json.loads((tmp_path / "out/annotations.json").read_text())
    assert (dataset["annotations"], len(dataset["images"])) == ([], 1)


# Stopped and resumed


class Killed(BaseException):
    """As SIGKILL, it runs no `except Exception` of the code under test."""


class Killer:
    """Counts the steps of a run, and ends it before the step `at`."""

    def __init__(self, monkeypatch):
        self.steps, self.at, self.segmented = 0, None, []
        for module, name in (
            (atomic, "_flush_entry"),
            (atomic.os, "replace"),
            (segmentation, "_clear"),
            (segmentation, "_read"),
            (segmentation, "masks_of"),
            (segmentation, "draw_overlay"),
            (segmentation, "draw_masks"),
            (segmentation.json, "dumps"),
        ):
            monkeypatch.setattr(module, name, self.counting(getattr(module, name)))

    def counting(self, function):
        def count(*args, **options):
            self.steps += 1
            if self.at is not None and self.steps >= self.at:  # and no clean-up after it
                if self.steps == self.at and function.__name__ == "_flush_entry" and args[0].is_file():
                    os.truncate(args[0], args[0].stat().st_size // 2)  # in the middle of writing
                raise Killed
            if function.__name__ == "masks_of":
                self.segmented.append(args[1])
            return function(*args, **options)

        return count


def run(here, out):
    """As the command line, but for the catching of errors."""
    segmentation.segment(
        here / "split", [here / "photos"], out, format="png", overlay=True, progress=False, **OPTIONS_OF_SEGMENT
    )


OPTIONS_OF_SEGMENT = {name: value for name, value in OPTIONS.items() if name != "progress"}


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_twenty_times_and_resumed_all_files_are_those_of_an_uninterrupted_run(here, tmp_path, monkeypatch):
    killer, random_ = Killer(monkeypatch), random.Random(14)
    run(here, tmp_path / "whole")
    steps, expected = killer.steps, tree(tmp_path / "whole")
    assert steps > 50
    assert {path.split("/")[0] for path in expected} == {
        "annotations.json", "masks", "overlays", "parts", "segment.json"
    }  # fmt: skip

    kills = finished = 0
    while kills < 20 or (tmp_path / "out").exists():
        parts = {path.name for path in (tmp_path / "out/parts").glob("*")}
        done = [image.name for image in find_images([here / "photos"], tmp_path)[1] if image.part in parts]
        killer.steps, killer.segmented = 0, []
        killer.at = random_.randint(1, steps) if kills < 20 else None
        try:
            run(here, tmp_path / "out")
        except Killed:
            kills += 1
        else:
            assert tree(tmp_path / "out") == expected
            shutil.rmtree(tmp_path / "out")
            finished += 1
        assert not set(done) & set(killer.segmented)
    assert finished > 3


@pytest.mark.slow
def test_a_process_that_is_killed_for_good_goes_on(here, good, tmp_path):
    argv = [sys.executable, "-m", "conversion", *command(here, tmp_path / "out")]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list((tmp_path / "out").glob("parts/*"))) < 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out/annotations.json").exists()
    assert main(command(here, tmp_path / "out")) == 0
    assert same(good, tmp_path / "out")


def test_ctrl_c_says_that_the_run_goes_on(here, good, tmp_path, capsys, monkeypatch):
    def interrupt(model, name, *rest):
        if name == NAMES[2]:
            raise KeyboardInterrupt
        return segment(model, name, *rest)

    segment = segmentation.masks_of
    monkeypatch.setattr(segmentation, "masks_of", interrupt)
    assert main(command(here, tmp_path / "out")) == 130
    assert capsys.readouterr().err.startswith("sam-split: error: interrupted; the same command goes on")
    assert len(list((tmp_path / "out/parts").iterdir())) == 2
    monkeypatch.setattr(segmentation, "masks_of", segment)
    assert main(command(here, tmp_path / "out")) == 0
    assert same(good, tmp_path / "out")


def test_a_finished_run_has_nothing_to_do(here, good, tmp_path, capsys):
    out = shutil.copytree(good, tmp_path / "out")
    assert main(command(here, out)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert tree(out) == tree(good)


def test_what_changed_is_done_again_and_what_is_new_is_added(here, tmp_path, monkeypatch):
    photos = shutil.copytree(here / "photos", tmp_path / "photos")
    killer, argv = Killer(monkeypatch), command(tmp_path, tmp_path / "out", model=here / "split")
    assert main(argv) == 0
    killer.segmented = []
    Image.fromarray(data.coins()[:60, :70]).save(photos / "plain.png")
    shutil.copyfile(photos / "a/coins.png", photos / "new.png")
    assert main(argv) == 0
    assert killer.segmented == ["new.png", "plain.png"]
    images = json.loads((tmp_path / "out/annotations.json").read_text())["images"]
    assert [(image["file_name"], image["width"]) for image in images[-2:]] == [("new.png", 230), ("plain.png", 70)]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--points", "6"], "--points 5, and this is 6"),
        (["--min-iou", "0.4"], "--min-iou 0.5, and this is 0.4"),
        (["--min-region", "3"], "--min-region 0, and this is 3"),
        (["--crop-layers", "1"], "--crop-layers 0, and this is 1"),
    ],
)
def test_other_options_are_refused(more, named, here, good, capsys):
    before = tree(good)
    assert main([*command(here, good), *more]) == 2
    assert named in one_line(capsys)
    assert tree(good) == before


def test_other_weights_and_images_elsewhere_are_refused(here, good, tmp_path, capsys):
    stock_model().save_pretrained(tmp_path / "other")
    capsys.readouterr()
    assert main(command(here, good, model=tmp_path / "other")) == 2
    assert f"the model {here / 'split'}, and this is {tmp_path / 'other'}" in one_line(capsys)
    assert main(command(here, good, images="photos/a")) == 2
    assert f"images below {here / 'photos'}, and this is {here / 'photos/a'}" in one_line(capsys)


def one_line(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line]
    assert line.startswith("sam-split: error: ")
    return line


# Images


def test_files_folders_and_patterns_are_taken_once(here, good, tmp_path, monkeypatch):
    monkeypatch.chdir(here)
    out = here / "photos" / "out"
    images = ["photos/plain.png", "photos/a", "photos/**/coins.*", "photos/b/coffee.JPG", "photos"]
    try:
        for _ in range(2):  # the second time there are images inside OUT, which are not taken
            assert (
                main(["segment", "split", *images, str(out), *FLAGS, "--quiet", "--overlay", "--format", "png"]) == 0
            )
            assert same(good, out)
        assert list(out.rglob("*.jpg"))
    finally:
        shutil.rmtree(out)


@pytest.mark.parametrize("kind", ["text", "cut", "empty"])
def test_an_unreadable_image_is_named_or_skipped(kind, here, good, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(here / "photos", photos)
    content = (photos / "a/coins.png").read_bytes()
    (photos / "b/bad.png").write_bytes({"text": b"no image", "cut": content[:4000], "empty": b""}[kind])
    argv = command(tmp_path, tmp_path / "out", model=here / "split")
    assert main(argv) == 2
    line = one_line(capsys)
    assert str(photos / "b/bad.png") in line
    assert "--skip-bad" in line
    assert not (tmp_path / "out/annotations.json").exists()
    assert main([*argv, "--skip-bad"]) == 0
    captured = capsys.readouterr()
    assert "b/bad.png" in captured.err
    assert captured.out.splitlines()[-2] == "left out, because it cannot be read: b/bad.png"
    assert same(good, tmp_path / "out")


BAD = [
    ("segment split photos", "OUT"),
    ("segment split nowhere out", "'nowhere' names no image"),
    ("segment split https://x.org/a.png out", "'https://x.org/a.png' is an address; download the image"),
    ("segment split '' out", "name of an image is empty"),
    ("segment split photos/*.gif out", "'photos/*.gif' names no image"),
    ("segment split split out", "'split' names no image"),
    ("segment nowhere.pth photos out", "nowhere.pth does not exist"),
    ("segment split photos a-file", "a-file exists already"),
    ("segment split photos photos/b", "was not made by `sam-split segment`"),
    ("segment split photos no/out", "no is not a folder"),
    ("segment split photos split/out", "is inside split"),
    ("segment split photos ''", "OUT is empty"),
    ("segment split photos out --points 0", "--points: must be an integer of at least 1, got 0"),
    ("segment split photos out --points x", "--points: must be an integer of at least 1, got x"),
    ("segment split photos out --points 99999", "--points: must be an integer from 1 to 1024, got 99999"),
    ("segment split photos out --crop-layers 99", "--crop-layers: must be an integer from 0 to 8, got 99"),
    ("segment split photos out --device meta", "--device 'meta' computes nothing"),
    ("segment split photos out --min-iou nan", "--min-iou: must be a number from 0 to 1, got nan"),
    ("segment split photos out --min-stability 2", "--min-stability: must be a number from 0 to 1, got 2"),
    ("segment split photos out --format jpg", "'jpg'"),
    ("segment split photos out --device nowhere", "--device 'nowhere'"),
    ("segment split photos out --device cuda:99", "--device 'cuda:99'"),
    ("segment split photos out --adapter split", "split holds no adapter_config.json"),
    ("segment split photos/notes.txt out --skip-bad", "none of the 1 images can be read"),
]


@pytest.mark.parametrize(("words", "named"), BAD, ids=[words for words, _ in BAD])
def test_bad_input_is_one_line(words, named, here, capsys, monkeypatch):
    monkeypatch.chdir(here)
    (here / "a-file").write_text("mine")
    before = sorted(here.rglob("*"))
    try:
        code = main([word.strip("'") for word in words.split()] + ["--quiet"])
    except SystemExit as error:  # argparse's own
        code = error.code
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("sam-split: error: ")
    assert named in lines[-1]
    if "--skip-bad" in words:  # what it left out was said
        assert lines[0].startswith("sam-split: skipped: ")
    else:
        assert len(lines) == 1
    assert sorted(here.rglob("*")) == before


def test_without_pillow(here, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(command(here, tmp_path / "out")) == 2
    assert 'pip install "sam-split[demo]"' in one_line(capsys)


def test_a_damaged_part_is_named(here, good, tmp_path, capsys):
    out = shutil.copytree(good, tmp_path / "out")
    part = next((out / "parts").iterdir())
    part.write_text('{"image"')
    assert main(command(here, out)) == 2
    assert str(part) in one_line(capsys)


# What is drawn


def test_masks_and_label_maps_are_drawn_without_segmenting_again(here, good, tmp_path, monkeypatch):
    out = shutil.copytree(good, tmp_path / "out")
    killer = Killer(monkeypatch)
    for format in ("png", "labels"):
        assert main(command(here, out, "--format", format)) == 0
    assert killer.segmented == []
    model, masks = loaded(here / "split"), 0
    for name, drawn in zip(NAMES, ["a/coins", "b/coffee", "b/coins.jpg", "b/coins.png", "plain"], strict=True):
        expected = found(model, here / "photos" / name, output_label_map=True)
        with Image.open(out / f"labels/{drawn}.png") as labels:
            assert labels.mode == "I;16"
            assert np.array_equal(np.asarray(labels), expected["label_map"].numpy())
        files = sorted((out / "masks" / drawn).iterdir())
        assert [path.name for path in files] == [f"{i:04}.png" for i in range(1, len(expected["masks"]) + 1)]
        for path, mask in zip(files, expected["masks"], strict=True):
            assert np.array_equal(np.asarray(Image.open(path)), mask.numpy())
            masks += 1
    assert masks > 8


def test_run_lengths_are_those_of_pycocotools():
    generator = np.random.default_rng(0)
    for size, share in [((1, 1), 0.5), ((7, 5), 0.5), ((300, 200), 0.01), ((40, 900), 0.9), ((6, 6), 0), ((6, 6), 1)]:
        for _ in range(20):
            mask = generator.random(size) < share
            if size[0] > 100:
                mask[:, 50:150] = generator.random() < 0.5  # long runs
            rle = encode(np.asfortranarray(mask.astype(np.uint8)))
            rle["counts"] = rle["counts"].decode()
            assert np.array_equal(mask_images.mask_of(rle), mask)


def test_the_overlay_shows_each_mask():
    """Two squares side by side, a small one inside the first; colours differ where masks meet, the rest is grey."""
    masks = np.zeros((3, 60, 100), np.uint8)
    masks[0, 5:55, 5:50] = masks[1, 5:55, 50:95] = masks[2, 20:40, 15:35] = 1
    annotations = []
    for mask in masks:
        rle = encode(np.asfortranarray(mask))
        rle["counts"] = rle["counts"].decode()
        annotations.append({"segmentation": rle, "bbox": toBbox(rle).tolist(), "area": int(mask.sum())})
    drawn = mask_images.overlay(np.full((60, 100, 3), 90, np.uint8), annotations)
    assert drawn.shape == (480, 800, 3)
    places = (10, 10), (10, 70), (30, 25), (1, 2)
    first, second, third, outside = (drawn[8 * y + 4, 8 * x + 4].astype(int) for y, x in places)
    assert len({*outside}) == 1
    for one, other in ((first, second), (first, third), (first, outside), (second, outside)):
        assert abs(one - other).max() > 40
    assert (drawn[:, 8 * 5 - 1] == 255).all(1).sum() == 400  # a white line outside of the first, 50 pixels high
    assert mask_images.overlay(np.zeros((900, 1000, 3), np.uint8), []).shape == (900, 1000, 3)


def test_a_photograph_is_turned_upright(here, tmp_path):
    photograph, exif = Image.fromarray(data.coins()[:100, :150]), Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    photograph.save(tmp_path / "held.jpg", exif=exif)
    assert main(command(tmp_path, tmp_path / "out", "--overlay", images="held.jpg", model=here / "split")) == 0
    (image,) = json.loads((tmp_path / "out/annotations.json").read_text())["images"]
    assert (image["width"], image["height"]) == (100, 150)
    assert Image.open(tmp_path / "out/overlays/held.jpg").size == (500, 750)


def test_a_gpu_without_memory_is_one_line(here, tmp_path, capsys, monkeypatch):
    def fail(self, *args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(SamSplitModel, "generate_masks", fail)
    assert main(command(here, tmp_path / "out")) == 2
    assert "a/coins.png does not fit" in one_line(capsys)
    assert not (tmp_path / "out").exists(), "another try may have other options"
