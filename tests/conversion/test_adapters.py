"""`sam-split adapter`: LoRA and DoRA between q, k, v and qkv, and out of other tools' files; outputs stay."""

import json

import pytest
import torch
from models import draw, meta_model, stock_model, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from trained_adapters import ADAPTERS, masks, meta_masks, ours, trained

from conversion import convert, fuse_adapter, split_adapter
from conversion.adapters import transport
from conversion.cli import main
from conversion.tensors import same_bits

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    stock_model().save_pretrained(folder / "stock")
    convert(folder / "stock", folder / "split", progress=False)
    return folder / "split"


def stock_masks(adapted):
    """Stock calls its parts by keyword, which peft 0.18 cannot pass on to a module that it saves: merge first."""
    saves = adapted.peft_config["default"].modules_to_save
    return masks(adapted.merge_and_unload() if saves else adapted)


def assert_same_outputs(adapted, carried, plain):
    assert (adapted - masks(plain)).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(carried, adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_q_k_v_computes_the_same_on_stocks_qkv(name, base, tmp_path):
    adapted = trained(ours(base), tmp_path / "adapter", **{"r": 2, "lora_alpha": 4, **ADAPTERS[name]})
    argv = ["adapter", "fuse", str(tmp_path / "adapter"), str(tmp_path / "fused"), "--base", str(base)]
    assert main(argv) == 0
    carried = PeftModel.from_pretrained(stock_model(), tmp_path / "fused").eval()
    assert_same_outputs(masks(adapted), stock_masks(carried), ours(base))
    tensors = load_file(tmp_path / "fused" / "adapter_model.safetensors")
    assert not [key for key in tensors if ".attn.q." in key or ".attn.v." in key]


@pytest.mark.parametrize("name", ADAPTERS)
def test_fused_and_split_again_it_is_the_adapter_it_was(name, base, tmp_path):
    """Bit for bit where one scaling served q, k and v; to rounding where they differed and went into B."""
    adapted = trained(ours(base), tmp_path / "adapter", **{"r": 2, "lora_alpha": 4, **ADAPTERS[name]})
    fuse_adapter(tmp_path / "adapter", tmp_path / "fused", base=base)
    split_adapter(tmp_path / "fused", tmp_path / "again", base=base)
    carried = PeftModel.from_pretrained(ours(base), tmp_path / "again").eval()
    assert_same_outputs(masks(adapted), masks(carried), ours(base))
    before, after = (load_file(tmp_path / path / "adapter_model.safetensors") for path in ("adapter", "again"))
    if name == "dora":
        assert before.keys() < after.keys()  # k has a magnitude, which on qkv cannot be left out
    elif "patt" not in name and name not in ("lora_bias", "dora_q_k_v", "rslora"):
        assert before.keys() == after.keys()
        assert all(same_bits(before[key], after[key]) for key in before)


QKV_ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "patterns": {"rank_pattern": {"layers.1.attn.qkv": 5}, "alpha_pattern": {"layers.0.attn.qkv": 9}},
    "mask_decoder": {"modules_to_save": ["mask_decoder"]},
    "prompt_encoder": {"modules_to_save": ["prompt_encoder"]},
}


@pytest.mark.parametrize("name", QKV_ADAPTERS)
def test_an_adapter_of_stocks_qkv_computes_the_same_on_q_k_v(name, base, tmp_path):
    config = {"r": 3, "lora_alpha": 4, "target_modules": ["qkv"], **QKV_ADAPTERS[name]}
    adapted = trained(stock_model(), tmp_path / "adapter", **config)
    argv = ["adapter", "split", str(tmp_path / "adapter"), str(tmp_path / "split"), "--base", str(base)]
    assert main(argv) == 0
    carried = PeftModel.from_pretrained(ours(base), tmp_path / "split").eval()
    assert_same_outputs(stock_masks(adapted), masks(carried), stock_model())
    assert not [key for key in load_file(tmp_path / "split" / "adapter_model.safetensors") if ".qkv." in key]


