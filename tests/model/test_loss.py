"""`labels` give SAM's training loss: right in value and gradient, blind to padding and void, safe in low precision."""

import pytest
import torch
from models import BATCH, GRID, IMAGE_SIZE, boxes, draw, pixels, points, split_model, stock_model, targets
from parity import assert_same_gradients

from sam_split.modeling_sam_split import VOID_LABEL, segmentation_loss

SIDE = 4 * GRID


def reference_loss(masks, ious, labels, focal_weight=20, iou_power=2):
    """The loss in float64, one prompt, one mask and one pixel at a time, from its definition.

    Source: Segment Anything (arXiv 2304.02643), appendix A, with DETR's focal and dice losses.
    """
    batch, prompts, number, height, width = masks.shape
    step_y, step_x = labels.shape[2] // height, labels.shape[3] // width
    per_prompt = []
    for b in range(batch):
        for p in range(prompts):
            target, weight = {}, {}
            for y in range(height):
                for x in range(width):
                    block = labels[b, p, y * step_y : (y + 1) * step_y, x * step_x : (x + 1) * step_x].flatten()
                    known = [value for value in block.tolist() if value != VOID_LABEL]
                    if known:
                        target[y, x], weight[y, x] = sum(known) / len(known), len(known) / len(block)
            if not target:
                continue
            best, errors = None, []
            for m in range(number):
                focal, both, either, hits, union = 0.0, 0.0, 0.0, 0.0, 0.0
                for (y, x), t in target.items():
                    w, logit = weight[y, x], masks[b, p, m, y, x]
                    inside = 1 / (1 + torch.exp(-logit))
                    p_right = inside * t + (1 - inside) * (1 - t)
                    entropy = -t * torch.log(inside) - (1 - t) * torch.log(1 - inside)
                    focal = focal + w * (0.25 * t + 0.75 * (1 - t)) * (1 - p_right) ** 2 * entropy
                    both, either = both + w * inside * t, either + w * (inside + t)
                    hits += w * ((logit > 0).item() and t > 0.5)
                    union += w * ((logit > 0).item() or t > 0.5)
                loss = focal_weight * focal / max(sum(weight.values()), 1) + 1 - (2 * both + 1) / (either + 1)
                best = loss if best is None or loss < best else best
                errors.append(abs(ious[b, p, m] - hits / max(union, 1)) ** iou_power)
            per_prompt.append(best + sum(errors) / number)
    return sum(per_prompt) / max(len(per_prompt), 1)


def small(size: int, *, seed: int = 0):
    """Masks (2, 3, 2, 6, 6), predicted IoUs (2, 3, 2), and labels (2, 3, size, size) with void and padding."""
    masks, ious = 2 * draw(2, 3, 2, 6, 6, seed=seed).double(), draw(2, 3, 2, seed=seed + 1).double()
    labels = (draw(2, 3, size, size, seed=seed + 2) > 0.4).long()
    labels[0, 0, : size // 3, : size // 2] = VOID_LABEL
    labels[0, 1, 1::2, ::3] = VOID_LABEL  # cuts through mask pixels where labels are finer
    labels[1, 2] = VOID_LABEL
    return masks.requires_grad_(), ious.requires_grad_(), labels


@pytest.mark.parametrize(
    ("size", "weight"), [(6, {}), (12, {}), (24, {}), (12, {"focal": 0, "iou_power": 1}), (12, {"focal": 3.5})]
)
def test_value_and_gradients(size, weight):
    masks, ious, labels = small(size)
    theirs = reference_loss(masks, ious, labels, *weight.values())
    expected = torch.autograd.grad(theirs, (masks, ious))

    ours = segmentation_loss(masks, ious, labels, **weight)
    assert ours.shape == ()
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for got, wanted in zip(torch.autograd.grad(ours, (masks, ious)), expected, strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-15)

    single = segmentation_loss(masks.float(), ious.float(), labels, **weight)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), theirs, rtol=1e-6, atol=0)


