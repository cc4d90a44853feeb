"""`sam-split convert --image-size`: position tables for another input size, and a model that runs on it."""

import json

import numpy as np
import pytest
import torch
from checkpoint_files import stock_state
from models import TINY, meta_model, redraw, stock_model, tiny_config
from safetensors.torch import load_file
from torch import nn
from transformers import AutoProcessor, SamConfig, SamModel

from conversion import convert, split_state_dict, verify
from conversion.cli import main
from conversion.tensors import same_bits
from sam_split import SamSplitModel

pytestmark = pytest.mark.filterwarnings("ignore::conversion.errors.ConversionWarning")

POS = "vision_encoder.pos_embed"


@pytest.fixture(scope="module")
def theirs():
    """Real input and grid, 1024 pixels and 64 x 64 tokens; layer 0 is windowed and layer 1 is global."""
    config = {**TINY, "vision_config": {**TINY["vision_config"], "image_size": 1024}}
    config["prompt_encoder_config"] = {**TINY["prompt_encoder_config"], "image_size": 1024}
    return redraw(SamModel(SamConfig(**config))).eval()


@pytest.fixture(scope="module")
def stock_folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    theirs.save_pretrained(folder)
    return folder


def name(image_size):
    return str(image_size) if isinstance(image_size, int) else "x".join(map(str, image_size))


def positions(new, old):
    """Where the centres of `new` cells lie among the centres of `old` ones."""
    return (np.arange(new) + 0.5) * old / new - 0.5


def linear_weights(new, old):
    """(new, old): each row weighs the two nearest neighbours; past the ends, the last one counts alone."""
    weights = np.zeros((new, old))
    for row, x in enumerate(np.clip(positions(new, old), 0, old - 1)):
        low = min(int(x), old - 2)
        weights[row, low], weights[row, low + 1] = 1 - (x - low), x - low
    return weights


def cubic_weights(new, old, a=-0.75):
    """(new, old): Keys' kernel over the four nearest neighbours; past the ends, the last one counts again."""

    def kernel(x):
        x = abs(x)
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    weights = np.zeros((new, old))
    for row, x in enumerate(positions(new, old)):
        for neighbour in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            weights[row, np.clip(neighbour, 0, old - 1)] += kernel(x - neighbour)
    return weights


@pytest.mark.parametrize("image_size", [512, 1536, (768, 1024)], ids=name)
def test_tables_are_those_of_an_independent_computation(image_size, theirs, stock_folder, tmp_path, capsys):
    argv = ["convert", str(stock_folder), str(tmp_path / "out"), "--image-size", name(image_size), "--quiet"]
    assert main(argv) == 0
    height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
    rows, columns = height // 16, width // 16
    said = capsys.readouterr().err
    assert f"resized from 64 x 64 to {rows} x {columns} tokens" in said
    assert "relative positions of layers [1] linearly; windows stay 4 x 4" in said
    ours, original = load_file(tmp_path / "out" / "model.safetensors"), split_state_dict(stock_state(theirs))
    absolute = np.einsum(
        "yr,xc,brcd->byxd", cubic_weights(rows, 64), cubic_weights(columns, 64), original[POS].double()
    )
    np.testing.assert_allclose(ours[POS], absolute, rtol=1e-6, atol=1e-6)
    resized = {POS}
    for axis, tokens in (("h", rows), ("w", columns)):
        table = f"vision_encoder.layers.1.attn.rel_pos_{axis}"
        expected = linear_weights(2 * tokens - 1, 127) @ original[table].double().numpy()
        np.testing.assert_allclose(ours[table], expected, rtol=1e-6, atol=1e-6)
        resized.add(table)
    assert ours.keys() == original.keys()
    for key in original.keys() - resized:
        assert same_bits(ours[key], original[key]), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for part in ("vision_config", "prompt_encoder_config"):
        assert config[part]["image_size"] == (image_size if isinstance(image_size, int) else list(image_size))
    assert f"resampled from 1024 x 1024 to {height} x {width} pixels" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("image_size", [512, 1024, 1536, (768, 1024)], ids=name)
