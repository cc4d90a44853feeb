"""On a CUDA device: the numbers of a CPU in every dtype, by fused kernels, with memory that is linear in tokens.

The widths that each kernel is given are held by test_attention.py, on any machine.
"""

import copy

import pytest
import torch
from models import draw, pixels, points, redraw, split_config, split_model, stock_model, tiny_config
from parity import outputs_and_gradients, renamed, stock_forward
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile

from conversion import split_state_dict
from sam_split import SamSplitConfig, SamSplitModel
from sam_split.attention_sam_split import vision_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VIT_B = {"heads": 12, "head_dim": 64, "side": 64}


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def errors(found, expected):
    """Of outputs and of gradients: the norm of all differences, as part of the norm of all values."""
    return [
        sum((ours[name].cpu().double() - value).square().sum() for name, value in theirs.items()).sqrt()
        / sum(value.square().sum() for value in theirs.values()).sqrt()
        for ours, theirs in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients(dtype):
    """Against float64 on a CPU: 1e-5 in float32, and no more than twice stock's error in half precision."""
    prompts = points(1, 0)
    theirs = stock_model(attn_implementation="eager")
    exact = outputs_and_gradients(stock_forward, copy.deepcopy(theirs).double(), pixels().double(), **prompts)
    on_device = {name: value.to(DEVICE) for name, value in prompts.items()}
    image = pixels().to(DEVICE, dtype)
    stock = outputs_and_gradients(stock_forward, copy.deepcopy(theirs).to(DEVICE, dtype), image, **on_device)
    ours = outputs_and_gradients(stock_forward, split_model(theirs, "sdpa").to(DEVICE, dtype), image, **on_device)
    stock, exact = ((outputs, renamed(grads, theirs, split_state_dict)) for outputs, grads in (stock, exact))
    for error, their_error in zip(errors(ours, exact), errors(stock, exact), strict=True):
        assert error <= (1e-5 if dtype == torch.float32 else 2 * their_error)


def attend(dtype, window_size, *, requires_grad=True):
    """One layer's attention at ViT-B's size: (context, leaves)."""
    side, heads, head_dim = VIT_B["side"], VIT_B["heads"], VIT_B["head_dim"]
    tokens, length = side**2 + bool(window_size), window_size or side
    leaves = [draw(1, tokens, heads, head_dim, seed=seed) for seed in (1, 2, 3)]
    leaves += [0.1 * draw(2 * length - 1, head_dim, seed=seed) for seed in (4, 5)]
    leaves = [leaf.to(DEVICE, dtype).requires_grad_(requires_grad) for leaf in leaves]
    context, _ = vision_attention(*leaves[:3], leaves[3:], (side, side), window_size, head_dim**-0.5)
    return context, leaves


KERNELS = {  # parts of the operators' names
    torch.float32: ("efficient",),
    torch.float16: ("flash", "cudnn", "efficient"),
    torch.bfloat16: ("flash", "cudnn", "efficient"),
}


@pytest.mark.parametrize("window_size", [0, 14], ids=["global", "windows"])
@pytest.mark.parametrize("dtype", KERNELS, ids=str)
def test_a_fused_kernel_runs_forward_and_backward(dtype, window_size):
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        context, _ = attend(dtype, window_size)
        context.sum().backward()
        torch.cuda.synchronize()
    operators = {event.key for event in seen.key_averages()}
    assert not any("attention_math" in name for name in operators), operators
    chosen = [name for name in operators if "scaled_dot_product" in name and name.endswith("backward")]
    assert any(part in name for name in chosen for part in KERNELS[dtype]), operators


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_never_all_pairs(dtype):
    """A score matrix would be 12 x 4,096 x 4,096: 805 MB in float32."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    context, _ = attend(dtype, 0)
    context.sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < VIT_B["heads"] * VIT_B["side"] ** 4 * dtype.itemsize / 2


def lora_step_peak(attn_implementation):
    """Bytes at the peak of a LoRA step of ViT-B's width with two layers at 1024 pixels, in bfloat16."""
    config = SamSplitConfig(vision_config={"num_hidden_layers": 2, "global_attn_indexes": [1]})
    config._attn_implementation = attn_implementation
    model = redraw(SamSplitModel(config)).to(DEVICE, torch.bfloat16).train()
    model = get_peft_model(model, LoraConfig(r=16, target_modules=["q", "v"]))
    box = torch.tensor([[[100.0, 100.0, 700.0, 600.0]]], device=DEVICE)
    image = draw(1, 3, 1024, 1024, seed=1).to(DEVICE, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    model(pixel_values=image, input_boxes=box, multimask_output=False).pred_masks.float().mean().backward()
    return torch.cuda.max_memory_allocated()


def test_peak_of_a_lora_step():
    assert lora_step_peak("sdpa") < 0.6 * lora_step_peak("eager")


def test_inputs_elsewhere_are_named():
    model = SamSplitModel(split_config(tiny_config())).to(DEVICE)
    with pytest.raises(ValueError, match=r"pixel_values is on cpu and the model on cuda:0; move it to model.device"):
        model(pixels())
    with pytest.raises(ValueError, match="input_points must be where pixel_values is, on cuda:0, got cpu"):
        model(pixels().to(DEVICE), **points(1, 0))
