"""The key map: every key once, every row used, and no bit lost on the way there and back."""

import itertools

import pytest
import torch
from segment_anything import sam_model_registry
from transformers import SamConfig, SamModel

from conversion import MissingKeyError, UnknownKeyError, from_meta, fuse_state_dict, split_state_dict, to_meta
from conversion.errors import ConversionError, ShapeError
from conversion.key_map import DROPPED, FIELDS, KEY_MAP, STOCK_MAP, plan

SIZES = {
    "vit_b": {},
    "vit_l": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "mlp_dim": 4096,
        "global_attn_indexes": [5, 11, 17, 23],
    },
    "vit_h": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "mlp_dim": 5120,
        "global_attn_indexes": [7, 15, 23, 31],
    },
}
LAYERS = 2


def stock_shapes(**vision):
    with torch.device("meta"):
        state = SamModel(SamConfig(vision_config=vision)).state_dict()
    return {key: value for key, value in state.items() if key not in DROPPED}


def random_state(shapes, dtype=torch.float32, seed=0):
    """Every tensor has bits of its own, NaNs and infinities included."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in shapes.items():
        raw = torch.randint(0, 256, (value.numel() * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        state[key] = raw.view(dtype).view(value.shape)
    return state


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype
        assert ours[key].shape == theirs[key].shape
        assert torch.equal(ours[key].contiguous().view(torch.uint8), theirs[key].contiguous().view(torch.uint8)), key


@pytest.fixture(scope="module")
def stock():
    return random_state(stock_shapes(num_hidden_layers=LAYERS, hidden_size=24, num_attention_heads=2))


@pytest.fixture(scope="module")
def meta(stock):
    return to_meta(split_state_dict(stock))


def test_rows_of_qkv_become_q_then_k_then_v(stock):
    rows = torch.arange(3 * 24)
    labelled = {
        **stock,
        "vision_encoder.layers.1.attn.qkv.weight": rows[:, None] * 100 + torch.arange(24),
        "vision_encoder.layers.1.attn.qkv.bias": rows,
    }
    split = split_state_dict(labelled)
    for block, name in enumerate("qkv"):
        expected = range(block * 24, (block + 1) * 24)
        assert split[f"vision_encoder.layers.1.attn.{name}.bias"].tolist() == list(expected)
        weight = split[f"vision_encoder.layers.1.attn.{name}.weight"]
        assert weight[:, 0].tolist() == [100 * row for row in expected]
        assert weight[0, 1] - weight[0, 0] == 1


def test_blocks_share_no_memory(stock, meta):
    for split in (split_state_dict(stock), from_meta(meta)):
        storages = [tensor.untyped_storage().data_ptr() for tensor in split.values()]
        assert len(set(storages)) == len(storages)
        q = split["vision_encoder.layers.0.attn.q.weight"]
        assert q.untyped_storage().nbytes() == q.nbytes


@pytest.mark.parametrize("size", SIZES)
def test_meta_and_stock_shapes_meet_in_the_middle(size):
    with torch.device("meta"):
        theirs = sam_model_registry[size]().state_dict()
    from_both = from_meta(theirs), split_state_dict(stock_shapes(**SIZES[size]))
    shapes = [{key: tuple(value.shape) for key, value in state.items()} for state in from_both]
    assert shapes[0] == shapes[1]
    assert to_meta(from_both[1]).keys() == theirs.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_round_trips_keep_every_bit(dtype):
    stock = random_state(stock_shapes(num_hidden_layers=LAYERS, hidden_size=24, num_attention_heads=2), dtype)
    split = split_state_dict(stock)
    assert_same_bits(fuse_state_dict(split), stock)
    assert_same_bits(from_meta(to_meta(split)), split)
    assert not any(key.startswith("image_encoder") for key in split)


def test_every_row_is_used_and_no_key_matches_two(meta, stock):
    for table, state in ((KEY_MAP, meta), (STOCK_MAP, stock)):
        sources = [source for origin in plan(state, table).values() for source in origin.sources]
        assert set(sources) == set(state)
        for row in table:
            without = {key for key in state if key not in {row.format(**values) for values in every_value(row)}}
            assert without < set(state), row
            if "rel_pos" in row or "pos_embed" in row or row.endswith("qkv.bias"):
                plan(without, table)  # all layers or none
            else:
                with pytest.raises(MissingKeyError):
                    plan(without, table)


def every_value(row):
    fields = [field for field in FIELDS if f"{{{field}}}" in row]
    choices = [FIELDS[field] or range(10) for field in fields]
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*choices)]


def test_a_row_is_greppable_and_its_inverse_is_not_written_twice():
    targets = [name for target in KEY_MAP.values() for name in (target if isinstance(target, tuple) else (target,))]
    assert len(set(targets)) == len(targets)
    assert not set(KEY_MAP) & {target for target in targets if target.startswith("vision_encoder")}


@pytest.mark.parametrize(
    ("remove", "add", "error", "message"),
    [
        (
            "blocks.1.attn.qkv.weight",
            "blocks.1.attn.qvk.weight",
            UnknownKeyError,
            "is not a tensor of a Segment Anything model",
        ),
        ("blocks.1.norm1.weight", None, MissingKeyError, "'image_encoder.blocks.1.norm1.weight' is not in"),
        ("blocks.1.attn.qkv.bias", None, MissingKeyError, "'image_encoder.blocks.1.attn.qkv.bias' is not in"),
        (None, "blocks.01.norm1.weight", UnknownKeyError, "'image_encoder.blocks.01.norm1.weight'"),
        (None, "blocks.1.norm1.weight.extra", UnknownKeyError, "weight.extra"),
        (None, "neck.4.weight", UnknownKeyError, "neck.4.weight"),
    ],
)
def test_a_key_that_is_misspelt_missing_or_extra_is_named(meta, remove, add, error, message):
    state = {key: value for key, value in meta.items() if key != f"image_encoder.{remove}"}
    if add:
        state[f"image_encoder.{add}"] = torch.zeros(1)
    with pytest.raises(error, match=message):
        from_meta(state)


def test_rows_that_cannot_be_cut_in_three_are_refused(stock):
    stock = {**stock, "vision_encoder.layers.0.attn.qkv.weight": torch.zeros(71, 24)}
    with pytest.raises(ShapeError, match=r"layers.0.attn.qkv.weight must have a multiple of 3 rows.*\(71, 24\)"):
        split_state_dict(stock)


def test_q_k_v_of_different_shapes_do_not_fuse(stock):
    split = {**split_state_dict(stock), "vision_encoder.layers.0.attn.k.weight": torch.zeros(23, 24)}
    with pytest.raises(ShapeError, match="must have the same shape"):
        fuse_state_dict(split)


def test_the_duplicate_of_old_stock_saves_is_dropped_only_when_equal(stock):
    (key, twin), *_ = DROPPED.items()
    finite = {**stock, twin: torch.ones(2, 128)}
    assert_same_bits(split_state_dict({**finite, key: torch.ones(2, 128)}), split_state_dict(finite))
    with pytest.raises(ConversionError, match=r"must equal 'shared_image_embedding.positional_embedding'"):
        split_state_dict({**finite, key: torch.zeros(2, 128)})


def test_nothing_is_read_from_an_empty_state_dict():
    with pytest.raises(MissingKeyError):
        from_meta({})
