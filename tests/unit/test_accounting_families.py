"""Accounting reads each family's own table: parameters, operations and kept bytes against models of every family."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from crosslayer.accounting import Method, Shape, Step, count_operations, count_parameters, saved_bytes
from crosslayer.accounting.kept import live_state_bytes
from crosslayer.accounting.planner import make_plan
from crosslayer.analysis import OperationCounter, measure_saved_activations
from crosslayer.crnet import crnet_config

WIDTHS = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
LLAMA = {**WIDTHS, **IDS, "intermediate_size": 100, "num_key_value_heads": 2}
MOE = {"moe_intermediate_size": 40, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 64},
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 16},
    "gemma3_text": {**LLAMA, "head_dim": 16},
    "gpt2": {**WIDTHS, **IDS, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    # dense layers below sparse ones: gate, up and down end, the mixture begins
    "qwen3_moe": {**LLAMA, **MOE, "head_dim": 16, "num_experts": 8, "mlp_only_layers": [0, 1]},
    "deepseek_v3": {
        **LLAMA,
        **MOE,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "cohere": LLAMA,
}
TOKENS, ROWS = 32, 4
REBUILDING = [
    *(("cross_layer", policy) for policy in ("invert", "replay", "reversible")),
    *(("cola", policy) for policy in ("invert", "replay")),
]


def config_of(family, factorization="cross_layer", **fields):
    rank = {} if factorization == "dense" else {"rank": 8}  # a product by group wants rows of 16 bytes
    shape = {"model_type": family, **FAMILIES[family]}
    return crnet_config(shape, factorization=factorization, **rank, **fields)


def step_of(model):
    ids = torch.randint(3, 101, (ROWS, TOKENS))
    with OperationCounter() as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("factorization", ["dense", "cross_layer", "cola"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_equal_the_module(family, factorization):
    config = config_of(family, factorization)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(count_parameters(config).values()) == model.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_has_no_opinion_on_where_it_comes_from(family):
    """Our configuration, its fields, transformers' own configuration, and its fields."""
    assert Shape.of(config_of(family).to_dict()) == Shape.of(config_of(family))
    theirs = AutoConfig.for_model(family, **FAMILIES[family])
    assert Shape.of(theirs) == Shape.of(theirs.to_dict()) == Shape.of(config_of(family, "dense"))
    assert Shape.of(theirs).factorized("cross_layer", 8) == Shape.of(config_of(family))


@pytest.mark.parametrize(("factorization", "policy"), [("dense", "none"), ("cross_layer", "none"), *REBUILDING])
@pytest.mark.parametrize("family", FAMILIES)
def test_matrix_products_are_those_that_run(family, factorization, policy):
    model = AutoModelForCausalLM.from_config(config_of(family, factorization, recompute=policy)).train()
    expected = count_operations(model.config, TOKENS, Method(recompute=policy)).matrix_products
    assert step_of(model) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("factorization", "policy"), REBUILDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_bytes(family, factorization, policy):
    model = AutoModelForCausalLM.from_config(config_of(family, factorization, recompute=policy)).train()
    measured = measure_saved_activations(model, torch.randint(3, 101, (ROWS, TOKENS)))
    shape, step, method = Shape.of(model.config), Step(sequence=TOKENS, micro_batch=ROWS), Method(recompute=policy)
    expected = sum(saved_bytes(shape, step, method, layer) for layer in range(4))
    expected += live_state_bytes(shape, step, method)
    assert expected * step.tokens == pytest.approx(sum(measured.layer_bytes), rel=0.01)


def test_a_position_that_does_not_carry():
    """Its Y is in no state and its X A is kept under every policy."""
    step, method = Step(sequence=TOKENS), Method(recompute="reversible")
    carries, stands_alone = (Shape.of(config_of("llama", carries=carries)) for carries in ({}, {"up": False}))
    assert saved_bytes(carries, step, method, 2) == 0
    assert saved_bytes(stands_alone, step, method, 2) == 4 * 8
    assert live_state_bytes(carries, step, method) - live_state_bytes(stands_alone, step, method) == 4 * 100
    assert count_parameters(carries)["beta"] - count_parameters(stands_alone)["beta"] == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_plan(family):
    plan = make_plan({"model_type": family, **FAMILIES[family]}, beside=("dense", "cola", "galore", "lora"))
    assert plan.recommended.setting.fits
    assert all(not isinstance(other, str) for other in plan.beside.values()), plan.beside