def test_a_is_stacked_and_b_is_block_diagonal(base, tmp_path):
    trained(ours(base), tmp_path / "adapter", r=2, lora_alpha=4, target_modules=["q", "v"], rank_pattern={"v": 3})
    fuse_adapter(tmp_path / "adapter", tmp_path / "fused")
    before, after = (load_file(tmp_path / path / "adapter_model.safetensors") for path in ("adapter", "fused"))
    layer = f"{PREFIX}vision_encoder.layers.0.attn"
    a, b = after[f"{layer}.qkv.lora_A.weight"], after[f"{layer}.qkv.lora_B.weight"]
    assert torch.equal(a[:2], before[f"{layer}.q.lora_A.weight"])
    assert torch.equal(a[2:], before[f"{layer}.v.lora_A.weight"])
    assert b.shape == (96, 5)
    assert not b[:32, 2:].any()
    assert not b[32:64].any()
    assert not b[64:, :2].any()
    config = json.loads((tmp_path / "fused" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (5, 5, {})
    assert config["target_modules"] == [f"vision_encoder.layers.{layer}.attn.qkv" for layer in (0, 1)]


def test_a_block_without_change_keeps_its_magnitude_at_rank_one():
    """B is zero in the rows of k, so no rank reaches them: one of zeros carries DoRA's magnitude."""
    b = torch.tensor([1.0, 1, 0, 0, 1, 1])[:, None]
    parts = transport._cut("attn.qkv", transport.Lora(torch.ones(1, 4), b, 0.5, None, torch.arange(6.0)))
    assert list(parts) == ["q", "k", "v"]
    assert parts["k"].magnitude.tolist() == [2, 3]
    assert parts["k"].a.shape == (1, 4)
    assert parts["k"].b.tolist() == [[0], [0]]


def test_dora_on_some_rows_needs_the_base(base, tmp_path, capsys):
    trained(ours(base), tmp_path / "adapter", r=2, target_modules=["q", "v"], use_dora=True)
    assert main(["adapter", "fuse", str(tmp_path / "adapter"), str(tmp_path / "fused")]) == 2
    assert (
        "the rows of k in qkv then take their magnitude from the base: name it with --base" in capsys.readouterr().err
    )
    assert not (tmp_path / "fused").exists()


def test_replacing_the_prompt_encoder_needs_the_base(base, tmp_path, capsys):
    trained(ours(base), tmp_path / "adapter", r=2, target_modules=["q", "v"], modules_to_save=["prompt_encoder"])
    argv = ["fuse", tmp_path / "adapter", tmp_path / "out"]
    assert_refused(argv, "holds a copy of the positional matrix", tmp_path / "out", capsys)


def test_an_adapter_in_bfloat16_stays_so(base, tmp_path):
    trained(ours(base), tmp_path / "adapter", r=2, target_modules=["q", "k"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path)
    fuse_adapter(tmp_path / "adapter", tmp_path / "fused")
    split_adapter(tmp_path / "fused", tmp_path / "again")
    before, after = load_file(path), load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(same_bits(before[key], after[key]) for key in before)


REFUSED = {
    "bias": ({"bias": "lora_only"}, "bias='lora_only', which replaces biases of the base; merge it instead"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which also changes the base's weights"),
    "alora": ({"alora_invocation_tokens": [1]}, "uses alora_invocation_tokens, which cannot be expressed"),
    "ia3": ({"peft_type": "IA3"}, "the adapter is IA3, expected LORA"),
    "alpha": ({"lora_alpha": "much"}, "lora_alpha must be a number, got 'much'"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("action", ["fuse", "split"])
def test_what_cannot_be_carried_over_is_refused_with_its_reason(action, name, base, tmp_path, capsys):
    changes, message = REFUSED[name]
    model, targets = (ours(base), ["q", "v"]) if action == "fuse" else (stock_model(), ["qkv"])
    trained(model, tmp_path / "adapter", r=2, target_modules=targets)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert_refused([action, tmp_path / "adapter", tmp_path / "out"], message, tmp_path / "out", capsys)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_rank_that_is_not_the_tensors_is_refused(rank, base, tmp_path, capsys):
    """The scaling would be that of another adapter."""
    trained(ours(base), tmp_path / "adapter", r=2, target_modules=["q", "v"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": rank}))
    message = f"adapter_config.json says rank {rank}, and lora_A has 2"
    assert_refused(["fuse", tmp_path / "adapter", tmp_path / "out"], message, tmp_path / "out", capsys)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["attn.q.lora_A", "attn.v.lora_B", "iou_token"])
def test_what_is_not_finite_is_refused(part, value, base, tmp_path, capsys):
    """By what carries an adapter over, and by what merges it."""
    trained(ours(base), tmp_path / "adapter", r=2, target_modules=["q", "v"], modules_to_save=["iou_token"])

    def spoil(state):
        next(tensor for name, tensor in state.items() if part in name).flatten()[1] = value

    edit_weights(tmp_path / "adapter", spoil)
    message = "holds values that are not finite; train it again"
    assert_refused(["fuse", tmp_path / "adapter", tmp_path / "out"], message, tmp_path / "out", capsys)
    assert main(["merge", str(base), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def assert_refused(argv, message, out, capsys):
    capsys.readouterr()  # what loading the models printed
    assert main(["adapter", *map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


def edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


LAYER = f"{PREFIX}vision_encoder.layers.0.attn.q"
BROKEN = {
    "half_missing": (
        lambda s: s.pop(f"{LAYER}.lora_B.weight"),
        "lora_A and lora_B must be (rank, inputs) and (outputs",
    ),
    "rank_mismatch": (lambda s: s.update({f"{LAYER}.lora_A.weight": torch.ones(3, 32)}), "got [(3, 32), (32, 2)]"),
    "size_mismatch": (
        lambda s: s.update({f"{LAYER}.lora_B.weight": torch.ones(16, 2)}),
        "made for layers of different sizes",
    ),
    "embedding": (
        lambda s: s.update({f"{LAYER}.lora_embedding_A": torch.ones(2, 2)}),
        "is not a LoRA or DoRA tensor of a linear",
    ),
    "replaced": (lambda s: s.update({f"{LAYER}.weight": torch.ones(32, 32)}), "under another name; merge it instead"),
    "empty": (lambda s: s.clear(), "the adapter holds no LoRA weights"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_refused(name, base, tmp_path, capsys):
    change, message = BROKEN[name]
    trained(ours(base), tmp_path / "adapter", r=2, target_modules=["q", "v"])
    edit_weights(tmp_path / "adapter", change)
    assert_refused(["fuse", tmp_path / "adapter", tmp_path / "out"], message, tmp_path / "out", capsys)


def test_fuse_and_split_take_each_others_adapters_only(base, tmp_path, capsys):
    trained(ours(base), tmp_path / "split", r=2, target_modules=["q", "v"])
    trained(stock_model(), tmp_path / "fused", r=2, target_modules=["qkv"])
    assert_refused(["fuse", tmp_path / "fused", tmp_path / "out"], "has no q, k or v", tmp_path / "out", capsys)
    assert_refused(["split", tmp_path / "split", tmp_path / "out"], "has no qkv", tmp_path / "out", capsys)
    (tmp_path / "empty").mkdir()
    assert_refused(
        ["split", tmp_path / "empty", tmp_path / "out"], "holds no adapter_config.json", tmp_path / "out", capsys
    )
    assert_refused(["split", tmp_path / "fused", tmp_path / "split"], "exists already", tmp_path / "out", capsys)


def test_an_untrained_adapter_leaves_nothing_to_split(tmp_path, capsys):
    get_peft_model(stock_model(), LoraConfig(r=2, target_modules=["qkv"])).save_pretrained(tmp_path / "adapter")
    assert_refused(["split", tmp_path / "adapter", tmp_path / "out"], "it was never trained", tmp_path / "out", capsys)


def test_a_trained_copy_of_the_positional_matrix_is_refused(base, tmp_path, capsys):
    trained(stock_model(), tmp_path / "adapter", r=2, target_modules=["qkv"], modules_to_save=["prompt_encoder"])
    twin = f"{PREFIX}prompt_encoder.shared_embedding.positional_embedding"
    argv = ["split", tmp_path / "adapter", tmp_path / "out"]
    assert_refused(argv, "give --base", tmp_path / "out", capsys)
    edit_weights(tmp_path / "adapter", lambda state: state.update({twin: state[twin] + 1}))
    assert_refused([*argv, "--base", base], "SamSplit has one matrix for both", tmp_path / "out", capsys)


class SamedQkv(nn.Module):
    """What SAMed and Sam_LoRA put in the place of Meta's qkv: low-rank terms on the first and the last third."""

    def __init__(self, qkv, factors):
        super().__init__()
        self.qkv, self.factors, self.channels = qkv, factors, qkv.in_features

    def forward(self, x):
        qkv = self.qkv(x).clone()
        (a_q, b_q), (a_v, b_v) = self.factors
        qkv[..., : self.channels] += x @ a_q.T @ b_q.T
        qkv[..., -self.channels :] += x @ a_v.T @ b_v.T
        return qkv


@pytest.fixture(scope="module")
def samed(tmp_path_factory):
    """Meta's model and its file, and the LoRA factors of a tool that adapts it: two for each layer, q then v."""
    folder = tmp_path_factory.mktemp("samed")
    meta = meta_model()
    torch.save(meta.state_dict(), folder / "meta.pth")
    factors = [(0.3 * draw(4, 32, seed=20 + i), 0.3 * draw(32, 4, seed=40 + i)) for i in range(4)]
    state = {f"w_a_{i:03d}": a for i, (a, _) in enumerate(factors)} | {
        f"w_b_{i:03d}": b for i, (_, b) in enumerate(factors)
    }
    return meta, folder / "meta.pth", factors, state


def test_sameds_file_becomes_a_peft_adapter(samed, tmp_path):
    _, base, factors, state = samed
    tuned = meta_model()
    with torch.no_grad():
        for parameter in tuned.mask_decoder.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    saved = {key: value for key, value in tuned.state_dict().items() if not key.startswith("image_encoder")}
    torch.save({**state, **saved}, tmp_path / "samed.pth")
    for layer, block in enumerate(tuned.image_encoder.blocks):
        block.attn.qkv = SamedQkv(block.attn.qkv, factors[2 * layer : 2 * layer + 2])
    argv = ["adapter", "import", str(tmp_path / "samed.pth"), str(tmp_path / "adapter"), "--base", str(base)]
    assert main(argv) == 0
    convert(base, tmp_path / "split", progress=False)
    plain = ours(tmp_path / "split")
    carried = PeftModel.from_pretrained(ours(tmp_path / "split"), tmp_path / "adapter").eval()
    assert (masks(carried) - masks(plain)).abs().max() > 0.1
    torch.testing.assert_close(masks(carried), meta_masks(tuned), atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["mask_decoder", "prompt_encoder"]


def test_sam_loras_file_becomes_a_peft_adapter(samed, tmp_path):
    _, base, factors, state = samed
    save_file(state, tmp_path / "lora.safetensors")
    adapted = meta_model()
    for layer, block in enumerate(adapted.image_encoder.blocks):
        block.attn.qkv = SamedQkv(block.attn.qkv, factors[2 * layer : 2 * layer + 2])
    argv = ["adapter", "import", str(tmp_path / "lora.safetensors"), str(tmp_path / "adapter"), "--base", str(base)]
    assert main(argv) == 0
    convert(base, tmp_path / "split", progress=False)
    carried = PeftModel.from_pretrained(ours(tmp_path / "split"), tmp_path / "adapter").eval()
    torch.testing.assert_close(masks(carried), meta_masks(adapted), atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 4, str(base))


IMPORTS = {
    "fewer_layers": (lambda s: [s.pop("w_a_003"), s.pop("w_b_003")], "holds 3 w_a_* and 3 w_b_*, expected 4 of each"),
    "half": (lambda s: s.pop("w_b_003"), "holds 4 w_a_* and 3 w_b_*"),
    "another_width": (lambda s: s.update(w_a_000=torch.ones(4, 48)), "w_a_000 and w_b_000 do not fit"),
    "more": (lambda s: s.update(fc_32in_10out=torch.ones(1)), "'fc_32in_10out' is no LoRA factor"),
    "classes": (
        lambda s: s.update(
            {**{k: v for k, v in meta_model().state_dict().items() if k.startswith("mask_decoder")}}
            | {"mask_decoder.mask_tokens.weight": torch.ones(9, 32)}
        ),
        "has the shape (9, 32), and (4, 32) in",
    ),
    "key_missing": (
        lambda s: s.update({"mask_decoder.iou_token.weight": torch.ones(1, 32)}),
        "is not in the checkpoint",
    ),
    "positional": (
        lambda s: s.update(
            {k: v + ("gaussian" in k) for k, v in meta_model().state_dict().items() if k.startswith("prompt_encoder")}
        ),
        "was trained with another positional matrix",
    ),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_a_file_that_does_not_fit_is_not_imported(name, samed, tmp_path, capsys):
    _, base, _, state = samed
    change, message = IMPORTS[name]
    state = dict(state)
    change(state)
    torch.save(state, tmp_path / "lora.pth")
    argv = ["import", tmp_path / "lora.pth", tmp_path / "out", "--base", base]
    assert_refused(argv, message, tmp_path / "out", capsys)


def test_import_needs_a_file(tmp_path, capsys):
    argv = ["import", tmp_path / "no.pth", tmp_path / "out", "--base", tmp_path / "base"]
    assert_refused(argv, "no.pth does not exist", tmp_path / "out", capsys)


@pytest.mark.parametrize("dora", [False, True])
def test_a_base_of_another_size_is_refused(dora, base, tmp_path, capsys):
    trained(ours(base), tmp_path / "adapter", r=2, target_modules=["q", "v"], use_dora=dora)
    stock_model(tiny_config(hidden_size=48)).save_pretrained(tmp_path / "wider")
    argv = ["fuse", tmp_path / "adapter", tmp_path / "fused", "--base", tmp_path / "wider"]
    assert_refused(argv, "attn.q is for a layer of shape (32, 32), and in", tmp_path / "fused", capsys)
