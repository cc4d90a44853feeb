"""Mask generation takes every kind of image and option, and refuses in one line what would mean something else."""

import http.server
import io
import math
import threading

import numpy as np
import pytest
import torch
from everything import PHOTOGRAPHS, Decoder, ours
from PIL import Image
from skimage.measure import label, regionprops
from transformers.utils import logging

from sam_split import run_lengths_sam_split as runs
from sam_split.images_sam_split import pixels_of
from sam_split.mask_generation_sam_split import _crop_boxes

OPTIONS = {"points_per_crop": 4, "pred_iou_thresh": 0.2, "stability_score_thresh": 0.3, "output_bboxes_mask": True}
COFFEE = PHOTOGRAPHS["coffee"]
ARRAY = np.array(COFFEE)
GRAY = np.array(PHOTOGRAPHS["coins"])[..., 0]


def generate(image=COFFEE, model=None, **options):
    return (model or ours()).generate_masks(image, **{**OPTIONS, **options})


def assert_identical(found, expected):
    assert len(expected["scores"]) > 2
    assert torch.equal(found["scores"], expected["scores"])
    assert torch.equal(found["bounding_boxes"], expected["bounding_boxes"])
    assert all(torch.equal(mask, other) for mask, other in zip(found["masks"], expected["masks"], strict=True))


@pytest.mark.parametrize(
    "image",
    [
        ARRAY,
        torch.from_numpy(ARRAY).permute(2, 0, 1),
        torch.from_numpy(ARRAY).permute(2, 0, 1).float() / 255,
        torch.from_numpy(ARRAY).permute(2, 0, 1).double() / 255,
        torch.from_numpy(ARRAY),
        ARRAY.transpose(2, 0, 1),
        ARRAY.astype(np.int64),
        ARRAY.astype(np.uint16) * 257,
        np.dstack([ARRAY, np.full(ARRAY.shape[:2], 7, np.uint8)]),
        COFFEE.convert("RGBA"),
        ARRAY[:, ::-1][:, ::-1],
    ],
)
def test_images_of_every_kind_in_colour(image):
    expected = torch.from_numpy(ARRAY).permute(2, 0, 1)
    assert torch.equal(pixels_of(image if not isinstance(image, np.ndarray) else image.copy()), expected)


@pytest.fixture
def address(tmp_path):
    """Of a web server that has coffee.png, and page.png, which is none."""
    COFFEE.save(tmp_path / "coffee.png")
    (tmp_path / "page.png").write_text("<html>")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_image_from_the_web(address):
    assert torch.equal(pixels_of(f"{address}/coffee.png"), torch.from_numpy(ARRAY).permute(2, 0, 1))


def test_what_is_no_image_on_the_web(address):
    with pytest.raises(ValueError, match=f"no image can be read from {address}/page.png: "):
        pixels_of(f"{address}/page.png")


@pytest.mark.parametrize(
    "image",
    [
        GRAY,
        GRAY[..., None],
        torch.from_numpy(GRAY.copy()),
        torch.from_numpy(GRAY.copy())[None],
        GRAY.astype(np.uint16) * 257,
        GRAY / 255,
        Image.fromarray(GRAY),
        Image.fromarray(GRAY.astype(np.uint16) * 257),
        Image.fromarray(GRAY.astype(np.float32) / 255),
        Image.fromarray(GRAY.astype(np.float32)),
        Image.fromarray(GRAY.astype(np.int32) * 257),
    ],
)
def test_images_of_every_kind_in_gray(image):
    assert torch.equal(pixels_of(image), torch.from_numpy(GRAY.copy()).expand(3, -1, -1))


def test_files(tmp_path):
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    COFFEE.convert("RGBA").save(tmp_path / "rgba.png")
    assert torch.equal(pixels_of(tmp_path / "deep.png"), torch.from_numpy(GRAY.copy()).expand(3, -1, -1))
    assert_identical(generate(str(tmp_path / "rgba.png")), generate())


