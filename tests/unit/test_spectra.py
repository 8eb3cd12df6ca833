"""Cross-layer spectra: streamed Gram matrices against a direct SVD in float64, positions, ranks, refusals."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig

from crosslayer.analysis import find_positions, measure_spectra, suggest_ranks
from crosslayer.analysis.gram import SymmetricGram, gram_size
from crosslayer.analysis.ranks import continue_power_law
from crosslayer.analysis.spectra import plan_passes
from crosslayer.analysis.summary import compare, finding, summarise
from crosslayer.crnet import CRNetConfig, crnet_config
from crosslayer.errors import ConfigError

SHAPE = {
    "hidden_size": 24,
    "intermediate_size": 130,  # more than one panel of a Gram matrix
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "llama": LlamaConfig(num_key_value_heads=2, **SHAPE),
    "bert": BertConfig(**SHAPE),
    "gpt2": GPT2Config(n_embd=24, n_layer=3, n_head=4, n_positions=32, vocab_size=64, bos_token_id=0, eos_token_id=0),
    "crnet": CRNetConfig(rank=6, **SHAPE),
}
NAMES = {
    "llama": ["q", "k", "v", "o", "gate", "up", "down"],
    "bert": ["q", "k", "v", "o", "up", "down"],
    "gpt2": ["qkv", "o", "up", "down"],
    "crnet": ["q", "k", "v", "o", "gate", "up", "down"],
}


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[name]).to(dtype).eval()
    for key, parameter in model.named_parameters():
        if key.endswith(".B.weight"):  # zero at the start
            nn.init.normal_(parameter, std=0.3)
        if key.endswith(".beta"):
            nn.init.uniform_(parameter, 0.6, 1.2)
    return model


def build_batches():
    """Two batches; the second is padded: 3 rows of 20 tokens, one of which ends after 9."""
    ids = torch.randint(0, 64, (7, 20))
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, 9:] = 0
    return [{"input_ids": ids[:4]}, {"input_ids": ids[4:], "attention_mask": mask}]


def outputs_of(model, batches):
    """{(position, layer): Y [tokens, F]}, kept whole: what the streamed way never does."""
    kept = {}
    current = {}

    def keep(key):
        def hook(module, arguments, output):
            mask = current["batch"].get("attention_mask", torch.ones_like(current["batch"]["input_ids"]))
            rows = output.detach().reshape(-1, output.shape[-1])[mask.flatten().bool()]
            kept.setdefault(key, []).append(rows.double())

        return hook

    hooks = [
        linear.module.register_forward_hook(keep((position.name, layer)))
        for position in find_positions(model)
        for layer, linear in enumerate(position.linears)
    ]
    with torch.no_grad():
        for batch in batches:
            current["batch"] = batch
            model(**batch)
    for handle in hooks:
        handle.remove()
    return {key: torch.cat(rows) for key, rows in kept.items()}


def direct_squares(Y):
    values = torch.linalg.svdvals(Y)
    return torch.nn.functional.pad(values, (0, Y.shape[1] - len(values))) ** 2


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("gram_bytes", [None, 1], ids=["one pass", "one Gram a pass"])
def test_against_a_direct_svd(name, gram_bytes):
    model, batches = build(name), build_batches()
    spectra = measure_spectra(model, batches, gram_bytes=gram_bytes)
    outputs = outputs_of(model, batches)
    assert [position.name for position in spectra.positions] == NAMES[name]
    assert len(spectra.linears) == 3 * len(NAMES[name])
    assert spectra.tokens == 129
    assert spectra.passes == (1 if gram_bytes is None else len(spectra.linears))
    for found in spectra.linears:
        Y = outputs[found.position, found.layer]
        energy = float((Y**2).sum())
        expected = {"output": direct_squares(Y)}
        if found.layer:
            below = outputs[found.position, found.layer - 1]
            inner, energy_below = float((Y * below).sum()), float((below**2).sum())
            assert found.b0 == pytest.approx(inner / energy_below, abs=1e-12)
            assert found.cosine == pytest.approx(inner / math.sqrt(energy * energy_below), abs=1e-12)
            cosines = nn.functional.cosine_similarity(Y, below, dim=-1)
            assert found.token_cosine == pytest.approx(float(cosines.mean()), abs=1e-12)
            expected["least_squares"] = direct_squares(Y - found.b0 * below)
            expected["unit"] = direct_squares(Y - below)
            if name == "crnet":
                expected["learned"] = direct_squares(Y - found.b * below)
        assert found.squares.keys() == expected.keys()
        for kind, squares in expected.items():
            assert (found.squares[kind] - squares).abs().max() < 1e-12 * energy
            for rank in (1, 6, 11):
                error = math.sqrt(squares[rank:].sum() / energy)
                assert found.relative_error(kind, rank) == pytest.approx(error, abs=1e-6)
                assert float(found.relative_errors(kind)[rank]) == pytest.approx(error, abs=1e-6)


def test_the_check_can_fail():
    """Another b0, or a token that should not count, is far outside the bounds above."""
    model, batches = build("llama"), build_batches()
    outputs = outputs_of(model, batches)
    Y, below = outputs["q", 1], outputs["q", 0]
    spectra = measure_spectra(model, batches)
    energy = float((Y**2).sum())
    wrong = direct_squares(Y - (spectra.at(1, "q").b0 + 0.01) * below)
    assert (spectra.at(1, "q").squares["least_squares"] - wrong).abs().max() > 1e-8 * energy
    unmasked = [{"input_ids": batch["input_ids"]} for batch in batches]
    other = measure_spectra(model, unmasked).at(1, "q").squares["output"]
    assert (spectra.at(1, "q").squares["output"] - other).abs().max() > 1e-3 * energy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_products_are_enough(dtype):
    """Weights in lower precision; the sums lose about 1e-7 of the energy, 3e-4 of an error."""
    model, batches = build("llama", dtype), build_batches()
    outputs = outputs_of(model, batches)
    for found in measure_spectra(model, batches).linears:
        Y = outputs[found.position, found.layer]
        squares = direct_squares(Y)
        assert (found.squares["output"] - squares).abs().max() < 1e-6 * squares.sum()
        error = math.sqrt(squares[8:].sum() / squares.sum())
        assert found.relative_error("output", 8) == pytest.approx(error, abs=1e-3)


def test_a_crnet_has_its_rank():
    """Y_l - b Y_{l-1} = X A B has rank r, and the spectra say so."""
    spectra = measure_spectra(build("crnet"), build_batches())
    for found in spectra.linears:
        if found.layer:
            assert found.rank == 6
            assert found.relative_error("learned", 6) < 1e-6
            assert found.relative_error("learned", 5) > 1e-3
            assert found.energy_rank("learned", 1 - 1e-12) == 6


def test_ranks_of_known_matrices():
    """Three equal singular values: every measure of rank is 3."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.fc1(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, input_ids):
            x = torch.eye(8, dtype=torch.float64)[input_ids]
            for layer in self.layers:
                layer(x)

    model = Model().double()
    with torch.no_grad():
        for layer, factor in zip(model.layers, (1.0, 2.0), strict=True):
            layer.fc1.weight.copy_(factor * torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0])))
    spectra = measure_spectra(model, [{"input_ids": torch.arange(8).repeat(4, 1)}], ranks=[1, 2, 3])
    found = spectra.at(1, "up")
    for value in (found.stable_rank("output"), found.effective_rank("output"), found.energy_rank("output", 0.9)):
        assert value == pytest.approx(3)
    assert (found.b0, found.cosine) == pytest.approx((2.0, 1.0))
    assert found.relative_error("least_squares", 1) == pytest.approx(0, abs=1e-7)
    assert found.relative_error("output", 2) == pytest.approx(math.sqrt(1 / 3))
    assert found.stable_rank("least_squares") == 0
    assert found.effective_rank("least_squares") == 0


