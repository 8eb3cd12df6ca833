"""Documents are kept apart, whatever the model does with position ids."""

from itertools import pairwise

import pytest
import torch
import transformers as t

from crosslayer.errors import ConfigError
from crosslayer.evaluate import measure_perplexity
from crosslayer.evaluate.documents import single_documents, try_out
from family_cases import FAMILY_CASES
from model_cases import model_of

VOCABULARY = 64
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2}

MODELS = {  # name -> (configuration, whether it keeps packed documents apart)
    "llama": (lambda: t.LlamaConfig(**SMALL, **HEADS, intermediate_size=48), True),
    "qwen3": (lambda: t.Qwen3Config(**SMALL, **HEADS, intermediate_size=48, num_key_value_heads=2, head_dim=16), True),
    "gpt2": (lambda: t.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2), True),
    "gpt_neox": (lambda: t.GPTNeoXConfig(**SMALL, **HEADS, intermediate_size=48), True),
    "opt": (
        lambda: t.OPTConfig(**SMALL, **HEADS, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=80),
        False,
    ),
    "bloom": (lambda: t.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2), False),
    "falcon_alibi": (lambda: t.FalconConfig(**SMALL, **HEADS, alibi=True, new_decoder_architecture=False), False),
    "mpt": (lambda: t.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=2), False),
    "mamba": (lambda: t.MambaConfig(**SMALL, state_size=8), False),
    "rwkv": (lambda: t.RwkvConfig(**SMALL, attention_hidden_size=32, context_length=80), False),
    "recurrent_gemma": (
        lambda: t.RecurrentGemmaConfig(**{**SMALL, "num_hidden_layers": 3}, **HEADS, intermediate_size=96, head_dim=16),
        False,
    ),
}


def build(name):
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(MODELS[name][0]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # so that what comes before matters
    return model


def packed(lengths, rows=1):
    """[rows, T] of documents with these lengths, as `data/packing.py` makes them."""
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1)
    ids = torch.randint(3, VOCABULARY, positions.shape)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def one_by_one(model, batch):
    """Mean negative log-likelihood, each document handed to the model alone."""
    total, count = 0.0, 0
    for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for begin, end in pairwise(starts):
            with torch.no_grad():
                log_p = model(input_ids=ids[None, begin:end], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            total -= log_p.gather(-1, ids[begin + 1 : end, None]).sum().item()
            count += end - begin - 1
    return total / count


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_documents_alone(name):
    model = build(name)
    assert try_out(model, torch.device("cpu")).keeps_documents_apart == MODELS[name][1]
    batch = packed([20, 1, 15, 24], rows=3)
    expected = one_by_one(model, batch)
    assert measure_perplexity(model, [batch]).loss == pytest.approx(expected, rel=3e-6)
    together = {**batch, "position_ids": torch.arange(60).expand(3, -1)}
    assert measure_perplexity(model, [together]).loss != pytest.approx(expected, rel=3e-5), "nothing to keep apart"


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in MODELS if not MODELS[name][1]])
def test_no_rounding_hides_a_document_before(name, dtype, scale):
    """However little it moves: in bfloat16 an untrained BLOOM does by less than a bit of its largest logit."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(MODELS[name][0]()).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    reader = try_out(model, torch.device("cpu"))
    assert not reader.keeps_documents_apart
    assert "position ids" in reader.reason or "moves a prediction by" in reader.reason


WIDE = {"moe_intermediate_size": 32, "hidden_size": 64, "intermediate_size": 128, "q_lora_rank": 16, "kv_lora_rank": 16}
MIXTURES = {
    **{
        f"{whose}_{name}": (lambda name=name, whose=whose: getattr(FAMILY_CASES[name].but(**WIDE), whose)())
        for name in FAMILY_CASES
        if FAMILY_CASES[name].has_experts
        for whose in ("model", "theirs")
    },
    "mixtral": lambda: t.MixtralForCausalLM(
        t.MixtralConfig(**SMALL, **HEADS, intermediate_size=64, num_key_value_heads=2)
    ).eval(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_keep_documents_apart_to_rounding(name, dtype):
    """Their experts multiply the same tokens in other groups, and round otherwise."""
    model = MIXTURES[name]().to(dtype)
    assert try_out(model, torch.device("cpu")).keeps_documents_apart
    batch = packed([20, 1, 15, 24], rows=2)
    if dtype == torch.float32:
        assert measure_perplexity(model, [batch]).loss == pytest.approx(one_by_one(model, batch), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["cross_layer", "gqa", "low_rank", "cola"])
def test_our_models_keep_documents_apart(case, dtype):
    assert try_out(model_of(case).to(dtype).eval(), torch.device("cpu")).keeps_documents_apart


def test_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert try_out(build("llama"), torch.device("cpu")).keeps_documents_apart


def test_a_model_that_sees_what_it_predicts_is_refused():
    bert = t.BertLMHeadModel(t.BertConfig(**SMALL, **HEADS, intermediate_size=48)).eval()
    with pytest.raises(ConfigError, match="not causal"):
        measure_perplexity(bert, [packed([20])])
    decoder = t.BertLMHeadModel(t.BertConfig(**SMALL, **HEADS, intermediate_size=48, is_decoder=True)).eval()
    batch = packed([20, 11])
    assert measure_perplexity(decoder, [batch]).loss == pytest.approx(one_by_one(decoder, batch), rel=1e-4)


def test_single_documents_hold_every_prediction_once():
    batch = packed([5, 1, 1, 9, 2, 14], rows=4)
    labels = batch.pop("labels")
    seen = {row: [] for row in range(4)}
    for inputs, of_batch, rows in single_documents(batch, labels):
        assert inputs["input_ids"].numel() <= labels.numel()
        assert inputs["attention_mask"].sum(1).tolist() == sorted(
            inputs["attention_mask"].sum(1).tolist(), reverse=True
        )
        for row, line in zip(rows.tolist(), of_batch, strict=True):
            seen[row] += line[line != -100].tolist()
    for row in range(4):
        assert sorted(seen[row]) == sorted(labels[row][labels[row] != -100].tolist())
