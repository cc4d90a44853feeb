"""No score matrix over all pairs of image tokens, whatever the mode, and exact numbers all the same.

Allocations are watched at a grid of 64 x 64 tokens, where such a matrix is eight times larger than anything that may
be there; each watcher is shown to see the matrix that `attn_implementation="eager"` and stock make.
"""

import contextlib
from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from models import draw, pixels, points, redraw, split_config, split_model, stock_model, tiny_config
from parity import assert_same_gradients, assert_same_outputs, outputs_and_gradients, stock_forward
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import SamModel

from sam_split import SamSplitModel
from sam_split import attention_sam_split as attention
from sam_split import modeling_sam_split as modeling

SIDE = 64
TOKENS = SIDE * SIDE
# Elements: what a tile of scores may take, with room for the sum of its two parts.
LIMIT = 2 * attention.TILE_SCORES_CPU


def wide_config(side: int = SIDE):
    """The tiny model on a grid of side x side tokens of 8 pixels: many tokens and few channels."""
    config = tiny_config(image_size=8 * side, patch_size=8)
    prompt = config.prompt_encoder_config
    prompt.image_size, prompt.image_embedding_size, prompt.patch_size = 8 * side, side, 8
    return config


def wide_model(attn_implementation: str = "sdpa", side: int = SIDE) -> SamSplitModel:
    config = split_config(wide_config(side))
    config._attn_implementation = attn_implementation
    return redraw(SamSplitModel(config)).train()


def step(model: nn.Module, side: int = SIDE):
    """Forward and backward of one image with one box."""
    dtype = next(model.parameters()).dtype
    image = draw(1, 3, 8 * side, 8 * side, seed=1).to(dtype)
    box = torch.tensor([[[10.0, 20.0, 70.0, 60.0]]])
    model(pixel_values=image, input_boxes=box, multimask_output=False).pred_masks.float().square().mean().backward()


class Largest(TorchDispatchMode):
    """The largest storage, in elements, behind any result of any operation, forward and backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return results


def largest(run: Callable) -> int:
    with Largest() as mode:
        run()
    return mode.elements


def frozen_but_adapters(model):
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q", "v"]))


def frozen_tables(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("rel_pos" not in name)
    return model


def checkpointed(model):
    model.gradient_checkpointing_enable()
    return frozen_but_adapters(model)


MODES = {
    "trainable": lambda model: model,
    "frozen_tables": frozen_tables,
    "lora": frozen_but_adapters,
    "checkpointed": checkpointed,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "autocast": frozen_but_adapters,
}


@pytest.mark.parametrize("mode", MODES)
def test_never_all_pairs(mode):
    model = MODES[mode](wide_model())
    context = torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else contextlib.nullcontext()
    with context:
        assert largest(lambda: step(model)) <= LIMIT < TOKENS**2 / 4


def test_never_all_pairs_without_gradients():
    model = wide_model().eval()
    with torch.no_grad():
        assert largest(lambda: model.get_image_embeddings(draw(2, 3, 512, 512, seed=1))) <= LIMIT


def test_all_pairs_are_seen():
    model = wide_model("eager")
    assert largest(lambda: step(model)) >= 2 * TOKENS**2  # two heads


def largest_when_compiled(attn_implementation: str) -> int:
    """The largest tensor, in elements, of the graphs that a compiler is given for forward and backward."""
    elements = []

    def watch(graph, example_inputs):
        values = (tree_leaves(node.meta.get("val")) for node in graph.graph.nodes)
        elements.extend(value.numel() for leaves in values for value in leaves if isinstance(value, torch.Tensor))
        return make_boxed_func(graph.forward)

    model = frozen_but_adapters(wide_model(attn_implementation))
    torch._dynamo.reset()
    model.base_model.model.vision_encoder.compile(
        backend=aot_autograd(fw_compiler=watch, bw_compiler=watch), fullgraph=True
    )
    step(model)
    return max(elements)


def test_never_all_pairs_when_compiled():
    assert largest_when_compiled("sdpa") <= LIMIT


def test_all_pairs_are_seen_when_compiled():
    assert largest_when_compiled("eager") >= 2 * TOKENS**2


def peak_bytes(run: Callable) -> int:
    """The most memory that was allocated at one time beyond what was there before."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak


