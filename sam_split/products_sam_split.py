"""Matrix products of the model, each through the fastest of the libraries that torch has on a CPU.

torch's own float32 products go through MKL, which takes AVX2 on AMD's processors even where they have AVX-512. oneDNN,
which torch carries for torch.compile, takes AVX-512 everywhere and is about twice as fast there. Small products, other
dtypes, devices and processors, and layers that are more than their weight and bias go the usual way.

This file is copied into each saved model folder. It imports torch alone and reads no file, network or environment.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

ONEDNN = torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ONEDNN_WORK = 2**21  # multiplications from which on a call of its own pays


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is its weight and its bias: no adapter, no hooks, no offloaded or quantised weights."""
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or torch.compiler.is_compiling():
        return False
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return not any(hooks) and "forward" not in vars(layer)


def can_fold(layer: nn.Module, rows: int) -> bool:
    """Whether that many rows of tokens should pass through a layer, transposed, in place of the image through it."""
    if not is_plain(layer):
        return False
    narrow, wide = layer.weight.shape
    return rows * (wide - narrow) < wide * narrow  # multiplications for each place of the image


def linear(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`layer(hidden_states)`."""
    return affine(hidden_states, layer.weight, layer.bias) if is_plain(layer) else layer(hidden_states)


def affine(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear`: (..., C) to (..., K), the weight (K, C)."""
    if _takes_onednn(hidden_states.numel() * weight.shape[0], hidden_states, weight, bias):
        return _Affine.apply(hidden_states, weight, bias)
    return F.linear(hidden_states, weight, bias)


def product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`left @ right`: (..., R, K) @ (..., K, L), as many matrices on the left as on the right; in `out` if given."""
    *batch, rows, wide = left.shape
    tracked = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    if tracked or not _takes_onednn(rows * wide * right.shape[-1], left, right):
        return torch.matmul(left, right, out=out)
    out = left.new_empty(*batch, rows, right.shape[-1]) if out is None else out
    for one, other, result in zip(*(x.flatten(0, -3) for x in (left, right, out)), strict=True):
        result.copy_(_rows_times(one, other.t()))
    return out


def product_shared(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(B, P, R, K) @ (B, P or 1, K, L) to (B, P, R, L), without a copy per prompt of a matrix that prompts share."""
    if matrix.shape[1] == rows.shape[1]:
        return product(rows, matrix)
    return product(rows.flatten(1, 2), matrix[:, 0]).unflatten(1, rows.shape[1:3])


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float = 1.0) -> None:
    """`total += factor * left @ right` of (N, R, K) and (N, K, L); the sum may be of a wider dtype."""
    if total.dtype != left.dtype or _takes_onednn(left[0].numel() * right.shape[-1], left, right):
        total.add_(product(left, right), alpha=factor)
    else:
        total.baddbmm_(left, right, alpha=factor)


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, bias):
        ctx.save_for_backward(hidden_states if weight.requires_grad else None, weight)
        return _rows_times(hidden_states, weight, bias)

    @staticmethod
    def backward(ctx, grad_output):
        hidden_states, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad_output.flatten(0, -2)
        return (
            affine(grad_output, weight.t(), None) if needs_input else None,
            affine(rows.t(), hidden_states.flatten(0, -2).t(), None) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def _takes_onednn(work, *tensors):
    """Whether a product of so many multiplications goes through oneDNN."""
    return (
        ONEDNN
        and not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or torch.jit.is_tracing())
        and not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)
        and all(x is None or (x.device.type == "cpu" and x.dtype == torch.float32) for x in tensors)
        and work >= ONEDNN_WORK
    )


def _rows_times(rows, matrix, bias=None):
    """`F.linear`, the operator that torch.compile takes for it on a CPU; a hundred times slower with other strides."""
    if not matrix.t().is_contiguous():
        matrix = matrix.contiguous()
    return torch.ops.mkldnn._linear_pointwise(rows.contiguous(), matrix, bias, "none", [], "")
