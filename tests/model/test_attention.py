"""Which way the attention takes on which device, and the widths that its fused kernels are given."""

import pytest
import torch
from models import draw

from sam_split import attention_sam_split as attention
from sam_split.attention_sam_split import TILE_SCORES_CPU, attention_path, kernel_widths, on_cpu, vision_attention
from sam_split.products_sam_split import product

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("device", "dtype", "path"),
    [
        ("cpu", F32, "tiled"),
        ("cpu", BF16, "tiled"),
        ("meta", F32, "tiled"),
        ("cuda", F32, "folded"),
        ("cuda", F16, "folded"),
        ("cuda", F64, "tiled"),  # only the formula, with all scores, is left of the fused kernels
        ("mps", F32, "tiled"),
        ("mps", F16, "tiled"),
        ("xpu", BF16, "tiled"),
        ("npu", F16, "tiled"),
        ("privateuseone", F32, "tiled"),
    ],
)
def test_path(device, dtype, path, monkeypatch):
    assert attention_path("sdpa", device, dtype) == path
    assert attention_path("eager", device, dtype) == "eager"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert attention_path("sdpa", device, dtype) == "folded"


class Elsewhere(torch.Tensor):
    """A CPU's tensor that says it lies on an accelerator which is not CUDA."""

    @property
    def device(self):
        return torch.device("mps")


@pytest.mark.parametrize(("tensor", "expected"), [(torch.ones(1), True), (torch.ones(1, device="meta"), True)])
def test_pieces_are_for_a_cpu(tensor, expected):
    assert on_cpu(tensor) is expected
    assert not on_cpu(Elsewhere())


def test_an_accelerator_takes_all_windows_in_one_tile(monkeypatch):
    """25 windows of 14 x 14 tokens and 12 heads, ViT-B's: one product where a CPU's caches want many."""
    products = []
    monkeypatch.setattr(attention, "product", lambda *args, **kwargs: products.append(1) or product(*args, **kwargs))
    q, k, v = (draw(1, 64 * 64 + 1, 12, 4, seed=seed) for seed in (1, 2, 3))
    tables = draw(27, 4, seed=4), draw(27, 4, seed=5)
    calls = []
    for on_a_cpu in (True, False):
        monkeypatch.setattr(attention, "on_cpu", lambda tensor, answer=on_a_cpu: answer)
        calls.append(vision_attention(q, k, v, tables, (64, 64), 14, 0.5)[0])
        products.append("next")
    first = products.index("next")
    assert first == -(-25 // (TILE_SCORES_CPU // (12 * 196**2)))
    assert len(products) - first - 2 == 1
    torch.testing.assert_close(*calls, rtol=1e-5, atol=1e-5)


A100, RTX_3090, RTX_4090, H100, B200, RTX_5090 = (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)
VIT_B, VIT_H, WINDOW, WINDOW_H = (64 + 128, 64), (80 + 128, 80), (64 + 28, 64), (80 + 28, 80)


@pytest.mark.parametrize(
    ("given", "dtype", "capability", "cudnn", "widths"),
    [
        (VIT_B, BF16, H100, True, (192, 128)),  # cuDNN
        (VIT_B, F16, B200, True, (192, 128)),
        (VIT_B, BF16, H100, False, (192, 192)),  # Flash
        (VIT_B, BF16, A100, False, (192, 192)),
        (VIT_B, F16, RTX_4090, False, (192, 192)),
        (VIT_H, BF16, A100, False, (208, 208)),
        (VIT_H, BF16, H100, True, (208, 208)),
        (VIT_H, BF16, RTX_3090, False, (208, 80)),  # Flash has no backward there: the memory-efficient kernel
        (VIT_H, F16, RTX_4090, False, (208, 80)),
        (VIT_H, BF16, RTX_5090, False, (208, 80)),
        (WINDOW, BF16, H100, True, (96, 96)),
        (WINDOW_H, F16, A100, False, (112, 112)),
        (VIT_B, F16, (7, 5), False, (192, 64)),  # Turing has no Flash kernel
        ((64 + 2 * 96, 64), BF16, A100, False, (256, 256)),  # 1536 pixels
        ((64 + 2 * 128, 64), BF16, H100, True, (320, 64)),  # 2048 pixels
        (VIT_B, F32, H100, True, (192, 64)),  # the memory-efficient kernel, values as they are
        ((14 + 5, 14), F32, A100, False, (20, 16)),
        ((14 + 5, 14), F32, None, False, (24, 24)),  # a CPU's Flash kernel wants equal widths
        (VIT_B, BF16, None, False, (192, 192)),
    ],
)
def test_kernel_widths(given, dtype, capability, cudnn, widths):
    assert kernel_widths(*given, dtype, capability, cudnn) == widths


@pytest.mark.parametrize("output_attentions", [False, True])
def test_sdpa_refuses_dropout_that_it_does_not_have(output_attentions):
    q = draw(1, 9, 1, 4, seed=1)
    tables = draw(5, 4, seed=2), draw(5, 4, seed=3)
    with pytest.raises(ValueError, match=r"'sdpa' has no dropout, and attention_dropout=0\.1"):
        vision_attention(q, q, q, tables, (3, 3), 0, 0.5, "sdpa", 0.1, output_attentions)
    dropped, weights = vision_attention(q, q, q, tables, (3, 3), 0, 0.5, "eager", 0.999, True)
    assert not torch.allclose(dropped, vision_attention(q, q, q, tables, (3, 3), 0, 0.5)[0])
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 9))  # the weights before dropout
