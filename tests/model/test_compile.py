"""`torch.compile` and `torch.export` take the whole model in one graph, and the numbers stay."""

import pytest
import torch
from models import PROMPT_KINDS, draw, pixels, points, split_model, stock_model
from packaging.version import Version
from parity import assert_same_gradients, assert_same_outputs, outputs_and_gradients, stock_forward

from sam_split import SamSplitModel


@pytest.fixture(scope="module")
def tiny() -> SamSplitModel:
    return split_model(stock_model())


@pytest.fixture
def compiled(tiny):
    torch._dynamo.reset()
    return torch.compile(tiny, backend="aot_eager", fullgraph=True)


def test_compiled(tiny, compiled):
    inputs = PROMPT_KINDS["masks_and_points"]
    with torch.no_grad():
        assert_same_outputs(stock_forward(compiled, pixels(), **inputs), stock_forward(tiny, pixels(), **inputs))


@pytest.mark.slow
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="torch 2.6 compiles this backward pass with strides that its own kernels do not return",
)
def test_compiled_for_training(tiny, compiled):
    inputs = PROMPT_KINDS["masks_and_points"]
    expected = outputs_and_gradients(stock_forward, tiny, pixels(), **inputs)
    outputs, gradients = outputs_and_gradients(stock_forward, compiled, pixels(), **inputs)
    assert_same_outputs(outputs, expected[0])
    assert_same_gradients({name.removeprefix("_orig_mod."): value for name, value in gradients.items()}, expected[1])


def test_exported(tiny):
    """One program for any number of images and prompts."""
    batch, prompts = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("prompts", min=2, max=64)
    inputs = {"pixel_values": pixels(), **points(1, 0)}
    shapes = {
        "pixel_values": {0: batch},
        "input_points": {0: batch, 1: prompts},
        "input_labels": {0: batch, 1: prompts},
    }
    exported = torch.export.export(tiny, (), inputs, dynamic_shapes=shapes).module()
    with torch.no_grad():
        for images, count in ((2, 3), (3, 5)):
            given = {
                "pixel_values": pixels(images),
                "input_points": draw(images, count, 4, 2, seed=3, low=0.0),
                "input_labels": torch.ones(images, count, 4, dtype=torch.long),
            }
            assert_same_outputs(stock_forward(exported, **given), stock_forward(tiny, **given))
