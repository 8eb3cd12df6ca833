"""CRNetConfig: defaults, ranks, the wording of every refusal, and the round trip through config.json."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from crosslayer.crnet import POSITIONS, CRNetConfig
from model_cases import CASES, ROPE_CASES, SHAPE, config_of


def refusal(**fields) -> str:
    with pytest.raises(StrictDataclassError) as caught:
        CRNetConfig(**(SHAPE | fields))
    return str(caught.value)


def test_defaults():
    config = CRNetConfig()
    ours = {
        "rank": None,
        "rank_pattern": {},
        "first_layer_rank": None,
        "factorization": "cross_layer",
        "carries": {},
        "increment_activation": None,
        "low_rank_initializer_range": None,
        "beta_init": 1.0,
        "beta_epsilon": 1e-6,
        "beta_trainable": True,
        "recompute": "none",
        "recompute_interval": None,
        "recompute_error_bound": 1e-5,
        "recompute_drift_bound": None,
        "crosslayer_format": 2,
    }
    fields = config.to_dict()
    assert {name: fields[name] for name in ours} == ours
    llama = LlamaConfig().to_dict()
    assert fields.keys() - llama.keys() - {"auto_map"} == ours.keys()
    assert {name: fields[name] for name in llama if name != "model_type"} == {
        name: value for name, value in llama.items() if name != "model_type"
    }
    assert config.model_type == "crnet"
    # What would compute wrong gradients or could not work is not announced.
    assert config.base_model_pp_plan is None


def test_default_rank_is_a_quarter_of_the_width():
    config = CRNetConfig(**SHAPE)
    assert {config.linear_rank(1, position) for position in POSITIONS} == {12}
    assert [config.linear_rank(0, position) for position in POSITIONS] == [None] * 7
    # and never more than half of what would save nothing: 48 * 6 / (48 + 6) = 5.3
    narrow = CRNetConfig(**(SHAPE | {"head_dim": 2}))
    assert [narrow.linear_rank(1, position) for position in POSITIONS] == [2, 2, 2, 2, 12, 12, 12]
    # A configuration of 0.1 keeps the rank that its weights have.
    old = CRNetConfig.from_dict({**SHAPE, "head_dim": 2, "rank": None})
    assert [old.linear_rank(1, position) for position in POSITIONS] == [6, 6, 6, 6, 12, 12, 12]


@pytest.mark.parametrize(("factorization", "first"), [("low_rank", 12), ("cola", 12), ("dense", None)])
def test_first_layer_of_the_other_factorizations(factorization, first):
    config = CRNetConfig(**SHAPE, factorization=factorization)
    assert config.linear_rank(0, "q") == config.linear_rank(1, "q") == first


def test_linear_shapes():
    config = config_of("gqa", head_dim=20, num_attention_heads=4, num_key_value_heads=2)
    assert {position: config.linear_shape(position) for position in POSITIONS} == {
        "q": (48, 80),
        "k": (48, 40),
        "v": (48, 40),
        "o": (80, 48),
        "gate": (48, 130),
        "up": (48, 130),
        "down": (130, 48),
    }
    with pytest.raises(KeyError):
        config.linear_shape("lm_head")


def test_rank_pattern():
    config = config_of("cross_layer", rank_pattern={r"layers\.1\.(gate|up)": 11, "down": 3, r".*2\.[qk]": 5, "1.v": 9})
    ranks = [[config.linear_rank(layer, position) for position in POSITIONS] for layer in range(3)]
    assert ranks == [
        [None] * 7,
        [7, 7, 9, 7, 11, 11, 3],
        [5, 5, 7, 7, 7, 7, 3],
    ]


@pytest.mark.parametrize("pattern", ["own", "dow", "layers", r"layers\.1", "2", "layer.1.q"])
def test_rank_pattern_matches_whole_names_only(pattern):
    """As in PEFT: the whole name, or its end after a dot. Anything else matches nothing, which is refused."""
    assert f"rank_pattern keys ['{pattern}'] match no low-rank linear" in refusal(rank_pattern={pattern: 3}).replace(
        "\\\\", "\\"
    )


def test_first_layer_rank():
    config = config_of("first_layer_rank")
    assert [config.linear_rank(0, position) for position in POSITIONS] == [5] * 7
    assert [config.linear_rank(1, position) for position in POSITIONS] == [7] * 7
    # rank_pattern speaks of the other layers
    assert config_of("first_layer_rank", rank_pattern={"q": 3}).linear_rank(0, "q") == 5
    low_rank = config_of("low_rank", rank_pattern={r"layers\.0\.q": 3})
    assert (low_rank.linear_rank(0, "q"), low_rank.linear_rank(0, "k")) == (3, 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rank": 49},
            "rank=49 of layers.1.q (48 x 48) saves nothing: its factors have fewer parameters than the matrix up to "
            "rank 23; change `rank`, `rank_pattern` or `first_layer_rank`.",
        ),
        ({"rank": 0}, "rank=0 of layers.1.q (48 x 48) is outside 1..23"),
        ({"rank": -3}, "rank=-3 of layers.1.q (48 x 48) is outside 1..23"),
        (
            {"rank": 20, "num_attention_heads": 6, "num_key_value_heads": 2},
            "rank=20 of layers.1.k (48 x 16) saves nothing: its factors have fewer parameters than the matrix up to "
            "rank 11",
        ),
        ({"rank_pattern": {r"layers\.2\.down": 64}}, "rank=64 of layers.2.down (130 x 48) saves nothing"),
        ({"first_layer_rank": 0}, "rank=0 of layers.0.q (48 x 48) is outside 1..23"),
        ({"factorization": "cola", "rank": 49}, "rank=49 of layers.0.q (48 x 48) saves nothing"),
        ({"rank": 7.5}, "'rank'"),
        ({"rank": "7"}, "'rank'"),
        ({"rank": True}, "'rank'"),
        ({"rank_pattern": {"q": 3.5}}, "'rank_pattern'"),
        (
            {"rank_pattern": {"query": 3, "down": 3}},
            "rank_pattern keys ['query'] match no low-rank linear; names are layers.N.position with N below "
            "3 and position one of q, k, v, o, gate, up, down.",
        ),
        ({"rank_pattern": {r"layers\.0\.q": 3}}, "match no low-rank linear"),
        ({"rank_pattern": {"q(": 3}}, "rank_pattern key 'q(' is not a regular expression: missing )"),
        (
            {"rank_pattern": {"q": 3, "2.q": 5}},
            "rank_pattern keys ['2.q', 'q'] give layers.2.q different ranks; make each linear match one.",
        ),
        (
            {"num_attention_heads": 5},
            "The hidden size (48) is not a multiple of the number of attention heads (5).",
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_key_value_heads=3 does not divide num_attention_heads=4.",
        ),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 does not divide num_attention_heads=3"),
        ({"num_key_value_heads": -3}, "num_key_value_heads=-3 does not divide num_attention_heads=3"),
        (
            {"factorization": "svd"},
            "Field 'factorization' expected one of ('cross_layer', 'low_rank', 'cola', 'dense'), got svd",
        ),
        (
            {"increment_activation": "relu"},
            "Field 'increment_activation' expected one of ('silu',), got relu",
        ),
        (
            {"increment_activation": "silu", "factorization": "cola"},
            "increment_activation='silu' belongs to factorization='cross_layer', not 'cola'; remove it.",
        ),
        ({"beta_epsilon": 0.0}, "beta_epsilon=0.0 must be above 0: it keeps b away from zero."),
        ({"beta_epsilon": -1e-6}, "beta_epsilon=-1e-06 must be above 0"),
        ({"low_rank_initializer_range": 0.0}, "low_rank_initializer_range=0.0 must be above 0."),
        ({"low_rank_initializer_range": "CoLA"}, "Field 'low_rank_initializer_range' with value 'CoLA'"),
        ({"beta_init": "1"}, "'beta_init'"),
        (
            {"recompute": "sometimes"},
            "recompute='sometimes' does not exist; allowed: none, invert, replay, reversible.",
        ),
        (
            {"recompute": "reversible", "factorization": "cola"},
            "recompute='reversible' belongs to factorization='cross_layer'; with 'cola' it would keep as much as "
            "'invert'. Choose one of none, invert, replay.",
        ),
        (
            {"recompute": "replay", "factorization": "dense"},
            "recompute='replay' needs low-rank linears to rebuild states from; factorization='dense' has none. Remove "
            "it; activation_checkpointing=True checkpoints whole layers there.",
        ),
        (
            {"carries": {"experts": False}},
            "carries names positions ['experts'] that the model has not; it has down, gate, k, o, q, up, v.",
        ),
        ({"recompute_interval": 4}, "recompute_interval=4 needs a policy that rebuilds states: choose recompute="),
        ({"recompute": "replay", "recompute_interval": 0}, "recompute_interval=0 is outside 1..3, the number of"),
        ({"recompute": "invert", "recompute_interval": 4}, "recompute_interval=4 is outside 1..3, the number of"),
        ({"recompute_error_bound": 0.0}, "recompute_error_bound=0.0 must be above 0."),
        ({"recompute_drift_bound": -1.0}, "recompute_drift_bound=-1.0 must be above 0."),
    ],
)
def test_refusals(fields, message):
    assert message in refusal(**fields)


def test_memory_policies():
    for policy in ("none", "invert", "replay", "reversible"):
        assert config_of("cross_layer", recompute=policy).recompute == policy
    config = config_of("cross_layer", recompute="reversible", recompute_interval=3, recompute_error_bound=1e-4)
    assert (config.recompute_interval, config.recompute_error_bound) == (3, 1e-4)


def test_the_policy_that_was_called_low_rank():
    with pytest.warns(FutureWarning, match="recompute='low_rank' is called 'invert' now"):
        config = config_of("cross_layer", recompute="low_rank")
    assert config.recompute == "invert"


def test_dense_ignores_ranks():
    """One set of fields can describe every factorization of a comparison."""
    config = config_of("dense", rank=1000, rank_pattern={"q": 3})
    assert config.linear_rank(1, "q") is None


def test_linear_gate():
    """CoLA's larger recipes drop the gate's own activation: hidden_act="linear"."""
    assert config_of("cola_recipe").hidden_act == "linear"


@pytest.mark.parametrize("case", [*CASES, *ROPE_CASES])
def test_round_trip(case, tmp_path):
    config = config_of(case) if case in CASES else CRNetConfig(**SHAPE, rope_parameters=ROPE_CASES[case])
    config.save_pretrained(tmp_path)
    again = CRNetConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    for layer in range(config.num_hidden_layers):
        for position in POSITIONS:
            assert again.linear_rank(layer, position) == config.linear_rank(layer, position)


def test_json_holds_every_field_of_our_own(tmp_path):
    CRNetConfig(**SHAPE).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "crnet"
    assert stored["factorization"] == "cross_layer"
    assert {"rank", "rank_pattern", "first_layer_rank", "increment_activation"} <= stored.keys()
    assert {"beta_init", "beta_epsilon", "beta_trainable", "recompute", "recompute_interval"} <= stored.keys()


def test_changes_are_checked_before_saving(tmp_path):
    config = config_of("cross_layer")
    config.rank = 49
    with pytest.raises(StrictDataclassError, match=r"rank=49 of layers\.1\.q "):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_configs_do_not_share_their_pattern():
    one, other = CRNetConfig(), CRNetConfig()
    one.rank_pattern["q"] = 3
    assert other.rank_pattern == {}
