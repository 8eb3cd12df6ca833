"""A cache put away as X A and made anew: keys, values and continuations as if it had stayed."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from crosslayer.errors import ConfigError
from crosslayer.evaluate import LowRankCache
from family_cases import FAMILY_CASES
from model_cases import PAD, model_of, tokens
from tolerances import assert_close, assert_far

FAMILIES = [name for name in FAMILY_CASES if not name.startswith("deepseek")]


def recorded(model, ids, **arguments):
    cache = LowRankCache(model)
    with cache.recording(), torch.no_grad():
        model(ids, past_key_values=cache, **arguments)
    return cache


def keys_and_values(cache):
    return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gets_its_keys_and_values_back(name):
    model = FAMILY_CASES[name].model(eos_token_id=None)
    plain, ids = DynamicCache(config=model.config), tokens()
    with torch.no_grad():
        model(ids, past_key_values=plain)
    cache = recorded(model, ids)
    cache.compress()
    assert cache.get_seq_length() == 0
    cache.restore()
    assert cache.get_seq_length() == ids.shape[1]
    for found, expected in zip(keys_and_values(cache), keys_and_values(plain), strict=True):
        assert_close(found, expected)
    following = tokens(length=3, seed=5)
    with torch.no_grad():
        assert_close(model(following, past_key_values=cache).logits, model(following, past_key_values=plain).logits)


@pytest.mark.parametrize("case", ["cross_layer", "gqa", "bias", "silu_increment", "first_layer_rank", "rank_pattern"])
def test_bit_for_bit_in_one_piece(case):
    model = model_of(case)
    cache = recorded(model, tokens())
    before = keys_and_values(cache)
    cache.compress()
    cache.restore()
    for found, expected in zip(keys_and_values(cache), before, strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(before[0], before[2])


def test_bfloat16():
    model = model_of("cross_layer", dtype=torch.bfloat16)
    cache = recorded(model, tokens())
    before = keys_and_values(cache)
    cache.compress()
    assert {tensor.dtype for tensor in cache.state_dict().values()} == {torch.bfloat16, torch.int64}
    cache.restore()
    for found, expected in zip(keys_and_values(cache), before, strict=True):
        assert found.dtype == torch.bfloat16
        assert_close(found, expected)


def test_what_it_holds(tmp_path):
    """[B, T, r] of k and v from the second layer on; through a file and back, into a new cache."""
    model = model_of("cross_layer")
    cache = recorded(model, tokens())
    before = keys_and_values(cache)
    cache.compress(device="cpu")
    shapes = {name: tuple(tensor.shape) for name, tensor in cache.state_dict().items() if name != "position_ids"}
    widths = {0: 48, 1: 7, 2: 7}
    assert shapes == {f"{layer}.{name}": (2, 17, widths[layer]) for layer in widths for name in "kv"}
    save_file(cache.state_dict(), tmp_path / "cache.safetensors")
    again = LowRankCache(model)
    again.load_state_dict(load_file(tmp_path / "cache.safetensors"))
    again.restore()
    for found, expected in zip(keys_and_values(again), before, strict=True):
        assert torch.equal(found, expected)


def test_generate_goes_on_from_a_padded_batch():
    """Prompts of two lengths, eight tokens, put away, eight more; as sixteen at once."""
    model = model_of("cross_layer", eos_token_id=None)
    batch = tokens(2, length=9)
    batch[0, :4] = PAD
    options = {"do_sample": False, "attention_mask": (batch != PAD).long()}
    expected = model.generate(batch, max_new_tokens=16, **options)
    cache = LowRankCache(model)
    with cache.recording():
        first = model.generate(batch, max_new_tokens=8, past_key_values=cache, **options)
    cache.compress()
    cache.restore()
    options["attention_mask"] = torch.cat([options["attention_mask"], torch.ones(2, 8).long()], 1)
    assert torch.equal(model.generate(first, max_new_tokens=8, past_key_values=cache, **options), expected)


def test_the_check_can_fail():
    model = model_of("cross_layer")
    cache = recorded(model, tokens())
    before = keys_and_values(cache)
    cache.compress()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.beta.mul_(1.01)
    cache.restore()
    after = keys_and_values(cache)
    assert torch.equal(after[0], before[0])
    assert_far(after[2], before[2])


def test_refusals():
    model = model_of("cross_layer")
    cache = recorded(model, tokens())
    model(tokens(), past_key_values=cache)
    with pytest.raises(ConfigError, match="has 34 tokens, not those that were recorded"):
        cache.compress()
    cache = recorded(model, tokens())
    cache.compress()
    with pytest.raises(ConfigError, match="compressed; call cache"):
        model(tokens(), past_key_values=cache)
    for other in (model_of("dense"), model_of("cola"), FAMILY_CASES["deepseek_v3"].model()):
        with pytest.raises(ConfigError, match="carries no keys"):
            LowRankCache(other)
