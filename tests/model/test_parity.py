"""Ours is stock transformers' SamModel: outputs, gradients and intermediate results, for every kind of prompt."""

import pytest
import torch
from models import (
    BATCH,
    CHANNELS,
    GRID,
    IMAGE_SIZE,
    PROMPT_KINDS,
    PROMPTS,
    boxes,
    draw,
    masks,
    pixels,
    points,
    redraw,
    split_config,
    split_model,
    stock_model,
    tiny_config,
)
from parity import (
    TOLERANCE,
    assert_same_gradients,
    assert_same_outputs,
    outputs_and_gradients,
    renamed,
    stock_forward,
)
from transformers import SamConfig, SamModel, SamVisionModel

from conversion import split_state_dict
from sam_split import SamSplitConfig, SamSplitModel, SamSplitVisionModel
from sam_split import attention_sam_split as attention
from sam_split import modeling_sam_split as modeling


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def pair(request):
    """(ours, theirs), both with the same attention implementation."""
    theirs = stock_model(attn_implementation=request.param)
    return split_model(theirs, request.param), theirs


@pytest.fixture(scope="module")
def theirs():
    return stock_model(attn_implementation="eager")


@pytest.fixture(scope="module")
def ours(theirs):
    return split_model(theirs)


def add_target_outside(model, pixel_values, target_embedding, **inputs):
    """Stock's forward with `target_embedding` that backward can follow: stock adds it in place, and backward refuses.

    Stock's first addition reaches the prompt tokens themselves, the later ones only the queries of their layer.
    """

    def to_tokens(module, args, kwargs):
        return args, {**kwargs, "point_embeddings": kwargs["point_embeddings"] + target_embedding}

    def to_queries(module, args, kwargs):
        return args, {**kwargs, "queries": kwargs["queries"] + target_embedding}

    transformer = model.mask_decoder.transformer
    hooks = [transformer.register_forward_pre_hook(to_tokens, with_kwargs=True)]
    hooks += [layer.register_forward_pre_hook(to_queries, with_kwargs=True) for layer in transformer.layers[1:]]
    try:
        return stock_forward(model, pixel_values, **inputs)
    finally:
        for hook in hooks:
            hook.remove()


def test_tiny_model_is_not_blind(theirs):
    vision = theirs.config.vision_config
    assert vision.image_size // vision.patch_size == GRID == 6
    assert vision.window_size == 4, "6 tokens in windows of 4 leave a padding of 2"
    assert [layer.window_size for layer in theirs.vision_encoder.layers] == [4, 0]
    assert vision.num_attention_heads == 2
    assert BATCH == pixels().shape[0] == 2
    for name, parameter in theirs.named_parameters():
        assert parameter.std() > 0.01, f"{name} is nearly constant"
    outputs = stock_forward(theirs, pixels(), **points(1, 0))
    assert 0.1 < outputs["pred_masks"].std() < 10
    assert 0.1 < outputs["iou_scores"].std() < 10
    first, second = outputs["pred_masks"]
    assert (first - second).std() > 0.1, "the image must matter"
    assert outputs["pred_masks"].std(dim=1).mean() > 0.01, "the prompt must matter"
    labels = points(1, 0, -1, -10)["input_labels"]
    assert set(labels.unique().tolist()) == {1, 0, -1, -10}


@pytest.mark.parametrize("multimask_output", [True, False], ids=["multimask", "single_mask"])
@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_outputs_and_gradients(pair, kind, multimask_output):
    ours, theirs = pair
    inputs = {**PROMPT_KINDS[kind], "multimask_output": multimask_output}
    our_outputs, our_gradients = outputs_and_gradients(stock_forward, ours, pixels(), **inputs)
    reference = add_target_outside if "target_embedding" in inputs else stock_forward
    their_outputs, their_gradients = outputs_and_gradients(reference, theirs, pixels(), **inputs)

    prompts = 1 if kind in ("none", "masks", "one_prompt") else PROMPTS
    assert our_outputs["pred_masks"].shape == (BATCH, prompts, 3 if multimask_output else 1, 4 * GRID, 4 * GRID)
    with torch.no_grad():
        assert_same_outputs(our_outputs, stock_forward(theirs, pixels(), **inputs))
    assert_same_outputs(our_outputs, their_outputs)
    assert_same_gradients(our_gradients, renamed(their_gradients, theirs, split_state_dict))


def test_every_parameter_and_the_pixels_have_a_gradient(ours):
    largest: dict[str, float] = {}
    for kind in ("points", "boxes", "masks"):
        for multimask_output in (True, False):
            inputs = {**PROMPT_KINDS[kind], "multimask_output": multimask_output}
            _, gradients = outputs_and_gradients(stock_forward, ours, pixels(), **inputs)
            for name, gradient in gradients.items():
                largest[name] = max(largest.get(name, 0.0), gradient.abs().max().item())
    # Softmax takes no notice of a number that is added to all scores of a query, and a bias of keys is one.
    still = {name for name, value in largest.items() if value < 1e-7}
    assert still == {name for name in largest if name.endswith((".k.bias", ".k_proj.bias"))}


