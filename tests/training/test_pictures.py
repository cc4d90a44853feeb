"""The page shows the masks of the worst images at full resolution, and the plot each image's gain."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from pycocotools import mask as coco_mask

from sam_split.training import Evaluation, overlay_page, plot_gains
from sam_split.training.overlays import COLOURS, LEAST_SIDE
from sam_split.training.pictures import GAIN, LOSS
from sam_split.training.recall import mask_entry, object_entry

SIZE = 50, 80
SCALE = LEAST_SIDE // max(SIZE)
NAME = 'a<b> & "c".png'


def square(left, side=20):
    mask = np.zeros(SIZE, np.int8)
    mask[10 : 10 + side, left : left + side] = 1
    return mask


def found(mask, **more):
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return mask_entry({**rle, "counts": rle["counts"].decode()}, **more)


def evaluation(*ious, everything=True):
    """Of images with two objects, for each its IoU from box, one and three clicks; the box's masks are narrower."""
    images, masks = [], []
    for index, iou in enumerate(ious):
        row = dict(zip(("iou_box", "iou_1_click", "iou_3_clicks"), iou, strict=True))
        images.append({"name": NAME if not index else f"{index}.png", "objects": 2, **row})
        masks.append({"objects": [object_entry(square(left)) for left in (5, 50)]})
        masks[-1]["box"] = [found(square(left, 12)) for left in (5, 50)]
        if everything:
            images[-1] |= {"average_recall": 0.4, "recall_50": 0.5, "masks": 1}
            masks[-1]["everything"] = [found(square(5), score=0.9)]
    names = [name for name in images[0] if name not in ("name", "objects")]
    return Evaluation({name: float(np.mean([row[name] for row in images])) for name in names}, images, masks)


EXAMPLES = [{"image": np.full((*SIZE, 3), 90 + index, np.uint8), "name": str(index)} for index in range(3)]


class Page(HTMLParser):
    """Raises where tags do not match; keeps attributes by tag, and headings."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.headings = [], {}, []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.setdefault(tag, []).append(dict(attributes))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_a_page_shows_the_worst_images_first(tmp_path):
    before = evaluation((0.5, 0.5, 0.5), (0.9, 0.9, 0.9), (0.2, 0.2, 0.2))
    after = evaluation((0.6, 0.6, 0.6), (0.4, 0.4, 0.4), (0.8, 0.8, 0.8))
    overlay_page(tmp_path, EXAMPLES, {"base": before, "<tuned>": after}, number=2)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.headings == ["1.png", NAME]
    assert "script" not in page.tags
    assert page.tags["html"] == [{"lang": "en"}]
    sources = [image["src"] for image in page.tags["img"]]
    kinds = ["truth", "box-1", "box-2", "everything-1", "everything-2"]
    assert sources == ["gains.png", *(f"pictures/{rank:03}-{kind}.jpg" for rank in (1, 2) for kind in kinds)]
    assert sorted(sources[1:]) == sorted(f"pictures/{path.name}" for path in (tmp_path / "pictures").iterdir())
    assert sources[1:] == [link["href"] for link in page.tags["a"]]
    alternatives = [image["alt"] for image in page.tags["img"]]
    assert alternatives[3] == "1.png: <tuned>, from boxes: IoU 0.400"
    assert alternatives[5] == "1.png: <tuned>, everything-mode: 1 mask, 1 of 2 objects found"
    assert len(set(alternatives)) == len(alternatives)
    assert re.search(r'<th scope="row">IoU from the box</th><td>0.533</td><td>0.600</td>', text)
    assert "The 2 worst of 3 images" in text


def test_masks_keep_their_colours_and_their_pixels(tmp_path):
    """An object and its mask are tinted alike, and no mask is drawn at the decoder's resolution."""
    overlay_page(tmp_path, EXAMPLES[:1], {"base": evaluation((0.5, 0.5, 0.5))})
    assert not (tmp_path / "gains.png").exists()
    drawn = {
        path.stem[4:]: np.asarray(Image.open(path)).astype(int)[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE]
        for path in (tmp_path / "pictures").iterdir()
    }
    assert drawn.keys() == {"truth", "box-1", "everything-1"}
    assert drawn["truth"].shape == (*SIZE, 3)
    grey = 0.65 * 90 + 80

    def tinted(name):
        return np.ptp(drawn[name], axis=2) > 40  # JPEG's own noise is less

    assert np.array_equal(tinted("truth"), (square(5) | square(50)) == 1)
    assert np.array_equal(tinted("box-1"), (square(5, 12) | square(50, 12)) == 1)
    assert np.array_equal(tinted("everything-1"), square(5) == 1)
    for column in (10, 55):
        assert np.abs(drawn["truth"][16, column] - drawn["box-1"][16, column]).max() < 12
    assert np.abs(drawn["truth"][16, 10] - drawn["truth"][16, 55]).max() > 40
    assert np.abs(drawn["truth"][16, 10] - (grey + 0.55 * (COLOURS[0] - grey))).max() < 12