def test_where_people_disagree_focal_softens_and_dice_does_not():
    """An edge pixel that three of four people count to the object, and its logit when the loss cannot fall further."""
    labels = torch.zeros(1, 4, 8, 8)
    labels[..., 2:6, 2:6] = 1
    labels[:, 3, 2, 2] = 0
    logits = torch.linspace(0, 9, 91)

    def best(focal):
        losses = []
        for logit in logits:
            masks = (18 * labels[:, :1] - 9).expand(1, 4, 8, 8).clone()
            masks[..., 2, 2] = logit
            losses.append(segmentation_loss(masks[:, :, None], torch.ones(1, 4, 1), labels, focal).item())
        return logits[torch.tensor(losses).argmin()]

    assert best(focal=20) < 1
    assert best(focal=0) == 9


def test_only_the_best_mask_is_pulled():
    masks, ious, labels = small(6)
    gradient = torch.autograd.grad(segmentation_loss(masks, ious, labels), masks)[0]
    pulled = gradient.flatten(3).abs().sum(-1) > 0  # (B, P, M)
    assert pulled.sum(-1).tolist() == [[1, 1, 1], [1, 1, 0]]


def test_void_pixels_do_not_count():
    masks, ious, labels = small(6)
    loss = segmentation_loss(masks, ious, labels)
    void = (labels == VOID_LABEL)[:, :, None].expand_as(masks)
    assert torch.autograd.grad(loss, masks)[0][void].eq(0).all()
    assert segmentation_loss(torch.where(void, -5 * masks, masks), ious, labels) == loss
    assert segmentation_loss(torch.where(void, masks, -5 * masks), ious, labels) != loss


def test_both_sizes_agree():
    masks, ious, labels = small(6)
    finer = labels.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(
        segmentation_loss(masks, ious, finer), segmentation_loss(masks, ious, labels), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_confident_masks_stay_finite(logit):
    masks = torch.full((1, 1, 1, 6, 6), logit, requires_grad=True)
    for label in (0, 1):
        loss = segmentation_loss(masks, torch.ones(1, 1, 1), torch.full((1, 1, 6, 6), label))
        assert loss.isfinite()
        assert torch.autograd.grad(loss, masks)[0].isfinite().all()


def test_nothing_but_padding_gives_zero():
    masks, ious, labels = small(6)
    loss = segmentation_loss(masks, ious, torch.full_like(labels, VOID_LABEL))
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (masks, ious)):
        assert gradient.eq(0).all()


@pytest.fixture(scope="module")
def model():
    return split_model(stock_model()).train()


def loss_and_gradients(model, **inputs):
    model.zero_grad(set_to_none=True)
    loss = model(pixel_values=pixels(), **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("side", [SIDE, IMAGE_SIZE])
def test_forward_takes_labels_at_both_sizes(model, side, multimask):
    output = model(pixel_values=pixels(), **boxes(), labels=targets(side), multimask_output=multimask)
    expected = reference_loss(output.pred_masks.double(), output.iou_scores.double(), targets(side))
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=0)
    assert output.to_tuple()[0] is output.loss


def test_no_labels_no_loss(model):
    assert model(pixel_values=pixels(), **boxes()).loss is None


@pytest.mark.parametrize("prompts", [boxes(), points(1, 0)], ids=["boxes", "points"])
def test_what_padding_holds_changes_nothing(model, prompts):
    """Two prompts are padding; wherever they point, loss and every gradient keep their bits."""
    labels = targets()
    labels[0, 2] = labels[1, 0] = VOID_LABEL
    loss, gradients = loss_and_gradients(model, **prompts, labels=labels)
    moved = {name: value.clone() for name, value in prompts.items()}
    for value in moved.values():
        value[0, 2], value[1, 0] = value[0, 1], value[1, 1]
    assert any((moved[name] != prompts[name]).any() for name in prompts)
    moved_loss, moved_gradients = loss_and_gradients(model, **moved, labels=labels)
    assert torch.equal(loss, moved_loss)
    assert gradients.keys() == moved_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, moved_gradients[name]), name