def test_a_photograph_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    COFFEE.save(tmp_path / "turned.png", exif=exif)
    assert pixels_of(tmp_path / "turned.png").shape == (3, COFFEE.width, COFFEE.height)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((6, 5, 2), np.uint8), r"1, 3 or 4 channels beside them, got \(6, 5, 2\)"),
        (np.zeros((0, 5, 3), np.uint8), r"got \(0, 5, 3\)"),
        (np.zeros(5, np.uint8), r"got \(5,\)"),
        (ARRAY.astype(np.float32), r"must lie in \[0, 1\]"),
        (Image.fromarray(np.full((8, 8), -1, np.float32)), r"must lie in \[0, 1\]"),
        (np.full((4, 5), np.nan), r"must lie in \[0, 1\]"),
        (np.full((4, 5), 256), r"must lie in \[0, 255\]"),
        (np.full((4, 5), -1), r"must lie in \[0, 255\]"),
        (torch.zeros(1, dtype=torch.uint8).expand(10_000, 10_001), "10001 x 10000 pixels is larger than 100 MP; cut"),
        ("no_such_file.png", "no image can be read from no_such_file.png, which is no file here: "),
    ],
)
def test_images_that_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        generate([image])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pred_iou_tresh": 0.5}, TypeError, "'pred_iou_tresh' is no option .* did you mean 'pred_iou_thresh'"),
        ({"colour": 1}, TypeError, "it takes points_per_batch, points_per_crop"),
        ({"points_per_batch": 0}, ValueError, "points_per_batch must be an integer of at least 1, got 0"),
        ({"pred_iou_thresh": "0.9"}, ValueError, "pred_iou_thresh must be a number, got '0.9'"),
        ({"stability_score_thresh": float("nan")}, ValueError, "stability_score_thresh must be a number, got nan"),
        ({"mask_threshold": None}, ValueError, "mask_threshold must be a number, got None"),
        ({"points_per_crop": 2.5}, ValueError, "points_per_crop must be an integer"),
        ({"crops_n_layers": -1}, ValueError, "crops_n_layers must be an integer of at least 0"),
        ({"batch_size": True}, ValueError, "batch_size must be an integer"),
        ({"output_rle_mask": "packed"}, ValueError, 'must be False, True or "compressed"'),
        ({"crops_n_layers": 2, "crop_n_points_downscale_factor": 3}, ValueError, "leaves no point in layer 2"),
        ({"point_grids": [[[0.5, 1.5]]]}, ValueError, r"a point grid must be \(N, 2\) in \[0, 1\]"),
        ({"point_grids": [[[0.5, 0.5]]], "crops_n_layers": 1}, ValueError, "has 1 grids, and layer 1"),
        ({"input_points": [[[1, 2]]]}, ValueError, r"input_points must be \(N, 2\) per image"),
        ({"input_points": [[1, 2]], "point_grids": [[0.5, 0.5]]}, ValueError, "not both"),
    ],
)
def test_options_that_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        generate(**options)


def test_lists_batch_the_encoder():
    images, sizes = [*PHOTOGRAPHS.values()], []
    hook = ours().vision_encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    with hook:
        found = generate(images, batch_size=2)
        assert sizes == [2, 1]
        sizes.clear()
        crops = generate(images[:1], batch_size=4, crops_n_layers=1)[0]
        assert sizes == [4, 1]
    for image, results in zip(images, found, strict=True):
        alone = generate(image)
        assert torch.equal(results["bounding_boxes"], alone["bounding_boxes"])
        torch.testing.assert_close(results["scores"], alone["scores"], atol=1e-5, rtol=0)
    assert torch.equal(crops["bounding_boxes"], generate(images[0], crops_n_layers=1)["bounding_boxes"])
    assert generate([]) == []


def test_images_are_opened_as_they_are_needed():
    opened = []

    def images():
        for image in PHOTOGRAPHS.values():
            opened.append(image)
            yield image

    found = generate(images())
    assert opened == []
    next(found)
    assert len(opened) == 1
    assert len(list(found)) == 2


def test_any_number_of_points_at_once():
    expected = generate()
    for points in 1, 5, 16, None:
        found = generate(points_per_batch=points)
        assert torch.equal(found["bounding_boxes"], expected["bounding_boxes"])
        torch.testing.assert_close(found["scores"], expected["scores"], atol=1e-5, rtol=0)


