"""The mask decoder does no work that its numbers do not need: it folds plain layers, and works in pieces."""

import pytest
import torch
from models import PROMPT_KINDS, pixels, split_model, stock_model
from parity import assert_same_gradients, assert_same_outputs, outputs_and_gradients, renamed, stock_forward
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conversion import split_state_dict
from sam_split import SamSplitConfig, SamSplitModel
from sam_split import modeling_sam_split as modeling
from sam_split import products_sam_split as products

# Stock's gradients do not survive its target embedding; test_parity.py has that.
KINDS = [kind for kind, inputs in PROMPT_KINDS.items() if "target_embedding" not in inputs]


@pytest.fixture(scope="module")
def theirs():
    return stock_model()


@pytest.fixture
def ours(theirs):
    return split_model(theirs)


def check(ours, theirs, kind):
    results = [outputs_and_gradients(stock_forward, model, pixels(), **PROMPT_KINDS[kind]) for model in (ours, theirs)]
    (outputs, gradients), (expected, their_gradients) = results
    assert_same_outputs(outputs, expected)
    assert_same_gradients(gradients, renamed(their_gradients, theirs, split_state_dict))


@pytest.fixture
def fold(monkeypatch):
    """Fold every plain layer, also those of the tiny model, whose few places do not pay for it."""
    folded = []

    def can_fold(layer, rows):
        folded.append(products.can_fold(layer, 1))
        return folded[-1]

    monkeypatch.setattr(modeling, "can_fold", can_fold)
    yield
    assert any(folded)


@pytest.mark.parametrize("kind", KINDS)
def test_folded(ours, theirs, fold, kind):
    """Outputs and gradients, those of the folded layers' biases included."""
    check(ours, theirs, kind)


def test_not_folded(ours, theirs, monkeypatch):
    monkeypatch.setattr(modeling, "can_fold", lambda layer, rows: False)
    check(ours, theirs, "points_and_boxes")


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@torch.no_grad()
def test_folded_in_half_precision(ours, how, request):
    """Folded or not, the rounding errors are of one size."""
    inputs = PROMPT_KINDS["points_and_boxes"]
    expected = stock_forward(ours, pixels(), **inputs)
    model = split_model(stock_model()).bfloat16() if how == "bfloat16" else ours

    def error():
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            outputs = stock_forward(model, pixels(), **inputs)
        return (outputs["pred_masks"].float() - expected["pred_masks"]).square().mean().sqrt()

    plain = error()
    request.getfixturevalue("fold")
    assert 0 < error() < 1.2 * plain


@pytest.mark.parametrize("kind", KINDS)
def test_places_in_pieces(ours, theirs, monkeypatch, kind):
    """36 places in pieces of 5 leave a piece of one."""
    monkeypatch.setattr(modeling, "TOKENS_AT_ONCE", 5)
    check(ours, theirs, kind)
    added = [
        model(pixel_values=pixels(), **PROMPT_KINDS[kind], output_attentions=True).mask_decoder_attentions
        for model in (ours, theirs)
    ]
    for our_block, their_block in zip(*added, strict=True):
        torch.testing.assert_close(our_block, their_block, rtol=1e-5, atol=1e-5)


def with_hook(layer):
    layer.register_forward_hook(lambda *args: None)
    return layer


def with_hook_for_gradients(layer):
    layer.register_full_backward_hook(lambda *args: None)
    return layer


def with_own_forward(layer):
    """As accelerate does where weights are offloaded."""
    layer.forward = layer.forward
    return layer


def with_parametrization(layer):
    return nn.utils.parametrizations.orthogonal(layer)


def with_adapter(layer):
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"]))
    return model.base_model.model[0]


class Quantised(torch.Tensor):
    """A weight that is not what it looks like."""


def with_other_weight(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))
    return layer


NOT_PLAIN = [
    with_hook,
    with_hook_for_gradients,
    with_own_forward,
    with_parametrization,
    with_adapter,
    with_other_weight,
]


@pytest.mark.parametrize("change", NOT_PLAIN, ids=lambda change: change.__name__)
def test_only_plain_layers_fold(change):
    layer = nn.Linear(32, 16)
    assert products.can_fold(layer, 14)
    assert not products.can_fold(change(layer), 14)


def test_folds_only_where_it_is_less_work():
    """One place costs rows * 32 multiplications folded, 32 * 16 + rows * 16 otherwise."""
    assert products.can_fold(nn.Linear(32, 16), 31)
    assert not products.can_fold(nn.Linear(32, 16), 32)


@torch.no_grad()
def test_work_of_one_more_prompt(monkeypatch):
    """Fewer than 1.9 GFLOP for a point more at ViT's decoder geometry, of which the upscaling takes 0.8."""
    with torch.device("meta"):
        model = SamSplitModel(SamSplitConfig(vision_config={"num_hidden_layers": 1, "global_attn_indexes": []}))
        image, positions, dense = (torch.zeros(1, 256, 64, 64) for _ in range(3))

    def work(multimask_output):
        flops = []
        for prompts in (1, 2):
            sparse = torch.zeros(1, prompts, 2, 256, device="meta")
            with FlopCounterMode(display=False) as counter:
                model.mask_decoder(image, positions, sparse, dense, multimask_output)
            flops.append(counter.get_total_flops())
        return (flops[1] - flops[0]) / 1e9

    assert work(False) + 0.1 < work(True) < 1.9
    monkeypatch.setattr(modeling, "can_fold", lambda layer, rows: False)
    assert work(True) > 2.3


@pytest.mark.parametrize(
    ("dtype", "images", "limit"), [(torch.float32, 1, 2), (torch.bfloat16, 1, 4), (torch.float32, 4, 1)]
)
def test_prompts_at_once_by_bytes(dtype, images, limit):
    image = torch.zeros(images, 1, 4096, 256, dtype=dtype)
    parts = modeling._parts(9, image)
    assert parts == [slice(start, start + limit) for start in range(0, 9, limit)]


@pytest.mark.parametrize("at_once", [1, 3, 100])
@torch.no_grad()
def test_only_masks_worth_it_are_upscaled(ours, monkeypatch, at_once):
    """A prompt none of whose predicted IoUs exceeds the least one gets zeros, for no work; the others are the same."""
    points = torch.rand(1, 9, 1, 2, generator=torch.Generator().manual_seed(0)) * 64
    embedding, positions = ours.get_image_embeddings(pixels()[:1]), ours.get_image_wide_positional_embeddings()
    inputs = embedding, positions, *ours.get_prompt_embeddings(points), True
    masks, ious, _ = ours.mask_decoder(*inputs)
    least = ious.amax(-1)[0].sort().values[4:6].mean()
    worth = (ious > least).any(-1)[0]
    assert worth.sum() == 4

    upscaled = []
    ours.mask_decoder.upscale_conv1.register_forward_pre_hook(lambda module, args: upscaled.append(len(args[0][0])))
    monkeypatch.setattr(modeling, "PROMPTS_BYTES_CPU", at_once * embedding.nbytes)
    found, same_ious, _ = ours.mask_decoder(*inputs, least_iou=float(least))
    torch.testing.assert_close(found[:, worth], masks[:, worth])
    assert not found[:, ~worth].any()
    torch.testing.assert_close(same_ious, ious)
    assert sum(upscaled) == 4