def test_more_padding_changes_no_bit_of_the_loss():
    masks, ious, labels = small(6)
    loss = segmentation_loss(masks, ious, labels)
    expected = torch.autograd.grad(loss, (masks, ious))
    padded = [torch.cat([value, value[:, :2]], dim=1) for value in (masks, ious, labels)]
    padded[2][:, 3:] = VOID_LABEL
    padded_loss = segmentation_loss(*padded)
    assert torch.equal(padded_loss, loss)
    for got, wanted in zip(torch.autograd.grad(padded_loss, (masks, ious)), expected, strict=True):
        assert torch.equal(got, wanted)


def test_more_padding_changes_nothing(model):
    """Three prompts padded to eight: the decoder's matrix products get other sizes, so rounding may differ."""
    labels = targets()
    plain, gradients = loss_and_gradients(model, **boxes(), labels=labels)
    void = torch.full((BATCH, 5, SIDE, SIDE), VOID_LABEL)
    padded, padded_gradients = loss_and_gradients(
        model,
        input_boxes=torch.cat([boxes()["input_boxes"], torch.zeros(BATCH, 5, 4)], dim=1),
        labels=torch.cat([labels, void], dim=1),
    )
    torch.testing.assert_close(padded, plain, rtol=1e-6, atol=0)
    assert_same_gradients(padded_gradients, gradients)


@pytest.mark.parametrize("multimask", [True, False])
def test_every_parameter_has_a_gradient(model, multimask):
    """DistributedDataParallel waits for every trainable parameter's gradient, be it zero."""
    _, gradients = loss_and_gradients(model, **boxes(), labels=targets(), multimask_output=multimask)
    assert gradients.keys() == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_bfloat16(model, how):
    expected = model(pixel_values=pixels(), **boxes(), labels=targets()).loss
    low = split_model(stock_model()).train()
    if how == "bfloat16":
        low = low.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        output = low(pixel_values=pixels(), **boxes(), labels=targets())
    assert output.pred_masks.dtype == torch.bfloat16, "the decoder did compute in low precision"
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=0.05, atol=0)
    output.loss.backward()
    gradients = [p.grad for p in low.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_image_embeddings_carry_gradients(model):
    """Encoding once and decoding later trains the encoder as much as `forward` does."""
    _, expected = loss_and_gradients(model, **boxes(), labels=targets())
    model.zero_grad(set_to_none=True)
    embeddings = model.get_image_embeddings(pixels())
    model(image_embeddings=embeddings, **boxes(), labels=targets()).loss.backward()
    for layer in ("q", "v"):
        name = f"vision_encoder.layers.0.attn.{layer}.weight"
        assert torch.equal(model.get_parameter(name).grad, expected[name])
        assert expected[name].abs().max() > 0


BAD_LABELS = {
    "other size": (
        targets()[..., :-1],
        r"labels must be \(B, P, 96, 96\) or \(B, P, 24, 24\), got",
    ),
    "other number of prompts": (
        targets()[:, :2],
        r"got \(2, 2, 24, 24\); B is 2 in pixel_values; P is 3 in input_boxes",
    ),
    "other number of images": (targets()[:1], r"got \(1, 3, 24, 24\)"),
    "no prompt axis": (targets()[:, 0], r"got \(2, 24, 24\)"),
    "255": (255 * targets(), r"labels must be one of .*got 255; divide a mask read from a PNG by 255"),
    "0.5": (0.5 * targets(), r"labels must be one of 1 \(inside\), 0 \(outside\), -100 \(void\), got 0.5"),
    "-1": (-targets(), r"labels must be one of .*got -1"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels(model, case):
    labels, message = BAD_LABELS[case]
    with pytest.raises(ValueError, match=message):
        model(pixel_values=pixels(), **boxes(), labels=labels)