def test_single_image(pair):
    ours, theirs = pair
    inputs = {name: value[:1] for name, value in points(1, 0).items()}
    with torch.no_grad():
        alone = stock_forward(ours, pixels()[:1], **inputs)
        assert_same_outputs(alone, stock_forward(theirs, pixels()[:1], **inputs))
        together = stock_forward(ours, pixels(), **points(1, 0))
    assert_same_outputs(alone, {name: value[:1] for name, value in together.items()})


def test_mask_for_each_prompt(ours, theirs):
    """Ours takes (B, P, 1, h, w); stock takes one mask an image, so it is asked prompt by prompt."""
    inputs = {**points(1, 0), **masks(PROMPTS)}
    with torch.no_grad():
        outputs = stock_forward(ours, pixels(), **inputs)
        one_by_one = [
            stock_forward(
                theirs,
                pixels(),
                input_points=inputs["input_points"][:, [p]],
                input_labels=inputs["input_labels"][:, [p]],
                input_masks=inputs["input_masks"][:, p],
            )
            for p in range(PROMPTS)
        ]
    expected = {name: torch.cat([each[name] for each in one_by_one], dim=1) for name in outputs}
    assert_same_outputs(outputs, expected)


def test_image_embeddings_are_reusable(pair):
    ours, theirs = pair
    with torch.no_grad():
        embeddings = ours.get_image_embeddings(pixels())
        assert_same_outputs({"embeddings": embeddings}, {"embeddings": theirs.get_image_embeddings(pixels())})
        for inputs in (points(1, 0), boxes(), {}):
            reused = ours(image_embeddings=embeddings, **inputs)
            whole = stock_forward(ours, pixels(), **inputs)
            assert torch.equal(reused.pred_masks, whole["pred_masks"])
            assert torch.equal(reused.iou_scores, whole["iou_scores"])
            stock = theirs(image_embeddings=embeddings, **inputs)
            assert_same_outputs(whole, {"pred_masks": stock.pred_masks, "iou_scores": stock.iou_scores})


def test_image_embeddings_carry_gradients(ours, theirs):
    """Stock's `get_image_embeddings` forbids gradients, so stock is asked through its encoder."""

    def ours_in_two_steps(model, pixel_values, **inputs):
        return stock_forward(model, None, image_embeddings=model.get_image_embeddings(pixel_values), **inputs)

    _, two_steps = outputs_and_gradients(ours_in_two_steps, ours, pixels(), **points(1, 0))
    _, reference = outputs_and_gradients(stock_forward, theirs, pixels(), **points(1, 0))
    assert_same_gradients(two_steps, renamed(reference, theirs, split_state_dict))
    with torch.no_grad():
        assert not ours.get_image_embeddings(pixels()).requires_grad


@pytest.mark.parametrize("prompts_at_once", [1, 2])
def test_prompts_in_parts(ours, theirs, monkeypatch, prompts_at_once):
    """Prompts are decoded a few at a time; three in parts of two leave a part of one."""
    monkeypatch.setattr(modeling, "PROMPTS_BYTES_CPU", prompts_at_once * 2 * 32 * 36 * 4)  # of two images' floats
    for inputs in ({**PROMPT_KINDS["personalised"]}, {**points(1, 0), **masks()}):
        our_outputs, our_gradients = outputs_and_gradients(stock_forward, ours, pixels(), **inputs)
        reference = add_target_outside if "target_embedding" in inputs else stock_forward
        their_outputs, their_gradients = outputs_and_gradients(reference, theirs, pixels(), **inputs)
        assert_same_outputs(our_outputs, their_outputs)
        assert_same_gradients(our_gradients, renamed(their_gradients, theirs, split_state_dict))


@pytest.mark.parametrize("tile_scores", [1, 5 * 36, 40 * 36, 2**20], ids=["one_row", "five_rows", "some_heads", "all"])
def test_attention_in_tiles(theirs, ours, monkeypatch, tile_scores):
    """The tiny grid's 36 x 36 scores fit one tile; smaller tiles cut rows and heads as large images do."""
    monkeypatch.setattr(attention, "TILE_SCORES_CPU", tile_scores)
    our_outputs, our_gradients = outputs_and_gradients(stock_forward, ours, pixels(), **points(1, 0))
    their_outputs, their_gradients = outputs_and_gradients(stock_forward, theirs, pixels(), **points(1, 0))
    assert_same_outputs(our_outputs, their_outputs)
    assert_same_gradients(our_gradients, renamed(their_gradients, theirs, split_state_dict))


