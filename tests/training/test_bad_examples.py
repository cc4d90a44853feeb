"""Bad input of `sam-split finetune`: code 2, one line that names it, and nothing written."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from models import stock_model
from PIL import Image
from training_data import image_folder

from conversion import convert
from conversion.cli import main
from conversion.cli.demo import TINY_SAM

ROOT = Path(__file__).parents[2]


def corners(number, x0, y0, x1, y1):
    """A rectangle as an annotation of image 0."""
    polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
    return {"id": number, "image_id": 0, "category_id": 1, "segmentation": [polygon]}


def coco(folder, text):
    folder.mkdir()
    (folder / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (60, 40)).save(folder / "images" / f"{i}.png")
    (folder / "annotations.json").write_text(text)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Good and bad folders, side by side."""
    place = tmp_path_factory.mktemp("bad")
    convert(TINY_SAM, place / "tiny", progress=False)
    stock_model().save_pretrained(place / "stock")
    shutil.copytree(place / "tiny", place / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    (place / "empty").mkdir()
    (place / "file").write_text("text")
    (place / "broken").mkdir()
    (place / "broken" / "config.json").write_text("{")
    image_folder(place / "data", 3)
    image_folder(place / "one", 1)
    image_folder(place / "none", 0)
    images = {name: image_folder(place / name, 3) for name in (
        "maskless", "nothing", "cut", "no_image", "cut_mask", "size", "objectless", "colour", "deep", "floats",
        "specks",
    )}  # fmt: skip
    (images["maskless"] / "masks" / "1.png").unlink()
    for i in range(3):
        Image.new("L", (60, 40), 0).save(images["nothing"] / "masks" / f"{i}.png")
    (images["cut"] / "images" / "1.png").write_bytes((images["cut"] / "images" / "1.png").read_bytes()[:60])
    (images["no_image"] / "images" / "1.png").write_text("text")
    (images["cut_mask"] / "masks" / "1.png").write_bytes(b"")
    Image.new("L", (50, 40), 1).save(images["size"] / "masks" / "1.png")
    Image.new("L", (60, 40), 0).save(images["objectless"] / "masks" / "1.png")
    Image.new("RGB", (60, 40), (1, 2, 3)).save(images["colour"] / "masks" / "1.png")
    Image.fromarray(np.full((40, 60), 999, np.uint16)).save(images["deep"] / "images" / "1.png")
    Image.fromarray(np.full((40, 60), 0.5, np.float32)).save(images["floats"] / "images" / "1.png", format="TIFF")
    coco(place / "coco_cut", '{"images": [')
    coco(place / "coco_list", "[]")
    coco(place / "coco_bare", "{}")
    files = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in range(2)]
    coco(place / "coco_none", json.dumps({"images": files, "annotations": [], "categories": []}))
    shapeless = [{"id": 1, "image_id": 0, "category_id": 1}]
    coco(place / "coco_shapeless", json.dumps({"images": files, "annotations": shapeless, "categories": []}))
    boxed = [{"id": 5, "image_id": 0, "category_id": 1, "bbox": [8, 5, 22, 15]}]
    coco(place / "coco_boxes", json.dumps({"images": files, "annotations": boxed, "categories": []}))
    crowds = [{**corners(1, 8, 5, 30, 20), "iscrowd": 1}]
    coco(place / "coco_crowds", json.dumps({"images": files, "annotations": crowds, "categories": []}))
    outside = [corners(1, 70, 5, 90, 20)]
    coco(place / "coco_outside", json.dumps({"images": files, "annotations": outside, "categories": []}))
    shapes = {
        "coco_box": [[8, 5, 22, 15]],
        "coco_odd": [[8, 5, 30, 5, 30]],
        "coco_nan": [[8, 5, 30, 5, 30, float("nan")]],
        "coco_far": [[8, 5, 30, 5, 1e9, 20]],
        "coco_short": {"size": [40, 60], "counts": [10, 5]},
        "coco_spoilt": {"size": [40, 60], "counts": "zzz"},
        "coco_unsized": {"counts": [10, 5, 2385]},
    }
    for name, shape in shapes.items():
        annotation = {**corners(1, 8, 5, 30, 20), "segmentation": shape}
        coco(place / name, json.dumps({"images": files, "annotations": [annotation], "categories": []}))
    larger = [{**file, "width": 61} for file in files]
    coco(place / "coco_size", json.dumps({"images": larger, "annotations": [corners(1, 8, 5, 30, 20)]}))
    lost = [{**file, "file_name": f"lost{file['id']}.png"} for file in files]
    coco(place / "coco_lost", json.dumps({"images": lost, "annotations": [], "categories": []}))
    for path in (images["specks"] / "masks").iterdir():
        mask = np.zeros((800, 1200), np.uint8)
        mask[100:400, 100:600], mask[790:792, 5:7] = 1, 2  # 9.4 pixels of the image are one of the model's
        Image.fromarray(mask).save(path)
        Image.new("RGB", (1200, 800)).save(images["specks"] / "images" / path.name)
    rows = datasets.Dataset.from_dict({"image": [1, 2], "mask": [1, 2]})
    rows.save_to_disk(place / "rows")
    datasets.DatasetDict({"test": rows}).save_to_disk(place / "splits")
    for out in ("finished", "unfinished/checkpoints"):
        (place / out).mkdir(parents=True)
    (place / "finished" / "results.json").write_text("{}")
    return place