@pytest.mark.parametrize("width", [1, 5, 128, 129, 1000, 1025])
def test_symmetric_gram(width):
    gram = SymmetricGram(width)
    full, expected = torch.zeros(width, width, dtype=torch.float64), 0
    for tokens in (3, 7):
        Y = torch.randn(tokens, width, dtype=torch.float64)
        gram.add(Y)
        expected = expected + Y.t() @ Y
    gram.add_to(full, 2.0)
    torch.testing.assert_close(full.tril(), 2 * expected.tril())
    assert gram.trace() == pytest.approx(float(expected.trace()))
    assert gram_size(width) == sum(panel.nbytes for panel in gram.panels)


def test_passes_fit_and_cover_everything():
    positions = find_positions(build("llama"))
    limit = 6 * gram_size(130)
    passes = plan_passes(positions, limit)
    items = [(position.name, layer) for one in passes for position, layer in one]
    assert sorted(items) == sorted((p.name, layer) for p in positions for layer in range(3))
    assert 1 < len(passes) < len(items)
    for one in passes:
        first = one[0][1] > 0  # the layer below is carried over from the pass before
        size = sum(gram_size(p.linears[layer].out_features) * (1 + p.is_paired(layer)) for p, layer in one)
        assert size + first * gram_size(one[0][0].linears[0].out_features) <= limit