@pytest.mark.parametrize("head_dim", [14, 16])
@pytest.mark.parametrize("backend", ["folded", "tiled"])
def test_attention_backends(backend, head_dim):
    """Both ways of `sdpa`, whichever device they are meant for, are the formula: values and all five gradients."""
    rows, columns, heads, scale = 3, 5, 4, head_dim**-0.5
    shapes = [(2, heads, rows * columns, head_dim)] * 3 + [(rows, rows, head_dim), (columns, columns, head_dim)]
    leaves = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    ask = draw(2, heads, rows * columns, head_dim, seed=9)

    def formula(q, k, v, *tables):
        return attention.eager_attention(q, k, v, *attention.relative_position_scores(q, *tables), scale)[0]

    def folded(q, k, v, *tables):
        return attention.folded_attention(q, k, v, *attention.relative_position_scores(q, *tables), scale)

    def tiled(q, k, v, *tables):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attention.TiledAttention.apply(q, k, v, *tables, None, scale).transpose(1, 2)

    def run(way):
        tensors = [leaf.clone().requires_grad_() for leaf in leaves]
        result = way(*tensors)
        return {"context": result.detach()}, dict(enumerate(torch.autograd.grad(result, tensors, ask)))

    values, gradients = run({"folded": folded, "tiled": tiled}[backend])
    expected_values, expected_gradients = run(formula)
    assert_same_outputs(values, expected_values)
    assert_same_outputs(gradients, expected_gradients)


@pytest.mark.parametrize("kind", ["none", "points", "boxes", "points_and_boxes", "masks", "masks_and_points"])
def test_prompt_embeddings(ours, theirs, kind):
    with torch.no_grad():
        our_sparse, our_dense = ours.get_prompt_embeddings(**PROMPT_KINDS[kind])
        their_sparse, their_dense = theirs.get_prompt_embeddings(**PROMPT_KINDS[kind])
    assert_same_outputs({"dense": our_dense.expand_as(their_dense)}, {"dense": their_dense})
    if their_sparse is None:
        assert our_sparse is None
    else:
        assert_same_outputs({"sparse": our_sparse}, {"sparse": their_sparse})


def test_image_wide_positional_embeddings(ours, theirs):
    with torch.no_grad():
        position = ours.get_image_wide_positional_embeddings()
        reference = theirs.get_image_wide_positional_embeddings()
    assert position.shape == (1, CHANNELS, GRID, GRID)
    assert_same_outputs({"position": position}, {"position": reference})


def test_vision_model():
    config = tiny_config()
    reference = redraw(SamVisionModel(config.vision_config)).eval()
    ours = SamSplitVisionModel(split_config(config).vision_config).eval()
    # The converter knows whole models; the image encoder's part of one is what this model holds.
    whole = split_state_dict({**stock_model(config).state_dict(), **reference.state_dict()})
    ours.load_state_dict({name: value for name, value in whole.items() if name.startswith("vision_encoder.")})
    with torch.no_grad():
        ours, reference = ours(pixels()), reference(pixels())
    assert_same_outputs({"state": ours.last_hidden_state}, {"state": reference.last_hidden_state})


def test_intermediate_results_eager():
    """Stock records all three kinds with its eager attention."""
    theirs = stock_model(attn_implementation="eager")
    ours = split_model(theirs, "eager")
    ask = {"output_attentions": True, "output_hidden_states": True, **points(1, 0)}
    with torch.no_grad():
        ours, theirs = ours(pixels(), **ask), theirs(pixels(), **ask)
    for name in ("vision_hidden_states", "vision_attentions", "mask_decoder_attentions"):
        assert len(getattr(ours, name)) == len(getattr(theirs, name)) == {"vision_hidden_states": 3}.get(name, 2)
        for our_value, their_value in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert_same_outputs({name: our_value.reshape_as(their_value)}, {name: their_value})


def test_hidden_states_sdpa(ours, theirs):
    with torch.no_grad():
        recorded = ours(pixels(), output_hidden_states=True).vision_hidden_states
        reference = theirs(pixels(), output_hidden_states=True).vision_hidden_states
    for our_value, their_value in zip(recorded, reference, strict=True):
        assert_same_outputs({"state": our_value}, {"state": their_value})


def test_nothing_is_recorded_unasked(ours):
    with torch.no_grad():
        outputs = ours(pixels())
    assert outputs.vision_hidden_states is None
    assert outputs.vision_attentions is None
    assert outputs.mask_decoder_attentions is None