CASES = {
    "no base": ("nowhere data out", "nowhere is neither a model's folder nor a Hub id"),
    "file as base": ("file data out", "file is neither a model's folder nor"),
    "empty base": ("empty data out", "empty is neither a model's folder nor"),
    "broken config": ("broken data out", "broken"),
    "stock base": ("stock data out", "`sam-split convert stock NEW`"),
    "base without weights": ("weightless data out", "weightless"),
    "no data": ("tiny nowhere out", "nowhere is neither a folder nor a dataset"),
    "no absolute data": ("tiny /nowhere/data out", "/nowhere/data is not a folder"),
    "file as data": ("tiny file out", "file is not a folder"),
    "empty data": ("tiny empty out", "empty holds neither images/ and masks/"),
    "no images": ("tiny none out", "no image can be used"),
    "one image": ("tiny one out", "at least two images are needed, one of them to test on, got 1"),
    "no mask": ("tiny maskless out", "1.png has no mask"),
    "cut image": ("tiny cut out", "1.png: "),
    "text as image": ("tiny no_image out", "1.png: cannot identify image file"),
    "empty mask file": ("tiny cut_mask out", "1.png: cannot identify image file"),
    "unequal sizes": ("tiny size out", "1.png: its mask is 50 x 40 pixels, and the image 60 x 40"),
    "no objects": ("tiny objectless out", "1.png: example '1.png' has no object"),
    "mask in colour": ("tiny colour out", "1.png: a mask must have one channel, got shape (40, 60, 3)"),
    "click on an object that vanishes": (
        "tiny specks out --prompts points",
        "0.png: no prompt can be made for masks [1], which have no pixel left at the model's 128 x 128; cut the image",
    ),
    "box around an object that vanishes": ("tiny specks out --prompts box", "no prompt can be made for masks [1]"),
    "validation with objects that vanish": ("tiny data out --val specks", "no prompt can be made for masks [1]"),
    "only images with objects that vanish": ("tiny specks out --skip-bad", "no image can be used"),
    "16-bit image": ("tiny deep out", "8 bits per channel, got mode 'I;16'"),
    "float image": ("tiny floats out", "8 bits per channel, got mode 'F'"),
    "bad validation": ("tiny data out --val size", "its mask is 50 x 40 pixels"),
    "no validation": ("tiny data out --val nowhere", "nowhere is neither a folder nor"),
    "cut COCO": ("tiny coco_cut out", "annotations.json is not in COCO's format"),
    "COCO list": ("tiny coco_list out", "annotations.json is not in COCO's format"),
    "bare COCO": ("tiny coco_bare out", "annotations.json is not in COCO's format"),
    "COCO without objects": ("tiny coco_none out", "0.png: example '0.png' has no object"),
    "COCO without shapes": ("tiny coco_shapeless out", "0.png: annotation 1 has no segmentation"),
    "COCO with boxes only": ("tiny coco_boxes out", "0.png: annotation 5 has no segmentation; masks are needed"),
    "COCO with crowds only": ("tiny coco_crowds out", "0.png: example '0.png' has no object"),
    "COCO outside the image": ("tiny coco_outside out", "0.png: example '0.png' has no object"),
    "COCO with a box as polygon": ("tiny coco_box out", "annotation 1 has a polygon of 4 numbers"),
    "COCO with half a corner": ("tiny coco_odd out", "annotation 1 has a polygon of 5 numbers"),
    "COCO with NaN": ("tiny coco_nan out", "annotation 1 has a polygon with a corner at nan pixels"),
    "COCO far outside": ("tiny coco_far out", "annotation 1 has a polygon with a corner at 1000000000.0 pixels"),
    "COCO with few run lengths": ("tiny coco_short out", "run lengths of 15 pixels, but its size is 40 x 60"),
    "COCO with spoilt run lengths": ("tiny coco_spoilt out", "pixels, but its size is 40 x 60"),
    "COCO without a size": ("tiny coco_unsized out", "not in COCO's format: no 'size'"),
    "COCO of another size": ("tiny coco_size out", "its (height, width) is (40, 61), but it is (40, 60)"),
    "no object anywhere": ("tiny nothing out --skip-bad", "no image can be used"),
    "COCO without files": ("tiny coco_lost out", "lost0.png: "),
    "numbers as images": ("tiny rows out", "row 0: a mask must have one channel"),
    "no column": ("tiny rows out --mask-column truth", "no column 'truth'; it has image, mask"),
    "no split": ("tiny splits out", "no split 'train'; name one with --split: test"),
    "unknown preset": ("tiny data out --preset all", "argument --preset: invalid choice: 'all'"),
    "preset twice": ("tiny data out --preset late late", "--preset names one twice: late late"),
    "too many late layers": (
        "tiny data out --preset late --late-layers 4",
        "must be from 1 to 3, got 4",
    ),
    "no late layers": (
        "tiny data out --preset late --late-layers 0",
        "must be an integer of at least 1",
    ),
    "rank 0": ("tiny data out --rank 0", "--rank: must be an integer of at least 1, got 0"),
    "no objects in a step": ("tiny data out --objects 0", "--objects: must be an integer of at least 1, got 0"),
    "negative batch": ("tiny data out --batch=-2", "--batch: must be an integer of at least 1, got -2"),
    "half a batch": ("tiny data out --batch 0.5", "--batch: must be an integer of at least 1, got 0.5"),
    "word as batch": ("tiny data out --batch two", "--batch: must be an integer of at least 1, got two"),
    "negative epochs": ("tiny data out --epochs=-1", "--epochs: must be a number of at least 0, got -1"),
    "endless epochs": ("tiny data out --epochs inf", "--epochs: must be a number of at least 0, got inf"),
    "no steps": ("tiny data out --steps 0", "--steps: must be an integer of at least 1, got 0"),
    "negative rate": ("tiny data out --lr=-1", "--lr: must be a number of at least 0, got -1"),
    "NaN rate": ("tiny data out --lr nan", "--lr: must be a number of at least 0, got nan"),
    "unknown prompts": ("tiny data out --prompts text", "argument --prompts: invalid choice: 'text'"),
    "negative background": ("tiny data out --background=-1", "--background: must be an integer of at least 0"),
    "no steps between checkpoints": ("tiny data out --save-steps 0", "--save-steps: must be an integer of at least 1"),
    "unknown tracker": ("tiny data out --report-to paper", "--report-to paper: paper is not supported"),
    "negative corrections": ("tiny data out --corrections=-1", "--corrections: must be an integer of at least 0"),
    "negative patience": ("tiny data out --patience=-1", "--patience: must be an integer of at least 0"),
    "negative seed": ("tiny data out --seed=-1", "--seed: must be an integer of at least 0"),
    "all held out": ("tiny data out --holdout 1.5", "--holdout: must be a number between 0 and 1"),
    "NaN held out": ("tiny data out --holdout nan", "--holdout: must be a number between 0 and 1"),
    "a rank that no layer has": ("tiny data out --rank 100000000", "--rank: must be an integer from 1 to 1024"),
    "resumed with more presets": (
        "tiny data unfinished --preset late decoder --resume",
        "unfinished holds the run of one",
    ),
    "unknown option": ("tiny data out --epoch 3", "unrecognized arguments: --epoch 3"),
    "no OUT": ("tiny data", "the following arguments are required: OUT"),
    "finished OUT": ("tiny data finished", "finished holds a finished run; name another OUT"),
    "unfinished OUT": ("tiny data unfinished", "unfinished holds an unfinished run; name another OUT"),
    "file as OUT": ("tiny data file", "file is a file; name a folder for OUT"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(place, monkeypatch, capsys, case):
    command, message = CASES[case]
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    try:
        code = main(["finetune", *command.split()])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("sam-split: error: ")]
    assert code == 2, printed
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in printed
    assert sorted(place.rglob("*")) == before


@pytest.mark.slow
def test_several_presets(place, monkeypatch, capfd):
    """Each runs in a process of its own, and the first that fails ends the run."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main("finetune tiny size out/ --preset late decoder".split()) == 2
    assert "its mask is 50 x 40 pixels" in capfd.readouterr().err
    assert not (place / "out").exists()