def test_grids_that_shrink_from_layer_to_layer():
    options = {"crops_n_layers": 2, "points_per_crop": 8, "crop_n_points_downscale_factor": 2}
    found = generate(**options, output_details=True, crops_nms_thresh=1.0)
    tried = {}
    for point, box in zip(found["points"].tolist(), found["crop_boxes"].tolist(), strict=True):
        left, top, right, bottom = box
        layer = next(size for size in range(3) if right - left in _widths(size))
        number = 8 // 2**layer
        for place, start, end in (point[0], left, right), (point[1], top, bottom):
            cell = (place - start) / (end - start) * number - 0.5
            assert abs(cell - round(cell)) < 1e-4
        tried.setdefault(layer, set()).add(tuple(box))
    assert sorted(tried) == [0, 1, 2]


def _widths(layer):
    return {right - left for left, _, right, _ in _crop_boxes(layer, COFFEE.size[::-1], 512 / 1500)}


def test_own_points():
    side = (torch.arange(4) + 0.5) / 4
    grid = torch.stack([side.repeat(4), side.repeat_interleave(4)], dim=-1)
    expected = generate(output_details=True)
    assert_identical(generate(point_grids=grid), expected)
    assert_identical(generate(point_grids=[grid.tolist()]), expected)
    pixels = grid * torch.tensor(COFFEE.size)
    found = generate(input_points=pixels, output_details=True)
    assert_identical(found, expected)
    assert torch.equal(found["points"], expected["points"])
    both = generate([COFFEE, PHOTOGRAPHS["coins"]], input_points=[pixels, [[20, 30]]], output_details=True)
    assert torch.equal(both[0]["bounding_boxes"], expected["bounding_boxes"])
    assert {tuple(point) for point in both[1]["points"].tolist()} <= {(20, 30)}


def test_one_point_and_no_result():
    one = generate(point_grids=[[[0.4, 0.6]]], pred_iou_thresh=0, stability_score_thresh=0, crops_nms_thresh=1.0)
    assert len(one["masks"]) == 3
    none = generate(
        pred_iou_thresh=2.0, output_rle_mask=True, output_details=True, output_label_map=True, max_hole_area=5
    )
    assert none["masks"] == none["rle_mask"] == []
    assert none["scores"].shape == none["areas"].shape == none["stability_scores"].shape == (0,)
    assert none["bounding_boxes"].shape == none["crop_boxes"].shape == (0, 4)
    assert none["points"].shape == (0, 2)
    assert none["label_map"].shape == COFFEE.size[::-1]
    assert not none["label_map"].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (3, 2)])
@pytest.mark.parametrize("layers", [0, 1])
def test_tiny_images(size, layers):
    image = Image.fromarray(np.full((*size, 3), 90, np.uint8))
    found = generate(image, crops_n_layers=layers, pred_iou_thresh=0, stability_score_thresh=0)
    assert all(mask.shape == size for mask in found["masks"])
    assert len(found["masks"]) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = type(ours())(ours().config)
    model.load_state_dict(ours().state_dict())
    found = generate(model=model.eval().to(dtype))
    expected = generate()
    assert found["scores"].dtype == torch.float32
    assert len(found["masks"]) > 0
    best = max((mask & expected["masks"][0]).sum() / (mask | expected["masks"][0]).sum() for mask in found["masks"])
    assert best > 0.9


def test_what_is_not_a_number_is_outside():
    from sam_split.mask_generation_sam_split import generate_masks

    def change(masks, scores):
        masks[..., 20:24, 10:40] = math.nan
        masks[..., 40, 20:30] = math.inf
        masks[..., 45, 20:30] = -math.inf
        scores[:, 0] = math.nan
        return masks, scores

    image, options = COFFEE.resize((64, 64)), {**OPTIONS, "stability_score_thresh": 0, "output_details": True}
    found = generate_masks(Decoder(change), image, **options)
    assert len(found["masks"]) > 2
    assert not found["scores"].isnan().any()
    for mask in found["masks"]:
        assert not mask[20:24, 10:40].any()
        assert mask[40, 21:29].all()
        assert not mask[45, 21:29].any()