def test_tuple_output(ours, theirs):
    with torch.no_grad():
        as_tuple = ours(pixels(), **points(1, 0), return_dict=False)
        reference = theirs(pixels(), **points(1, 0), return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert_same_outputs(dict(enumerate(as_tuple)), dict(enumerate(reference)))


@pytest.mark.parametrize("kind", ["personalised", "points_and_boxes"])
def test_inputs_are_left_alone(ours, kind):
    inputs = {"pixel_values": pixels(), **PROMPT_KINDS[kind]}
    before = {name: value.clone() for name, value in inputs.items()}
    outputs_and_gradients(stock_forward, ours, **inputs)
    for name, value in inputs.items():
        assert torch.equal(value, before[name]), name


def test_gradient_checkpointing(ours):
    _, without = outputs_and_gradients(stock_forward, ours, pixels(), **points(1, 0))
    runs = []
    hook = ours.vision_encoder.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    ours.train()
    ours.gradient_checkpointing_enable()
    try:
        _, within = outputs_and_gradients(stock_forward, ours, pixels(), **points(1, 0))
    finally:
        hook.remove()
        ours.gradient_checkpointing_disable()
        ours.eval()
    assert len(runs) == 2, "a checkpointed layer runs forward once more in backward"
    assert_same_gradients(within, without, tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_half_precision(theirs, dtype, attn_implementation):
    """Ours in half precision is as near to float32 as stock is; roundings differ, so the bound is twice its error."""
    with torch.no_grad():
        exact = stock_forward(theirs, pixels(), **points(1, 0))
        half_stock = stock_model(attn_implementation=attn_implementation).to(dtype)
        half_ours = split_model(theirs, attn_implementation).to(dtype)
        # Stock refuses float32 pixels here; ours casts them.
        stock = stock_forward(half_stock, pixels().to(dtype), **points(1, 0))
        ours = stock_forward(half_ours, pixels(), **points(1, 0))
    for name, value in exact.items():
        assert ours[name].dtype == stock[name].dtype == dtype
        their_error = (stock[name].float() - value).norm() / value.norm()
        our_error = (ours[name].float() - value).norm() / value.norm()
        assert their_error > 10 * TOLERANCE, "half precision must be visible"
        assert our_error <= 2 * their_error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_pixels_of_another_dtype_are_cast(ours, dtype):
    values = (pixels() * 50 + 128).clamp(0, 255).to(dtype)
    with torch.no_grad():
        cast = stock_forward(ours, values, **points(1, 0))
        reference = stock_forward(ours, values.float(), **points(1, 0))
    for name, value in reference.items():
        assert torch.equal(cast[name], value)


GEOMETRIES = {
    "pruned": {"hidden_size": 168, "mlp_dim": 696, "num_attention_heads": 12},
    "one_head": {"num_attention_heads": 1},
    "windows_without_padding": {"window_size": 3},
    "window_larger_than_grid": {"window_size": 7},
    "all_global": {"window_size": 0},
    "all_windowed": {"global_attn_indexes": []},
    "deeper": {"num_hidden_layers": 4, "global_attn_indexes": [1, 3]},
    "no_relative_positions": {"use_rel_pos": False},
    "no_absolute_positions": {"use_abs_pos": False},
    "no_qkv_bias": {"qkv_bias": False},
}


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometries(geometry, attn_implementation):
    theirs = stock_model(tiny_config(**GEOMETRIES[geometry]), attn_implementation)
    ours = split_model(theirs, attn_implementation)
    our_outputs, our_gradients = outputs_and_gradients(stock_forward, ours, pixels(), **points(1, 0))
    their_outputs, their_gradients = outputs_and_gradients(stock_forward, theirs, pixels(), **points(1, 0))
    assert_same_outputs(our_outputs, their_outputs)
    assert_same_gradients(our_gradients, renamed(their_gradients, theirs, split_state_dict))


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_published_sizes_have_stock_names_and_shapes(size):
    """Every tensor of ViT-B, L and H has stock's name and shape. ViT-B is the default config of both."""
    vision = {
        "base": {},
        "large": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "global_attn_indexes": [5, 11, 17, 23],
        },
        "huge": {
            "hidden_size": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "global_attn_indexes": [7, 15, 23, 31],
        },
    }[size]
    config = SamConfig(vision_config=vision)
    with torch.device("meta"):
        theirs = SamModel(config).state_dict()
        del theirs["prompt_encoder.shared_embedding.positional_embedding"]  # a second name of one tensor
        ours = SamSplitModel(SamSplitConfig(vision_config=vision)).state_dict()
    expected = {name: value.shape for name, value in split_state_dict(theirs).items()}
    assert {name: value.shape for name, value in ours.items()} == expected
    assert theirs["vision_encoder.pos_embed"].shape[1] * 16 == config.vision_config.image_size != IMAGE_SIZE
