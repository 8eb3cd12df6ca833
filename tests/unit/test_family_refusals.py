"""Wrong input to the configuration of a family: one clear error each, by its exact words."""

import pytest
from huggingface_hub.errors import StrictDataclassError

from crosslayer import crnet_config
from crosslayer.errors import ConfigError, CrossLayerError
from family_cases import FAMILY_CASES, SIZES

SUPPORTED = "llama, mistral, qwen2, qwen3, gemma3_text, gpt2, qwen3_moe, deepseek_v3, cohere"
CHANGE = "change `rank`, `rank_pattern` or `first_layer_rank`."

REFUSALS = [
    # head dimensions that do not fit
    ("qwen2", {"num_attention_heads": 5}, "hidden_size=48 is not a multiple of num_attention_heads=5."),
    ("gpt2", {"num_attention_heads": 5}, "hidden_size=48 is not a multiple of num_attention_heads=5."),
    ("cohere", {"num_attention_heads": 5}, "hidden_size=48 is not a multiple of num_attention_heads=5."),
    (
        "qwen3",
        {"num_key_value_heads": 3},
        "num_key_value_heads=3 does not divide num_attention_heads=4.",
    ),
    ("llama", {"head_dim": 5}, "a head that rotations turn is 5 wide; choose an even width: they turn pairs."),
    ("qwen3", {"head_dim": 7}, "a head that rotations turn is 7 wide; choose an even width: they turn pairs."),
    (
        "deepseek_v3",
        {"qk_rope_head_dim": 7},
        "a head that rotations turn is 7 wide; choose an even width: they turn pairs.",
    ),
    # experts
    (
        "qwen3_moe_dense_first",
        {"num_experts_per_tok": 7},
        "num_experts_per_tok=7 is outside 1..6, the number of experts.",
    ),
    (
        "qwen3_moe_dense_first",
        {"num_experts_per_tok": 0},
        "num_experts_per_tok=0 is outside 1..6, the number of experts.",
    ),
    ("deepseek_v3", {"num_experts_per_tok": 7}, "num_experts_per_tok=7 is outside 1..6, the number of experts."),
    (
        "deepseek_v3",
        {"n_group": 4},
        "n_group=4 and topk_group=1 do not fit 6 experts, 2 a token: groups divide the experts, and those chosen hold "
        "enough of them.",
    ),
    (
        "qwen3_moe_dense_first",
        {"decoder_sparse_step": 0},
        "decoder_sparse_step=0 must be at least 1: every so many layers.",
    ),
    # positions that do not exist
    (
        "gpt2",
        {"carries": {"gate": False}},
        "carries names positions ['gate'] that the model has not; it has down, k, o, q, up, v.",
    ),
    (
        "deepseek_v3_one_query",
        {"carries": {"q_a": False}},
        "carries names positions ['q_a'] that the model has not; it has down, experts, gate, kv_a, kv_b, o, q, "
        "shared_down, shared_gate, shared_up, up.",
    ),
    (
        "gpt2",
        {"rank_pattern": {"gate": 3}},
        "rank_pattern keys ['gate'] match no low-rank linear; names are layers.N.position with N below 4 and position "
        "one of q, k, v, o, up, down.",
    ),
    # ranks that save nothing
    (
        "gpt2",
        {"rank": 24},
        "rank=24 of layers.1.q (48 x 48) saves nothing: its factors have fewer parameters than the matrix up to rank "
        f"23; {CHANGE}",
    ),
    (
        "qwen3_moe_dense_first",
        {"rank_pattern": {"experts": 21}},
        "rank=21 of layers.2.experts (48 x 36) saves nothing: its factors have fewer parameters than the matrix up to "
        f"rank 20; {CHANGE}",
    ),
    (
        "deepseek_v3",
        {"rank": 16},
        "rank=16 of layers.1.q_a (48 x 22) saves nothing: its factors have fewer parameters than the matrix up to rank "
        f"15; {CHANGE}",
    ),
    # dropout, windows, switches
    ("gpt2", {"resid_pdrop": 1.5}, "resid_pdrop=1.5 is outside 0..1: it is the share that is dropped."),
    ("gpt2", {"attn_pdrop": -0.1}, "attn_pdrop=-0.1 is outside 0..1: it is the share that is dropped."),
    ("gpt2", {"embd_pdrop": 1.0}, "embd_pdrop=1.0 is outside 0..1: it is the share that is dropped."),
    ("qwen3", {"attention_dropout": 2.0}, "attention_dropout=2.0 is outside 0..1: it is the share that is dropped."),
    ("mistral", {"sliding_window": -3}, "sliding_window=-3 must be at least 1 token; null turns it off."),
    (
        "gpt2",
        {"add_cross_attention": True},
        "add_cross_attention=True is not supported by CRNetGPT2Config; leave it out.",
    ),
    (
        "gemma3",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention=True is not supported by CRNetGemma3Config; leave it out.",
    ),
    # policies
    (
        "gpt2",
        {"factorization": "cola", "recompute": "reversible"},
        "recompute='reversible' belongs to factorization='cross_layer'; with 'cola' it would keep as much as 'invert'. "
        "Choose one of none, invert, replay.",
    ),
]


@pytest.mark.parametrize(("name", "fields", "message"), REFUSALS)
def test_refusals(name, fields, message):
    with pytest.raises(StrictDataclassError) as caught:
        FAMILY_CASES[name].config(**fields)
    assert str(caught.value).strip().endswith(f"ValueError: {message}")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("lama", f"model_type='lama' is not supported; the nearest is llama; supported are {SUPPORTED}. "),
        ("bert", f"model_type='bert' is not supported; supported are {SUPPORTED}. "),
    ],
)
def test_an_unknown_family(base, message):
    with pytest.raises(ConfigError) as caught:
        crnet_config({"model_type": base, **SIZES})
    assert str(caught.value) == message + "docs/new-family.md shows how to add one."


def test_a_field_of_another_family():
    with pytest.raises(ConfigError) as caught:
        crnet_config({"model_type": "gpt2"}, num_expert=3)
    assert str(caught.value).startswith("CRNetGPT2Config has no field num_expert")


def test_a_base_that_does_not_exist(tmp_path):
    with pytest.raises(CrossLayerError) as caught:
        crnet_config(tmp_path / "nothing")
    assert str(caught.value).startswith(f"no configuration of a model in '{tmp_path / 'nothing'}': ")
    assert "\n" not in str(caught.value)
