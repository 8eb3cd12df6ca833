"""Generation: every cache and none, greedy, sampled and beam search, padded batches, every attention."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from model_cases import FACTORIZATION_CASES, PAD, model_of, tokens
from tolerances import assert_close

CASES = [*FACTORIZATION_CASES, "gqa", "silu_increment"]
NEW = 12


def generator_of(case, **fields):
    """Without an end-of-text token, so that every continuation has the asked length."""
    return model_of(case, eos_token_id=None, **fields)


def greedy(model, ids, **arguments):
    arguments = {"do_sample": False, "max_new_tokens": NEW, **arguments}
    return model.generate(ids, attention_mask=arguments.pop("attention_mask", torch.ones_like(ids)), **arguments)


def greedy_by_hand(model, ids):
    """The definition: the whole sequence anew for every token."""
    for _ in range(NEW):
        following = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
    return ids


@pytest.mark.parametrize("case", CASES)
def test_every_cache_gives_the_same_tokens(case):
    model = generator_of(case)
    ids = tokens(length=7)
    expected = greedy_by_hand(model, ids)
    assert expected[:, 7:].unique().numel() > 3  # not one token over and over
    assert torch.equal(greedy(model, ids), expected)
    assert torch.equal(greedy(model, ids, use_cache=False), expected)
    assert torch.equal(greedy(model, ids, cache_implementation="static"), expected)


@pytest.mark.parametrize("case", CASES)
def test_cached_logits(case):
    """In pieces of 9, 1 and 7 tokens through a dynamic and a static cache, as in one piece without."""
    model = generator_of(case)
    ids = tokens()
    expected = model(ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        pieces, start = [], 0
        for end in (9, 10, 17):
            position_ids = torch.arange(start, end)[None]
            output = model(ids[:, start:end], position_ids=position_ids, past_key_values=cache, use_cache=True)
            pieces.append(output.logits)
            start = end
        assert_close(torch.cat(pieces, 1), expected)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("case", ["cross_layer", "cola", "bias"])
def test_decoding_in_bfloat16(case, rows):
    """Token by token as in one piece, and both near float32; a single row of float32 takes another way than this."""
    exact, model, ids = generator_of(case), generator_of(case, dtype=torch.bfloat16), tokens(rows, 8)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        steps = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(ids.shape[1])]
        expected = exact(ids, use_cache=False).logits
        assert_close(torch.cat(steps, 1).float(), expected, torch.bfloat16)
        assert_close(model(ids, use_cache=False).logits.float(), expected, torch.bfloat16)


def test_a_cache_is_made_on_request():
    model = generator_of("cross_layer")
    output = model(tokens(), use_cache=True)
    assert isinstance(output.past_key_values, DynamicCache)
    assert output.past_key_values.get_seq_length() == tokens().shape[1]
    assert model(tokens(), use_cache=False).past_key_values is None
    following = model(tokens()[:, :1], past_key_values=output.past_key_values)  # positions follow the cache
    whole = model(torch.cat([tokens(), tokens()[:, :1]], 1), use_cache=False)
    assert_close(following.logits, whole.logits[:, -1:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", [*FACTORIZATION_CASES, "gqa"])
def test_left_padding_changes_nothing(case, attention):
    model = generator_of(case, attention=attention)
    short, long = tokens(1, length=5, seed=1), tokens(1, length=9, seed=2)
    batch = torch.cat([torch.cat([torch.full((1, 4), PAD), short], 1), long])
    mask = (batch != PAD).long()
    for arguments in ({}, {"use_cache": False}):
        together = greedy(model, batch, attention_mask=mask, **arguments)
        assert torch.equal(together[:1, 4:], greedy(model, short))
        assert torch.equal(together[1:], greedy(model, long))


@pytest.mark.parametrize("case", ["cross_layer", "cola"])
def test_sampling_follows_the_seed(case):
    model = generator_of(case)
    ids = tokens(length=7)

    def sample(seed, **arguments):
        torch.manual_seed(seed)
        return greedy(model, ids, do_sample=True, temperature=0.8, top_k=20, **arguments)

    assert torch.equal(sample(0), sample(0))
    assert torch.equal(sample(0), sample(0, use_cache=False))
    assert not torch.equal(sample(0), sample(1))


@pytest.mark.parametrize("case", ["cross_layer", "low_rank"])
def test_beam_search(case):
    model = generator_of(case)
    ids = tokens(length=7)
    beams = greedy(model, ids, num_beams=3, return_dict_in_generate=True, output_scores=True)
    assert beams.sequences.shape == (2, 7 + NEW)
    assert torch.equal(beams.sequences, greedy(model, ids, num_beams=3, use_cache=False))
    assert not torch.equal(beams.sequences, greedy(model, ids))
    # The scores of beams whose caches were shuffled are those of the finished sequences.
    log_probabilities = model(beams.sequences[:, :-1]).logits[:, 6:].log_softmax(-1)
    mean = log_probabilities.gather(-1, beams.sequences[:, 7:, None]).mean((1, 2))
    assert_close(beams.sequences_scores, mean)


@pytest.mark.parametrize("case", CASES)
def test_attention_implementations_agree(case):
    sdpa, eager = generator_of(case), generator_of(case, attention="eager")
    ids = tokens()
    assert_close(sdpa(ids).logits, eager(ids).logits)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert_close(sdpa(ids, attention_mask=mask).logits[0, 5:], eager(ids, attention_mask=mask).logits[0, 5:])
    assert torch.equal(greedy(sdpa, ids), greedy(eager, ids))


@pytest.mark.slow  # torch compiles flex attention: about a minute
@pytest.mark.long
def test_flex_attention_forward():
    """Forward only: torch has no backward of flex attention on a CPU."""
    model = generator_of("gqa", attention="flex_attention")
    ids = tokens()
    expected = generator_of("gqa")(ids).logits
    try:
        with torch.no_grad():
            logits = model(ids).logits
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch refuses flex attention here: {error}")
    assert_close(logits, expected)


def test_attention_can_be_chosen_while_loading(tmp_path):
    model = generator_of("cross_layer")
    model.save_pretrained(tmp_path)
    for attention in ("eager", "sdpa", "flex_attention"):
        again = type(model).from_pretrained(tmp_path, attn_implementation=attention)
        assert again.config._attn_implementation == attention
        again.set_attn_implementation("eager")
        assert_close(again(tokens()).logits, model(tokens()).logits)