def test_small_regions_are_removed():
    generator = np.random.default_rng(3)
    for shape, share in ((40, 31), 0.5), ((7, 90), 0.6), ((33, 20), 0.35), ((12, 12), 0.45):
        mask = generator.random(shape) < share
        for hole, island in (4, 0), (0, 6), (4, 9), (10_000, 10_000):
            edges = edges_of(mask)
            assert np.array_equal(runs.mask_of(edges, shape).numpy(), mask)
            found = runs.mask_of(runs.without_small_regions(edges, shape, hole, island), shape).numpy()
            assert np.array_equal(found, cleaned(mask, hole, island))


def edges_of(mask):
    flat = np.concatenate([[0], mask.T.astype(np.int8).ravel(), [0]])
    return torch.from_numpy(np.flatnonzero(np.diff(flat)))


def cleaned(mask, hole, island):
    """By scikit-image: small holes filled, then small islands dropped but for the largest; diagonals connect."""
    mask = mask.copy()
    for region in regionprops(label(~mask, connectivity=2)):
        if region.area <= hole:
            mask[tuple(region.coords.T)] = True
    islands = regionprops(label(mask, connectivity=2))
    largest = max((region.area for region in islands), default=0)
    for region in islands:
        if region.area <= island and region.area < largest:
            mask[tuple(region.coords.T)] = False
    if islands and largest <= island:
        largest_ones = [region.coords for region in islands if region.area == largest]
        first = min(largest_ones, key=lambda coords: min((x, y) for y, x in coords))  # in column-major order
        mask[:] = False
        mask[tuple(first.T)] = True
    return mask


def test_holes_and_islands_of_an_image():
    options = {"pred_iou_thresh": 0, "stability_score_thresh": 0, "output_details": True, "crops_nms_thresh": 1.0}
    before, after = generate(**options), generate(**options, max_hole_area=30, max_sprinkle_area=30)
    assert len(before["masks"]) == len(after["masks"])
    changed = 0
    for mask, found, box, area in zip(
        before["masks"], after["masks"], after["bounding_boxes"].tolist(), after["areas"].tolist(), strict=True
    ):
        expected = cleaned(mask.numpy(), 30, 30)
        assert np.array_equal(found.numpy(), expected)
        rows, columns = np.flatnonzero(expected.any(1)), np.flatnonzero(expected.any(0))
        if len(rows):
            assert box == [columns[0], rows[0], columns[-1], rows[-1]]
        assert area == expected.sum()
        changed += not torch.equal(mask, found)
    assert changed > 3


def test_label_map():
    found = generate(output_label_map=True, output_details=True)
    expected = torch.zeros(COFFEE.size[::-1], dtype=torch.int32)
    for index in sorted(range(len(found["masks"])), key=lambda index: -found["areas"][index]):
        expected[found["masks"][index]] = index + 1
    assert torch.equal(found["label_map"], expected)
    assert len(expected.unique()) > 2


def test_masks_are_made_on_request():
    assert generate(output_masks=False).keys() == {"scores", "bounding_boxes"}


def test_progress(monkeypatch, capsys):
    made = []

    def bar(*args, **options):
        made.append(options)
        return original(*args, **{**options, "delay": 0, "file": io.StringIO()})

    original = logging.tqdm
    monkeypatch.setattr(logging, "tqdm", bar)
    generate()
    generate([COFFEE, COFFEE], crops_n_layers=1, progress=False)
    assert (made[0]["desc"], made[0]["unit"], made[0]["total"]) == ("segment", "point", 16)
    assert not made[0]["disable"]
    assert made[0]["delay"] > 0
    assert made[1]["total"] == 2 * (1 + 4) * 16
    assert made[1]["disable"]


@pytest.mark.parametrize(("image", "kind"), [(None, "NoneType"), ([None], "NoneType"), (object(), "object")])
def test_what_is_no_image(image, kind):
    with pytest.raises(TypeError, match=f"an image must be a path, a PIL image, an array or a tensor, got {kind}"):
        generate(image)
