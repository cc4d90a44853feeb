"""Where half precision would lose too much, float32 is used; and each bug that leaves it out is caught."""

import pytest
import torch
from models import PROMPT_KINDS, draw, pixels, split_model, stock_model
from torch.utils._python_dispatch import TorchDispatchMode

from sam_split import attention_sam_split as attention

HALVES = [torch.bfloat16, torch.float16]
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of one rounding
SIDE = {torch.bfloat16: 32, torch.float16: 64}  # the square of it is more equal parts than a half can add up


def check_positions(dtype):
    """Embedded positions are those of float64, rounded once: phases of tens of radians do not lose their turns."""
    embedding = split_model(stock_model()).shared_image_embedding.to(dtype)
    embedding.positional_embedding *= 4
    positions = torch.rand(200, 2, generator=torch.Generator().manual_seed(1))
    phase = 2 * torch.pi * (2 * positions.double() - 1) @ embedding.positional_embedding.double()
    assert phase.abs().max() > 20
    exact = torch.cat([phase.sin(), phase.cos()], dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        found = [embedding(positions)]
    for values in (*found, embedding(positions)):
        assert values.dtype == dtype
        assert (values.double() - exact).abs().max() <= EPSILON[dtype]


def gradients(q, k, v, tables, windows):
    """Gradients of the tiled attention's sum, by autograd."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *tables)]
    context = attention.TiledAttention.apply(*leaves, windows, 0.5)
    return torch.autograd.grad(context, leaves, torch.ones_like(context))


def check_sums_over_tiles(dtype):
    """A value's gradient is a sum over all queries, one query, or one window, at a time here.

    The weights are nearly even, so their nearly equal parts add up to 1; in half precision they would stop before.
    """
    side = SIDE[dtype]
    q, k, v = (0.01 * draw(1, side**2, 1, 8, seed=seed).to(dtype) for seed in (1, 2, 3))
    tables = [attention.by_offset(draw(2 * side - 1, 8, seed=seed)).to(dtype) * 0.01 for seed in (4, 5)]
    found = gradients(q, k, v, tables, None)[2]
    assert (found - 1).abs().max() < 4 * EPSILON[dtype]


def check_sums_over_windows(dtype):
    """The token that stands for padding takes a part from each window."""
    count = SIDE[dtype] ** 2
    windows, _ = attention.window_indices((1, 2 * count), 2, torch.device("cpu"))
    q, k, v = (0.01 * draw(1, 2 * count + 1, 1, 8, seed=seed).to(dtype) for seed in (1, 2, 3))
    tables = [attention.by_offset(draw(3, 8, seed=seed)).to(dtype) * 0.01 for seed in (4, 5)]
    found = gradients(q, k, v, tables, windows)[2][0, -1]
    # A window's four places each have a gradient of about 1, and two of them are padding.
    assert (found / count - 2).abs().max() < 8 * EPSILON[dtype]


class Softmaxes(TorchDispatchMode):
    """The dtypes in which softmax is computed."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._softmax.default:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def check_softmaxes(dtype):
    """The decoder's three kinds of attention, twice and once more, and the two layers of the image encoder."""
    model = split_model(stock_model(), "eager").to(dtype)
    with torch.no_grad(), Softmaxes() as seen:
        model(pixels(), **PROMPT_KINDS["points_and_boxes"])
    assert len(seen.dtypes) >= 2 + 7
    assert set(seen.dtypes) == {torch.float32}


def check_first_derivative_only(dtype):
    """The second one would be wrong: the tiled backward works in place."""
    q, k, v = (draw(1, 9, 1, 4, seed=seed).to(dtype).requires_grad_() for seed in (1, 2, 3))
    tables = [attention.by_offset(draw(5, 4, seed=seed)).to(dtype) for seed in (4, 5)]
    context = attention.TiledAttention.apply(q, k, v, *tables, None, 0.5)
    (gradient,) = torch.autograd.grad(context.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


CHECKS = [
    check_positions,
    check_sums_over_tiles,
    check_sums_over_windows,
    check_softmaxes,
    check_first_derivative_only,
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention, "TILE_SCORES_CPU", 16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_float32_where_it_matters(check, dtype):
    check(dtype)


def keep_the_dtype(patch):
    patch.setattr(torch, "promote_types", lambda given, _: given)


def differentiable_as_often_as_asked(patch):
    patch.setattr(attention.TiledAttention, "backward", attention.TiledAttention.backward.__wrapped__)


MUTATIONS = [
    (check_positions, keep_the_dtype),
    (check_sums_over_tiles, keep_the_dtype),
    (check_sums_over_windows, keep_the_dtype),
    (check_softmaxes, keep_the_dtype),
    (check_first_derivative_only, differentiable_as_often_as_asked),
]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("check", "mutate"), MUTATIONS)
def test_a_bug_is_caught(check, mutate, dtype, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        check(dtype)