def test_nothing_outlives_a_batch():
    """The model is left as it was: no hooks, its own mode."""
    model = build("llama").train()
    measure_spectra(model, build_batches())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_only_some_positions():
    spectra = measure_spectra(build("llama"), build_batches(), only=["down", "q"])
    assert [position.name for position in spectra.positions] == ["q", "down"]
    with pytest.raises(ConfigError, match="'qq' is not one of this model's; it has q, k, v, o, gate, up, down"):
        measure_spectra(build("llama"), build_batches(), only=["qq"])


def test_adapters_do_not_hide_a_position():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama", torch.float32), LoraConfig(target_modules=["q_proj"]))
    assert [position.name for position in find_positions(model)] == NAMES["llama"]
    assert type(find_positions(model)[0].linears[0].module).__name__ == "Linear"
    assert hasattr(find_positions(model)[0].linears[0].module, "lora_A")


def test_names_that_nobody_gave():
    """The general rule: equal relative names, equal widths, consecutive blocks."""
    blocks = nn.ModuleList(nn.ModuleDict({"mix": nn.Linear(4, 6), "odd": nn.Linear(4, 6 + i)}) for i in range(3))
    positions = find_positions(nn.ModuleDict({"few": nn.ModuleList([nn.Linear(2, 2)] * 2), "many": blocks}))
    assert [(p.name, p.width) for p in positions] == [("mix", 6)]


@pytest.mark.parametrize(
    "model",
    [nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 5)]), nn.ModuleList([nn.ReLU(), nn.ReLU()])],
    ids=["no blocks", "one block", "no linears"],
)
def test_no_positions(model):
    with pytest.raises(ConfigError, match="no recognisable linear positions"):
        find_positions(model)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([1000], "rank 1000 is outside 1..130, the widest output"),
        ([0], "rank 0 is outside"),
        ([], "outside"),
        ([130], "129 tokens span at most rank 129, and rank 130 is asked for"),
    ],
)
def test_ranks_out_of_reach(ranks, message):
    with pytest.raises(ConfigError, match=message):
        measure_spectra(build("llama"), build_batches(), ranks=ranks)


# Ranks


@pytest.fixture(scope="module")
def crnet_spectra():
    torch.manual_seed(0)
    return measure_spectra(build("crnet"), build_batches())


def cost(spectra, ranks):
    widths = {(x.layer, x.position): x.in_features + x.width for x in spectra.linears}
    return sum(rank * widths[name] for name, rank in ranks.items())


@pytest.mark.parametrize("budget", [None, 5_000, 20_000])
def test_suggested_ranks_keep_the_budget(crnet_spectra, budget):
    suggested = suggest_ranks(crnet_spectra, budget, multiple=2)
    assert cost(crnet_spectra, suggested.ranks) == suggested.parameters <= suggested.budget
    assert suggested.budget - suggested.parameters < 2 * (24 + 130)  # no step is left that would fit everywhere
    assert suggested.budget == (budget or 6 * sum(x.in_features + x.width for x in crnet_spectra.linears if x.layer))
    assert all(rank % 2 == 0 and rank >= 2 for rank in suggested.ranks.values())
    assert suggested.basis == "learned"
    config = CRNetConfig(rank_pattern=suggested.rank_pattern, **SHAPE)
    for (layer, position), rank in suggested.ranks.items():
        assert config.linear_rank(layer, position) == rank


