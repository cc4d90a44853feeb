"""A folder, COCO's annotations and a Hugging Face dataset are read as the same examples."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from training_data import image_folder

from conversion.cli import main
from sam_split.training import background_clicks, find_examples, object_masks


def test_folder_coco_and_dataset_agree(tmp_path):
    folder = image_folder(tmp_path / "folder")
    expected = find_examples(folder)
    assert expected[0]["masks"].shape == (2, 40, 60)

    coco = tmp_path / "coco"
    coco.mkdir()
    (folder / "images").rename(coco / "images")
    images, annotations = [], []
    for i in range(4):
        images.append({"id": i, "file_name": f"{i}.png", "height": 40, "width": 60})
        for mask in object_masks(Image.open(folder / "masks" / f"{i}.png")):
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            rle["counts"] = rle["counts"].decode()
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": 1, "segmentation": rle})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (coco / "annotations.json").write_text(json.dumps(content))

    rows = {
        "image": [str(coco / "images" / f"{i}.png") for i in range(4)],
        "mask": [str(folder / "masks" / f"{i}.png") for i in range(4)],
    }
    data = datasets.Dataset.from_dict(rows)
    data = data.cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())
    data.save_to_disk(tmp_path / "saved")

    image_folder(tmp_path / "again")
    expected = find_examples(tmp_path / "again")
    for source in (coco, tmp_path / "saved"):
        images = find_examples(source)
        assert len(images) == 4
        for ours, theirs in zip((images[i] for i in range(4)), (expected[i] for i in range(4)), strict=True):
            assert np.array_equal(ours["masks"], theirs["masks"])
            assert np.array_equal(np.asarray(ours["image"]), np.asarray(theirs["image"]))
    with pytest.raises(ValueError, match="has no column 'truth'; it has image, mask"):
        find_examples(tmp_path / "saved", mask_column="truth")


@pytest.mark.parametrize("name", ["0.tif", "0.tiff", "0.png"])
def test_masks_of_16_bits(name, tmp_path):
    """More objects than 8 bits can number, as programs for microscopy save them."""
    folder = image_folder(tmp_path / "folder", number=1)
    values = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) // 8
    (folder / "masks" / "0.png").unlink()
    Image.fromarray(values).save(folder / "masks" / name)
    masks = find_examples(folder)[0]["masks"]
    assert masks.shape == (299, 40, 60)
    assert np.array_equal((masks * np.arange(1, 300)[:, None, None]).sum(0), values)


def test_one_value_for_several_objects_is_said(tmp_path, capsys):
    """A mask of 0 and 255 is one object, which is rarely meant where it is in pieces."""
    folder = image_folder(tmp_path / "folder", number=3)
    find_examples(folder).usable()
    assert capsys.readouterr().err == ""
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.uint8(255) * (np.asarray(Image.open(path)) > 0)).save(path)
    assert len(find_examples(folder).usable()) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "3 of 3 images have one object each, in pieces that do not touch; if every piece is an object, number them"
    )


def test_suffixes_in_capitals_and_two_images_of_one_name(tmp_path):
    folder = image_folder(tmp_path / "folder", number=2)
    Image.open(folder / "masks" / "0.png").save(folder / "masks" / "0.TIF")
    (folder / "masks" / "0.png").unlink()
    assert len(find_examples(folder)) == 2
    shutil.copy(folder / "images" / "1.png", folder / "images" / "1.jpg")
    with pytest.raises(ValueError, match=r"1.jpg and .*1.png have one mask, .*; rename one of them"):
        find_examples(folder)
    shutil.rmtree(folder / "masks")
    with pytest.raises(ValueError, match="holds no folder masks/"):
        find_examples(folder)


def test_coco_with_crowds_and_polygons_outside(base, tmp_path):
    """A crowd is void for every object and in no background; what is outside the image is cut off or left out."""

    def annotation(number, x0, y0, x1, y1, **more):
        polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
        return {"id": number, "image_id": 1, "category_id": 1, "segmentation": [polygon], **more}

    crowd = np.zeros((40, 60), np.uint8)
    crowd[:, 50:] = 1
    rle = {"size": [40, 60], "counts": [50 * 40, 10 * 40]}  # column by column
    annotations = [
        annotation(1, 5, 5, 15, 15),
        annotation(2, 40, 20, 80, 90),
        annotation(3, 70, 5, 90, 15),
        annotation(4, 0, 0, 0, 0) | {"segmentation": rle, "iscrowd": 1},
    ]
    others = [{**own, "id": own["id"] + 4, "image_id": 2} for own in annotations]
    content = {
        "images": [{"id": i + 1, "file_name": f"{i}.png", "height": 40, "width": 60} for i in range(2)],
        "annotations": annotations + others,
        "categories": [],
    }
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (60, 40)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    first, second = find_examples(tmp_path)[0]["masks"]
    assert np.array_equal(first == -100, crowd == 1)
    assert (first == 1).sum() == 10 * 10
    assert (second[20:, 40:] == 1).all()
    assert np.array_equal(second == -100, (crowd == 1) & (np.arange(40) < 20)[:, None])
    labels = torch.from_numpy(np.stack([first, second]))[None]
    points = background_clicks(labels, 200)[0].reshape(-1, 2)
    assert points[:, 0].max() < 50
    options = ["--holdout", "0.5", "--steps", "2", "--no-everything", "--quiet"]
    assert main(["finetune", str(base), str(tmp_path), str(tmp_path / "out"), *options]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["after"]["images"][0]["objects"] == 2
