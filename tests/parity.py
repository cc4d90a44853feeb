"""What agreement means: every output, and the gradient of every parameter and of the pixels, to 1e-5 of its own scale.

Source of the limit: on the tiny model float32 differs from float64 by up to 1e-6 of the largest output and 2e-6 of a
block's gradient, and stock's two attention implementations differ from each other by as much. The smallest deliberate
bug of test_mutations.py, a tanh GELU, moves outputs by 1.5e-4; the smallest in backward moves a gradient by a third.
"""

from collections.abc import Callable

import torch
from models import draw
from torch import nn

TOLERANCE = 1e-5
Tensors = dict[str, torch.Tensor]


def stock_forward(model: nn.Module, pixel_values: torch.Tensor, **inputs) -> Tensors:
    """Outputs of a model with stock's interface: transformers' or ours."""
    outputs = model(pixel_values=pixel_values, **inputs)
    return {"pred_masks": outputs.pred_masks, "iou_scores": outputs.iou_scores}


def meta_forward(
    model: nn.Module,
    pixel_values: torch.Tensor,
    input_points: torch.Tensor | None = None,
    input_labels: torch.Tensor | None = None,
    input_boxes: torch.Tensor | None = None,
    input_masks: torch.Tensor | None = None,
    multimask_output: bool = True,
) -> Tensors:
    """The same outputs from Meta's three modules, image by image; Meta's own forward forbids gradients."""
    outputs = []
    for i, embedding in enumerate(model.image_encoder(pixel_values)):
        sparse, dense = model.prompt_encoder(
            points=None if input_points is None else (input_points[i], input_labels[i]),
            boxes=None if input_boxes is None else input_boxes[i],
            masks=None if input_masks is None else input_masks[i].reshape(-1, 1, *input_masks.shape[-2:]),
        )
        outputs.append(
            model.mask_decoder(
                image_embeddings=embedding[None],
                image_pe=model.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask_output,
            )
        )
    pred_masks, iou_scores = zip(*outputs, strict=True)
    return {"pred_masks": torch.stack(pred_masks), "iou_scores": torch.stack(iou_scores)}


def outputs_and_gradients(
    forward: Callable[..., Tensors], model: nn.Module, pixel_values: torch.Tensor, **inputs
) -> tuple[Tensors, Tensors]:
    """Outputs, and the gradients of their seeded weighted sum by parameter name, with that of `pixel_values`."""
    pixel_values = pixel_values.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    outputs = forward(model, pixel_values, **inputs)
    sum((draw(*value.shape, seed=7).to(value) * value).mean() for value in outputs.values()).backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return {name: value.detach() for name, value in outputs.items()}, {**gradients, "pixel_values": pixel_values.grad}


def renamed(gradients: Tensors, model: nn.Module, converter: Callable[[Tensors], Tensors]) -> Tensors:
    """A reference model's gradients under our names, cut by the converter that cuts its weights.

    The positional matrix is left out: a parameter in some versions of stock, a buffer in Meta's model and ours.
    """
    state = {name: value for name, value in model.state_dict().items() if "positional" in name}
    state |= {name: value for name, value in gradients.items() if "positional" not in name}
    pixel_values = state.pop("pixel_values")
    converted = converter(state)
    del converted["shared_image_embedding.positional_embedding"]
    return {**converted, "pixel_values": pixel_values}


def assert_same_outputs(ours: Tensors, theirs: Tensors, tolerance: float = TOLERANCE):
    """The largest difference of each output is within `tolerance` of its largest value."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        assert ours[name].dtype == value.dtype, name
        error = (ours[name] - value).abs().max() / value.abs().max()
        assert error <= tolerance, f"{name}: relative error {error:.1e}, the limit is {tolerance:.0e}"


def assert_same_gradients(ours: Tensors, theirs: Tensors, tolerance: float = TOLERANCE):
    """The difference of each block's gradients is within `tolerance` of their norm.

    A block is what holds a parameter's layer: an attention, an MLP, the neck. Softmax takes no notice of a bias of
    keys, so by itself that gradient is nothing but noise, and those of queries and keys are little else where
    attention is nearly even. A wrong one is still far above 1e-5 of its block.
    """
    assert ours.keys() == theirs.keys()
    differences: dict[str, float] = {}
    norms: dict[str, float] = {}
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        block = name.rsplit(".", 2)[0]
        differences[block] = differences.get(block, 0.0) + (ours[name] - value).double().square().sum().item()
        norms[block] = norms.get(block, 0.0) + value.double().square().sum().item()
    errors = {block: (differences[block] / (norms[block] or 1.0)) ** 0.5 for block in norms}
    failed = {block: f"{error:.1e}" for block, error in errors.items() if not error <= tolerance}
    assert not failed, f"relative errors above {tolerance:.0e}: {failed}"