def test_a_page_without_everything_mode(tmp_path):
    quick = evaluation((0.5, 0.5, 0.5), everything=False)
    overlay_page(tmp_path, EXAMPLES, {"base": quick, "tuned": quick})
    assert "everything" not in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_large_pictures_are_made_smaller(tmp_path):
    mask = np.zeros((1000, 3000), np.int8)
    mask[100:900, 200:2500] = 1
    large = evaluation((0.5, 0.5, 0.5), everything=False)
    large.masks[0] = {"objects": [object_entry(mask)], "box": [object_entry(mask)]}
    overlay_page(tmp_path, [{"image": np.zeros((1000, 3000), np.uint8)}], {"base": large})
    assert Image.open(tmp_path / "pictures" / "001-truth.jpg").size == (1600, 533)


@pytest.fixture
def figure(monkeypatch):
    """The figure that is saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: saved.append(self) or save(self, *args, **more))
    return saved


def test_gains_are_drawn_worst_first(tmp_path, figure):
    before = evaluation((0.5, 0.5, 0.5), (0.9, 0.9, 0.9), (0.2, 0.2, 0.2))
    after = evaluation((0.6, 0.5, 0.4), (0.4, 0.8, 0.9), (0.8, 0.8, 0.8))
    plot_gains(tmp_path / "gains.png", {"base": before, "tuned": after})
    assert Image.open(tmp_path / "gains.png").width > 600
    box, click, _, recalled = figure[0].axes
    assert [label.get_text() for label in box.get_yticklabels()] == ["1.png", NAME, "2.png"]
    assert [bar.get_width() for bar in box.patches] == pytest.approx([-0.5, 0.1, 0.6])
    assert [bar.get_width() for bar in click.patches] == pytest.approx([-0.1, 0, 0.6])
    assert [bar.get_width() for bar in recalled.patches] == [0, 0, 0]
    assert box.get_ylim()[0] > box.get_ylim()[1], "the first on top"
    assert box.get_xlim() == click.get_xlim()
    colours = [box.patches[index].get_facecolor() for index in (0, 2)]
    assert ["#" + "".join(f"{round(255 * part):02x}" for part in colour[:3]) for colour in colours] == [LOSS, GAIN]
    assert box.get_title() == "IoU from the box\nmean +0.067"


def test_of_many_images_the_worst_are_drawn(tmp_path, figure):
    before = evaluation(*[(0.5, 0.5, 0.5)] * 100)
    after = evaluation(*[(index / 100, 0.5, 0.5) for index in range(100)])
    plot_gains(tmp_path / "gains.png", {"base": before, "tuned": after})
    assert len(figure[0].axes[0].patches) == 60
    assert "the 60 worst of 100 images" in figure[0].get_suptitle()


def test_evaluations_of_other_images_are_refused(tmp_path):
    two = {"base": evaluation((0.5, 0.5, 0.5)), "tuned": evaluation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}
    with pytest.raises(ValueError, match="of different images"):
        overlay_page(tmp_path, EXAMPLES, two)
    assert not list(tmp_path.iterdir())
