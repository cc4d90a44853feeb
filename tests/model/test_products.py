"""Products through oneDNN: the numbers and gradients of torch's own, and only where they are taken for them."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from sam_split import products_sam_split as products


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """Take every float32 product through oneDNN, on whatever processor, and count them."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(products, "ONEDNN", True)
    monkeypatch.setattr(products, "ONEDNN_WORK", 1)
    taken, original = [], products._rows_times
    monkeypatch.setattr(products, "_rows_times", lambda *inputs: taken.append(1) or original(*inputs))
    return taken


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


STRIDES = {
    "contiguous": random,
    "transposed": lambda *shape: random(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2),
    "every second": lambda *shape: random(*shape[:-1], 2 * shape[-1])[..., ::2],
    "one head of several": lambda *shape: random(*shape[:-1], 3, shape[-1])[..., 1, :],
}


@pytest.mark.parametrize("right", STRIDES)
@pytest.mark.parametrize("left", STRIDES)
def test_product_of_any_strides(left, right, onednn):
    one, other = STRIDES[left](3, 5, 7), STRIDES[right](3, 7, 4)
    torch.testing.assert_close(products.product(one, other), one @ other)
    into, total = torch.zeros(3, 4, 5).transpose(1, 2), random(3, 5, 4)
    assert products.product(one, other, out=into) is into
    torch.testing.assert_close(into, one @ other)
    expected = total + 0.5 * (one @ other)
    products.add_product(total, one, other, 0.5)
    torch.testing.assert_close(total, expected)
    assert len(onednn) == 9


def test_one_matrix_for_all_prompts(onednn):
    rows, matrix = random(2, 3, 5, 7), random(2, 1, 7, 4)
    torch.testing.assert_close(products.product_shared(rows, matrix), rows @ matrix)
    assert len(onednn) == 2


@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("input",), ("weight", "bias")])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients(frozen, bias, onednn):
    layer = nn.Linear(7, 4, bias=bias)
    results = []
    for call in products.linear, lambda module, x: module(x):
        hidden_states = STRIDES["transposed"](2, 5, 7).detach().requires_grad_("input" not in frozen)
        for name, parameter in layer.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(name not in frozen)
        output = call(layer, hidden_states)
        output.backward(random(2, 5, 4))
        results.append([output, hidden_states.grad, *(parameter.grad for parameter in layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert onednn


def dual(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.cos()))).tangent


DERIVATIVES = {
    "second": lambda function, x: hessian(lambda x: function(x).pow(3).sum(), x),
    "grad and vmap": lambda function, x: torch.func.vmap(torch.func.grad(lambda x: function(x).pow(3).sum()))(x),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x.cos(),)),
    "dual numbers": dual,
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_other_derivatives(derivative):
    layer, call = nn.Linear(7, 4), DERIVATIVES[derivative]
    found = call(lambda x: products.linear(layer, x), random(5, 7))
    torch.testing.assert_close(found, call(layer, random(5, 7)))


def test_a_product_that_is_tracked_keeps_its_gradients(onednn):
    left, right = random(2, 5, 7).requires_grad_(), random(2, 7, 4)
    products.product(left, right).sum().backward()
    torch.testing.assert_close(left.grad, right.sum(-1)[:, None].expand_as(left))
    assert not onednn


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


@pytest.mark.parametrize("change", [parametrizations.weight_norm, hooked, nn.Sequential])
def test_layers_that_are_more_than_their_weight_are_called(change, onednn):
    layer, hidden_states = change(nn.Linear(7, 4)), random(5, 7)
    torch.testing.assert_close(products.linear(layer, hidden_states), layer(hidden_states))
    assert not onednn


CASES = {  # dtype, autocast, multiplications from which on oneDNN is taken, whether it is
    "float32": (torch.float32, False, 140, True),
    "too little work": (torch.float32, False, 141, False),
    "float64": (torch.float64, False, 1, False),
    "bfloat16": (torch.bfloat16, False, 1, False),
    "autocast": (torch.float32, True, 1, False),
}


@pytest.mark.parametrize("case", CASES)
def test_what_goes_through_onednn(case, monkeypatch, onednn):
    dtype, autocast, work, expected = CASES[case]
    monkeypatch.setattr(products, "ONEDNN_WORK", work)
    hidden_states, weight, bias = random(5, 7).to(dtype), random(4, 7).to(dtype), random(4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, plain = products.affine(hidden_states, weight, bias), F.linear(hidden_states, weight, bias)
    assert found.dtype == plain.dtype
    torch.testing.assert_close(found, plain)
    assert bool(onednn) is expected


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 4)

    def forward(self, hidden_states):
        return products.linear(self.layer, hidden_states)


def test_not_in_a_graph():
    for graph in torch.jit.trace(Calls(), random(5, 7)).graph, torch.export.export(Calls(), (random(5, 7),)).graph:
        assert "mkldnn" not in str(graph)
