"""LoRA's dropout in the mask decoder's two cross attentions: the mean output stays, the noise differs from stock's.

`v_proj` sees averages of the image instead of its positions, and the `out_proj` of image to tokens sees the tokens
before they are mixed. So dropout has one mask per token and head, where stock has one per position of the image.
"""

import pytest
import torch
from models import split_model, stock_model
from peft import LoraConfig, get_peft_model

SAMPLES = 400
CASES = {"v_proj": "cross_attn_token_to_image", "out_proj": "cross_attn_image_to_token"}


def outputs(model, leaf):
    """The outputs of an attention with dropout, a new mask in each sample, and without: (SAMPLES, T or H * W, C) each.

    The samples are prompts with the same numbers, so one call of the attention gives all of them. The positions of the
    image have a part in common, as those of a real embedding have.
    """
    torch.manual_seed(0)
    path = f"mask_decoder.transformer.layers.0.{CASES[leaf]}"
    target = rf"{path}\.{leaf}".replace(".layers.0.", r"\.layers\.0\.")
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=target, init_lora_weights=False)
    model = get_peft_model(model, config)
    for seed, (_, parameter) in enumerate(sorted(p for p in model.named_parameters() if "lora_" in p[0])):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(seed))
    attention = model.get_submodule(f"base_model.model.{path}")
    numbers = torch.Generator().manual_seed(1)
    tokens, image, common = (torch.randn(1, 1, length, 32, generator=numbers) for length in (5, 36, 1))
    tokens, image = (x.expand(1, SAMPLES, -1, -1) for x in (tokens, 0.5 * image + common))
    results = []
    for training in (True, False):
        attention.train(training)
        with torch.no_grad():
            if leaf == "v_proj":
                own = getattr(attention, "tokens_to_image", None)
                out = own(tokens, (image, attention.k_proj), image) if own else attention(tokens, image, image)
            else:
                own = getattr(attention, "image_to_tokens", None)
                out = own(attention.q_proj, tokens, tokens)(image) if own else attention(image, tokens, tokens)
        results.append((out[0] if isinstance(out, tuple) else out)[0])
    return results


@pytest.fixture(scope="module")
def samples():
    return {leaf: (outputs(split_model(stock_model()), leaf), outputs(stock_model(), leaf)) for leaf in CASES}


@pytest.mark.parametrize("leaf", CASES)
def test_mean_is_the_output_without_dropout(samples, leaf):
    """Within the error of a mean of SAMPLES; without dropout ours equals stock's."""
    (_, ours), (_, theirs) = samples[leaf]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for noisy, without in samples[leaf]:
        assert noisy.std(0).min() > 0, "dropout acts"
        error = (noisy.mean(0) - without[0]) / (noisy.std(0) / SAMPLES**0.5)
        assert error.pow(2).mean().sqrt() < 1.5, "in standard errors, of which 1 is expected"


def deviations(samples, leaf, average=False):
    """Of ours and of stock's: over the samples, of each output or of the average over all places."""
    return [(noisy.mean(1) if average else noisy).std(0).mean().item() for noisy, _ in samples[leaf]]


def test_values(samples):
    """What a token takes is noisier than in stock, where the noise of the many positions averages out."""
    ours, theirs = deviations(samples, "v_proj")
    print(f"v_proj: {ours:.3f}, stock {theirs:.3f}")
    assert ours > 1.5 * theirs


def test_projections_of_tokens(samples):
    """A position is about as noisy as in stock, but all positions share the noise, so it does not average out."""
    ours, theirs = deviations(samples, "out_proj")
    ours_average, theirs_average = deviations(samples, "out_proj", average=True)
    print(f"out_proj: {ours:.3f}, stock {theirs:.3f}; averaged {ours_average:.3f}, stock {theirs_average:.3f}")
    assert 0.7 * theirs < ours < 1.3 * theirs
    assert ours_average > 1.5 * theirs_average