def growth(attn_implementation: str) -> float:
    """How much more memory a step takes for four times as many tokens."""
    small, large = (wide_model(attn_implementation, side) for side in (SIDE // 2, SIDE))
    return peak_bytes(lambda: step(large)) / peak_bytes(lambda: step(small, SIDE // 2))


def test_memory_is_linear_in_tokens():
    assert growth("sdpa") < 5 < 12 < growth("eager")


def decode(model: nn.Module, prompts: int) -> int:
    """Peak memory of decoding that many points, without the masks themselves."""
    inputs = {"image_embeddings": draw(1, 32, 32, 32, seed=1), "input_points": draw(1, prompts, 1, 2, seed=2, low=0.0)}
    with torch.no_grad():
        masks = model(**inputs).pred_masks
        peak = peak_bytes(lambda: model(**inputs))
    return peak - masks.numel() * masks.element_size()


def test_memory_is_flat_in_prompts(monkeypatch):
    monkeypatch.setattr(modeling, "PROMPTS_BYTES_CPU", 2 * 32 * 32**2 * 4)  # two prompts of this model
    theirs = stock_model(wide_config(32))
    ours = split_model(theirs)
    assert decode(ours, 64) < 1.1 * decode(ours, 8)
    assert decode(theirs, 64) > 7 * decode(theirs, 8)


GRIDS = {"square": (4, 4), "wide": (3, 5), "tall": (7, 2)}


def attention_inputs(grid: tuple[int, int], trainable_tables: bool) -> tuple[torch.Tensor, ...]:
    """q, k, v (2, 3, H * W, 4) and both tables, in float64."""
    rows, columns = grid
    qkv = (draw(2, 3, rows * columns, 4, seed=seed).double().requires_grad_() for seed in (1, 2, 3))
    tables = (draw(2 * length - 1, 4, seed=4).double().requires_grad_(trainable_tables) for length in grid)
    return *qkv, *tables


def by_formula(q, k, v, rel_pos_h, rel_pos_w):
    """`eager_attention`, with the tables laid out by offset as all backends want them."""
    return attention.eager_attention(q, k, v, *scores(q, rel_pos_h, rel_pos_w), 0.5)[0]


def folded(q, k, v, rel_pos_h, rel_pos_w):
    return attention.folded_attention(q, k, v, *scores(q, rel_pos_h, rel_pos_w), 0.5)


def tiled(q, k, v, rel_pos_h, rel_pos_w):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    tables = attention.by_offset(rel_pos_h), attention.by_offset(rel_pos_w)
    return attention.TiledAttention.apply(q, k, v, *tables, None, 0.5).transpose(1, 2)


def scores(q, rel_pos_h, rel_pos_w):
    return attention.relative_position_scores(q, attention.by_offset(rel_pos_h), attention.by_offset(rel_pos_w))


@pytest.mark.parametrize("trainable_tables", [True, False])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
# Tiles of one row of one head; of some rows, the last tile shorter; of all rows of some heads; and of all.
@pytest.mark.parametrize("tile", [1, 70, 500, 2**20])
def test_tiled_gradients(monkeypatch, grid, trainable_tables, tile):
    monkeypatch.setattr(attention, "TILE_SCORES_CPU", tile)
    check_attention(tiled, by_formula, attention_inputs(grid, trainable_tables))


@pytest.mark.parametrize("trainable_tables", [True, False])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_folded_gradients(grid, trainable_tables):
    check_attention(folded, by_formula, attention_inputs(grid, trainable_tables))


@pytest.mark.parametrize("tile", [1, 20, 2**20])
@pytest.mark.parametrize("trainable_tables", [True, False])
def test_tiled_gradients_in_windows(monkeypatch, trainable_tables, tile):
    """Windows of 3 x 3 on a grid of 5 x 4: two of four are padded, and one token is in all the padding."""
    monkeypatch.setattr(attention, "TILE_SCORES_CPU", tile)
    grid, size = (5, 4), 3
    to_windows, from_windows = attention.window_indices(grid, size, torch.device("cpu"))
    qkv = (draw(2, 5 * 4 + 1, 3, 4, seed=seed).double().requires_grad_() for seed in (1, 2, 3))
    tables = (draw(2 * size - 1, 4, seed=seed).double().requires_grad_(trainable_tables) for seed in (4, 5))

    def in_windows(q, k, v, *tables):
        q, k, v = (x[:, to_windows].flatten(0, 1).transpose(1, 2) for x in (q, k, v))
        context = by_formula(q, k, v, *tables).transpose(1, 2)
        return context.unflatten(0, (2, -1)).flatten(1, 2)[:, from_windows]

    def ours(q, k, v, *tables):
        by_row, by_column = (attention.by_offset(table) for table in tables)
        return attention.TiledAttention.apply(q, k, v, by_row, by_column, to_windows, 0.5)[:, : 5 * 4]

    check_attention(ours, in_windows, (*qkv, *tables))


def check_attention(backend: Callable, formula: Callable, inputs: tuple[torch.Tensor, ...]):
    """Numerical gradients in a random direction, then values and gradients against the formula's."""
    assert torch.autograd.gradcheck(backend, inputs, fast_mode=True)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    results = []
    for function in (backend, formula):
        output = function(*inputs)
        weight = draw(*output.shape, seed=6).double()
        results.append([output, *torch.autograd.grad((output * weight).sum(), wanted)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


LORA = {
    "q_v": {"target_modules": ["q", "v"]},
    "q_k_v_biased": {"target_modules": ["q", "k", "v"], "lora_bias": True},
}
BLOCKS = {"q": 0, "k": 1, "v": 2}  # of the rows of stock's qkv


@torch.no_grad()
def merged_into(theirs: SamModel, ours: nn.Module) -> SamModel:
    """Stock with the adapters' products added to the rows of `qkv` that they belong to."""
    for name, module in adapters(ours):
        rows, qkv = qkv_of(theirs, name)
        qkv.weight[rows] += module.get_delta_weight("default")
        if module.lora_bias["default"]:
            qkv.bias[rows] += module.scaling["default"] * module.lora_B["default"].bias
    return theirs


def adapters(model: nn.Module):
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "get_delta_weight")]


def qkv_of(theirs: SamModel, name: str) -> tuple[slice, nn.Linear]:
    *path, layer, _, leaf = name.removeprefix("base_model.model.").split(".")
    assert path == ["vision_encoder", "layers"]
    qkv = theirs.vision_encoder.layers[int(layer)].attn.qkv
    width = qkv.in_features
    return slice(BLOCKS[leaf] * width, (BLOCKS[leaf] + 1) * width), qkv


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", LORA)
def test_lora_gradients(kind, checkpointing):
    """An adapter's gradients follow from that of the weight it adds to, by the chain rule: dB = s dW A', dA = s B' dW.

    With a bias of its own, an adapter changes what padding is: stock's windows are padded before `qkv`, so the merged
    bias is what its padding holds, and the same must be true here.
    """
    theirs = stock_model()
    ours = split_model(theirs)
    if checkpointing:
        ours.gradient_checkpointing_enable()
    ours = get_peft_model(ours, LoraConfig(r=4, lora_alpha=8, **LORA[kind]))
    before = stock_forward(ours, pixels(), **points(1, 0))["pred_masks"].detach()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_" in name:
                parameter.copy_(draw(*parameter.shape, seed=sum(name.encode())) * 0.3)
    theirs = merged_into(theirs, ours)
    theirs.train(), ours.train()

    inputs = points(1, 0)
    outputs, gradients = outputs_and_gradients(stock_forward, ours, pixels(), **inputs)
    their_outputs, their_gradients = outputs_and_gradients(stock_forward, theirs, pixels(), **inputs)
    assert_same_outputs(outputs, their_outputs)
    assert (outputs["pred_masks"] - before).abs().max() > 0.1

    expected = {"pixel_values": their_gradients["pixel_values"]}
    for name, module in adapters(ours):
        rows, _ = qkv_of(theirs, name)
        fused = f"{name.removeprefix('base_model.model.').rpartition('.')[0]}.qkv"
        weight = their_gradients[f"{fused}.weight"][rows]
        scale, a, b = module.scaling["default"], module.lora_A["default"].weight, module.lora_B["default"].weight
        expected[f"{name}.lora_A.default.weight"] = scale * b.T @ weight
        expected[f"{name}.lora_B.default.weight"] = scale * weight @ a.T
        if module.lora_bias["default"]:
            expected[f"{name}.lora_B.default.bias"] = scale * their_gradients[f"{fused}.bias"][rows]
    assert expected.keys() == {name for name in gradients if "lora_" in name or name == "pixel_values"}
    assert_same_gradients({name: gradients[name] for name in expected}, expected)