def test_the_whole_promptable_model_runs(image_size, theirs, stock_folder, tmp_path):
    convert(stock_folder, tmp_path / "out", image_size=image_size, progress=False)
    ours = SamSplitModel.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
    picture = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    inputs = processor(picture, input_points=[[[30, 40]]], input_boxes=[[[10, 10, 70, 50]]], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, height, width)
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        outputs = ours(**inputs, input_masks=torch.randn(1, 1, height // 4, width // 4))
    assert outputs.pred_masks.shape == (1, 1, 3, height // 4, width // 4)
    masks = processor.image_processor.post_process_masks(
        outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )
    assert masks[0].shape == (1, 3, 60, 90)
    assert outputs.pred_masks.isfinite().all()


def test_it_computes_what_stock_does_with_the_new_absolute_table(theirs, stock_folder, tmp_path):
    """Stock's attention resamples relative tables of the wrong length by itself, in the forward pass."""
    convert(stock_folder, tmp_path / "out", image_size=512, progress=False)
    ours = SamSplitModel.from_pretrained(tmp_path / "out").eval()
    config = {**TINY, "vision_config": {**TINY["vision_config"], "image_size": 512}}
    config["prompt_encoder_config"] = {**TINY["prompt_encoder_config"], "image_size": 512}
    stock = SamModel(SamConfig(**config)).eval()
    old = theirs.state_dict()
    for axis in "hw":
        setattr(stock.vision_encoder.layers[1].attn, f"rel_pos_{axis}", nn.Parameter(torch.zeros(127, 16)))
    stock.load_state_dict({**old, POS: ours.vision_encoder.pos_embed})
    inputs = {"pixel_values": torch.randn(1, 3, 512, 512), "input_points": torch.tensor([[[[100.0, 200.0]]]])}
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).pred_masks, stock(**inputs).pred_masks, atol=1e-4, rtol=1e-5)


def test_the_same_size_changes_nothing(stock_folder, tmp_path):
    convert(stock_folder, tmp_path / "plain", progress=False)
    convert(stock_folder, tmp_path / "out", image_size=1024, progress=False)
    assert verify(tmp_path / "plain", tmp_path / "out", outputs=False)


def test_a_pth_can_be_resized_and_keeps_its_dtype(tmp_path):
    torch.save({key: tensor.bfloat16() for key, tensor in meta_model().state_dict().items()}, tmp_path / "sam.pth")
    convert(tmp_path / "sam.pth", tmp_path / "out", image_size=160, progress=False)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert settings["size"] == {"longest_edge": 160}
    assert settings["mask_pad_size"] == {"height": 40, "width": 40}


def test_the_processors_own_settings_stay(stock_folder, tmp_path):
    stock_model(tiny_config()).save_pretrained(tmp_path / "stock")
    (tmp_path / "stock" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    convert(tmp_path / "stock", tmp_path / "out", image_size=(64, 128), progress=False)
    settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == [0.1, 0.2, 0.3]
    assert (settings["size"], settings["pad_size"]) == ({"longest_edge": 128}, {"height": 64, "width": 128})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1000", "--image-size 1000 is not a multiple of the patch, 16 pixels; the nearest is 992"),
        ("512x1000", "--image-size 512x1000 is not a multiple of the patch, 16 pixels; the nearest is 512x992"),
        ("0", "--image-size 0: expected 16 to 8192 pixels a side"),
        ("big", "expected pixels as N or HEIGHTxWIDTH"),
        ("1x2x3", "expected pixels as N or HEIGHTxWIDTH"),
        ("-512", "expected pixels as N or HEIGHTxWIDTH"),
    ],
)
def test_a_size_that_cannot_be_is_refused(text, message, stock_folder, tmp_path, capsys):
    assert main(["convert", str(stock_folder), str(tmp_path / "out"), f"--image-size={text}", "--quiet"]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_stock_has_no_place_for_an_oblong_model(stock_folder, tmp_path, capsys):
    convert(stock_folder, tmp_path / "split", image_size=(768, 1024), progress=False)
    assert main(["fuse", str(tmp_path / "split"), str(tmp_path / "out"), "--quiet"]) == 2
    assert "stock SamModel takes square images only, this model takes [768, 1024]" in capsys.readouterr().err


@pytest.mark.filterwarnings("error::conversion.errors.ConversionWarning")
def test_the_same_size_is_not_resampled(stock_folder, tmp_path):
    convert(stock_folder, tmp_path / "out", image_size=1024, progress=False)


def test_images_less_oblong_than_the_input_are_refused_by_the_processor(stock_folder, tmp_path):
    """What the command says of an oblong size, so that nobody finds pictures cropped in silence."""
    with pytest.warns(match="images of the shape 768 x 1024 or more oblong ones, and refuses others"):
        convert(stock_folder, tmp_path / "out", image_size=(768, 1024), progress=False)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor(np.zeros((75, 100, 3), np.uint8), return_tensors="pt")["pixel_values"].shape == (1, 3, 768, 1024)
    with pytest.raises(ValueError, match="negative"):
        processor(np.zeros((90, 100, 3), np.uint8), return_tensors="pt")