def test_greedy_is_the_best_choice():
    """Against every choice of ranks, on two positions of a dense model."""
    from itertools import product

    spectra = measure_spectra(build("llama"), build_batches(), only=["q", "k"])
    linears = [x for x in spectra.linears if x.layer]
    budget = 7 * sum(x.in_features + x.width for x in linears)
    suggested = suggest_ranks(spectra, budget, multiple=2)

    def error(ranks):
        return sum(x.relative_error("least_squares", r) ** 2 for x, r in zip(linears, ranks, strict=True))

    choices = product(*(range(2, x.in_features * x.width // (x.in_features + x.width) + 1, 2) for x in linears))
    names = [(x.layer, x.position) for x in linears]
    best = min(error(c) for c in choices if cost(spectra, dict(zip(names, c, strict=True))) <= suggested.parameters)
    assert error([suggested.ranks[name] for name in names]) == pytest.approx(best)
    assert suggested.basis == "least_squares"


def test_flat_spectra_take_more_than_steep_ones():
    spectra = measure_spectra(build("llama"), build_batches(), only=["q", "o"])
    for found in spectra.linears:
        falls = 0.3 if found.position == "q" else 0.9
        found.squares["least_squares"] = found.energy * falls ** torch.arange(24, dtype=torch.float64)
    ranks = suggest_ranks(spectra, 4 * 8 * 48, multiple=1).ranks
    assert ranks[1, "o"] > 2 * ranks[1, "q"]


def test_budget_too_small(crnet_spectra):
    least = 2 * sum(x.in_features + x.width for x in crnet_spectra.linears if x.layer)
    with pytest.raises(ConfigError, match=f"is too small: rank 2 in all 14 linears .* takes {least}; give at least"):
        suggest_ranks(crnet_spectra, least - 1, multiple=2)
    assert set(suggest_ranks(crnet_spectra, least, multiple=2).ranks.values()) == {2}


def test_power_law_goes_on():
    squares = torch.arange(1, 41, dtype=torch.float64) ** -1.5
    cut = squares.clone()
    cut[16:] = 0
    torch.testing.assert_close(continue_power_law(cut, 16), squares)
    assert continue_power_law(torch.zeros(8, dtype=torch.float64), 4).sum() == 0


# Words


def test_summary_says_what_was_found(crnet_spectra):
    words = summarise(crnet_spectra, {"model": "tiny", "text": "noise"}, suggest_ranks(crnet_spectra))
    for part in (
        "# Cross-layer spectra of tiny",
        "## Finding",
        "low rank by construction",
        "rank_pattern: {",
        "Careful",
    ):
        assert part in words


@pytest.mark.parametrize(("factor", "verdict"), [(0.5, "Yes:"), (0.95, "A little:"), (1.0, "No:"), (1.5, "harder")])
def test_the_verdict_follows_the_ratio(factor, verdict):
    spectra = measure_spectra(build("llama"), build_batches())
    for found in spectra.linears:
        if found.layer:
            found.squares["least_squares"] = factor**2 * found.squares["output"]
    assert verdict in finding(spectra)


def test_comparison_wants_one_shape(crnet_spectra):
    what = {"before": "a", "after": "b"}
    assert "## What changed" in compare(crnet_spectra, crnet_spectra, what)
    other = measure_spectra(build("bert"), build_batches())
    with pytest.raises(ConfigError, match="a and b cannot be compared"):
        compare(crnet_spectra, other, what)


def test_a_suggested_rank_saves_something():
    """Keys of 4 columns: a rank of 4 in 24 x 4 would have more parameters than the matrix."""
    torch.manual_seed(0)
    shape = {**SHAPE, "num_attention_heads": 6, "num_key_value_heads": 1}
    spectra = measure_spectra(AutoModel.from_config(LlamaConfig(**shape)).double().eval(), build_batches())
    suggested = suggest_ranks(spectra, 40_000)
    assert suggested.ranks[1, "k"] == 3
    CRNetConfig(rank_pattern=suggested.rank_pattern, **shape)
    with pytest.raises(ConfigError, match=r"rank_multiple=4 saves nothing in layers.1.k, 24 x 4: give at most 3"):
        suggest_ranks(spectra, multiple=4)


def test_positions_have_the_names_of_the_configuration():
    """DeepSeek's latent attention: names that no table of usual ones has, as `rank_pattern` wants them."""
    latent = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6}
    config = crnet_config(
        {
            "model_type": "deepseek_v3",
            **SHAPE,
            **latent,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 3,
            "rank": 4,
        }
    )
    names = [position.name for position in find_positions(AutoModel.from_config(config))]
    assert names == ["q_a", "q_b", "kv_a", "kv_b", "o", "gate", "up", "down"]
