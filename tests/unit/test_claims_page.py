"""docs/claims.md is what docs/make_claims.py makes of the result files, and every verdict follows from them."""

import copy
import re
import shlex
import string
import sys
from pathlib import Path

import pytest
from test_readme import parse  # noqa: F401  a fixture

from crosslayer.recipes import shipped_recipes

pytest.importorskip("scipy")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import make_claims  # noqa: E402
from claims import claim as kinds  # noqa: E402
from claims import crnet  # noqa: E402

sys.path.remove(str(ROOT / "docs"))

CLAIMS = {claim.measure.__name__ if claim.measure else claim.text: claim for claim in kinds.CLAIMS}
MEASURED = {name: claim for name, claim in CLAIMS.items() if claim.measure}
PROPER = (
    "LoR2C",
    "SST-2",
    "GPT-2",
    "Qwen3-MoE",
    "all-MiniLM-L6-v2",
    "LLaMA-2-7B",
    "LLaMA 1B",
    "float32",
    "float64",
    "bf16",
    "8-bit",
    "7B",
)


class Edited(kinds.Results):
    """The result files with some changed: {name: function of the content}, which may make one up."""

    def __init__(self, edits):
        super().__init__()
        self.edits = edits

    def load(self, name):
        found = super().load(name)
        return self.edits[name](copy.deepcopy(found)) if name in self.edits else found


# The page


def test_the_page_is_up_to_date():
    page = make_claims.PAGE.read_text(encoding="utf-8")
    assert page == make_claims.page(), "run: python docs/make_claims.py"
    assert page != make_claims.page(Edited({"kills.json": at("sections", "kills", "kills")(51)}))


def test_every_claim_is_a_row_of_its_own():
    assert len(CLAIMS) == len(kinds.CLAIMS)
    rows = [line for line in make_claims.page().splitlines() if re.search(r"`[^`]+` \|$", line)]
    assert len(rows) == len(kinds.CLAIMS)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)
    for claim in kinds.CLAIMS:
        assert bool(claim.cannot) is (claim.measure is None), claim.text
        assert claim.cannot or (claim.rule and claim.run and claim.result), claim.text


@pytest.mark.parametrize("command", sorted({claim.command for claim in kinds.CLAIMS}))
def test_commands_exist(parse, command):  # noqa: F811
    program, *arguments = shlex.split(command)
    if program == "crosslayer":
        assert parse(arguments) in (None, 0)
        return
    script = ROOT / arguments[0]
    text = script.read_text(encoding="utf-8")
    if "study_parser" in text:  # one command line for several studies
        text += (ROOT / "benchmarks" / "ablations.py").read_text(encoding="utf-8")
    assert program == "python"
    for option in (argument for argument in arguments[1:] if argument.startswith("--")):
        assert f'"{option}"' in text, option
    if "--methods" in arguments:
        assert f'"{arguments[-1]}": ' in text


@pytest.mark.parametrize("name", MEASURED)
def test_no_figure_is_typed(name):
    """Digits stand in placeholders, names of recipes and files, and names of things."""
    claim = CLAIMS[name]
    for template in (claim.run, claim.result):
        for quoted in re.findall(r"`(\w+)`", template):
            assert quoted in (*shipped_recipes(), "invert", "none"), quoted
        text = "".join(literal for literal, *_ in string.Formatter().parse(re.sub(r"`\w+`", "", template)))
        for proper in PROPER:
            text = text.replace(proper, "")
        assert not re.search(r"\d", text), text


def test_quotes_are_the_readmes():
    words = " ".join(kinds.README.split())
    quotes = [claim.quote for claim in kinds.CLAIMS if claim.quote]
    assert len(quotes) >= 8
    assert [quote for quote in quotes if quote not in words] == []


# Verdicts


def test_without_files_nothing_is_decided(tmp_path):
    empty = kinds.Results(tmp_path)
    verdicts = {name: claim.verdict(empty)[0] for name, claim in CLAIMS.items()}
    decided = {name for name, verdict in verdicts.items() if verdict in (kinds.HOLDS, kinds.FAILS)}
    assert decided == {"cost_of_1b", "cost_by_rank"}  # arithmetic
    assert set(verdicts.values()) == {kinds.HOLDS, kinds.CANNOT, kinds.OPEN}


def test_arithmetic_that_gives_something_else(monkeypatch):
    monkeypatch.setattr(crnet, "total", lambda shape: 1)
    for name in ("cost_of_1b", "cost_by_rank"):
        assert CLAIMS[name].verdict(kinds.Results())[0] == kinds.FAILS


def at(*keys):
    """at("a", "b")(value or function) -> an edit that sets or changes content["a"]["b"]."""

    def to(value):
        def edit(content):
            inner = content
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = value(inner[keys[-1]]) if callable(value) else value
            return content

        return edit

    return to


def plus(by):
    return lambda values: [value + by for value in values]


def times(by):
    return lambda value: value * by


def shifted(method, by):
    """Of all runs of lor2c_minilm.json."""

    def edit(content):
        if method == "lor2c_no_residual":
            others = [run for run in content["runs"] if run["method"] == "lor2c"]
            content["methods"][method] = content["methods"]["lor2c"]
            content["runs"] += [{**copy.deepcopy(run), "method": method} for run in others]
        for run in content["runs"]:
            if run["method"] == method:
                run["metrics"] = {name: value + by for name, value in run["metrics"].items()}
        return content

    return {"lor2c_minilm.json": edit}


def of_studies(method, by):
    return dict.fromkeys(crnet.STUDIES, at("methods", method, "losses")(plus(by)))


def ablation(name, losses):
    def section(of_contender):
        mean = None if None in of_contender else sum(of_contender) / 3
        result = {"losses": of_contender, "loss_mean": mean}
        model, sizes = {"hidden_size": 64}, {"parameters_without_embeddings": 7, "tokens": 140}
        return {"model": model, **sizes, "result": result}

    sections = {"CR-Net": section([4.0, 4.01, 4.02]), name: section(losses)}
    return {"ablations.json": lambda content: {"sections": sections}}


def ranks(losses):
    def section(rank, mean):
        model = {"rank": rank, "hidden_size": 100}
        return {"model": model, "rank_over_width": rank / 100, "tokens": 9, "losses": [mean, mean + 0.01, mean + 0.02]}

    sections = {f"rank {rank}": section(rank, loss) for rank, loss in zip((10, 30, 48), losses, strict=True)}
    return {"ablations.json": lambda content: {"sections": sections}}


def comparison(**perplexities):
    methods = {
        name: {"perplexity": p, "losses": [p, p + 0.01, p + 0.02], "parameters_without_embeddings": 5}
        for name, p in perplexities.items()
    }
    return lambda content: {**content, "methods": methods}


def ladder(ratios, mean=(1.0, 0.9, 1.1), doubling=(1.0, 0.9, 1.1), worse=0.0, tokens=20):
    """ladder.json of so many sizes; `worse`: CR-Net's loss over dense's."""

    def estimate(value, low=None, high=None):
        return {"value": value, "low": low, "high": high}

    def row(losses):
        return {"losses": losses, "parameters_without_embeddings": 5}

    sizes = {
        f"{64 * n}x6": {
            "dense_parameters": n * 1e6,
            "tokens": tokens * n * 1e6,
            "methods": {"dense": row([3.0, 3.01]), "crnet": row([3.0 + worse, 3.01 + worse])},
        }
        for n in range(1, len(ratios) + 1)
    }
    crnet = {
        "sizes": {name: {"ratio": estimate(ratio)} for name, ratio in zip(sizes, ratios, strict=True)},
        "mean": estimate(*mean) if len(ratios) > 1 else None,
        "doubling": estimate(*doubling) if len(ratios) > 1 else None,
    }
    return {"ladder.json": lambda _: {"sizes": sizes, "findings": {"ratios": {"crnet": crnet}}}}


def gradient(lor2c):
    content = {"gradient": {"lor2c": lor2c, "lora": [1.0, 1.0]}, "settings": {"rows": "8"}}
    return {"lor2c_gradients_24.json": lambda _: content, "lor2c_gradients.json": lambda _: content}


def gpu(speed):
    run = {"run": {"device": "a GPU"}}
    return {
        "gpu.json": lambda _: {
            "speed_over_dense": {"eager 1B 1024 crnet": speed},
            "sections": {"eager 1B 1024 crnet": run},
        }
    }


def gpu_targets(ratio):
    row = {"what": "eager 1B 1024 crnet, speed over dense", "measured": ratio, "at_least": 1.4, "holds": ratio >= 1.4}
    return {"gpu.json": lambda _: gpu(1.0)["gpu.json"](_) | {"targets": [row]}}


def starts(cola):
    """CoLA's losses from the norm of a dense matrix; from its own start 4.5, and plain low rank is better from ours."""
    found = {0.02: {"cola": cola, "low_rank": [4.0, 4.01, 4.02]}, "cola": dict.fromkeys(("cola", "low_rank"), HALF)}
    sections = {
        f"low_rank_initializer_range {value}": {"methods": {name: {"losses": x} for name, x in methods.items()}}
        for value, methods in found.items()
    }
    return {"starts.json": lambda _: {"sections": sections}}


def seven_billion(dense):
    tokens = {"crnet_invert r=512": 5, "cola r=512": 3, "dense": dense}
    sections = {
        name: {"tokens_per_micro_batch": n, "optimizer": "AdamW", "run": {"device": "a GPU"}}
        for name, n in tokens.items()
    }
    return {"seven_billion.json": lambda _: {"setting": {"cap_gib": 24}, "sections": sections}}


def closer(by):
    def edit(content):
        for linear in content["linears"]:
            error = linear["relative_error"]
            if "least_squares" in error:
                error["least_squares"] = [by * value for value in error["output"]]
        return content

    return dict.fromkeys(("spectra/dense_1m.json", "spectra/minilm.json"), edit)


SPEED = ("sections", "speed", "dtypes", "float32", "8", "crnet_invert", "step_over_none")
PEAK = ("sections", "peak", "layers", "24", "crnet_invert", "temporary")
SAVED = ("sections", "saved", "methods")
EIGHTH = at("sections", "interval", "errors", "mixed, b=0.5", "8")
CHOICE = ("choices", "middle_high", "losses"), ("choices", "suggested", "losses")
HALF = [4.5, 4.51, 4.52]
WORSE, BETTER, DIVERGED = [5.0, 5.01, 5.02], [3.0, 3.01, 3.02], [5.0, None, 5.0]


def grid_cell(by):
    def edit(content):
        cell = next(c for c in content["cells"] if (c["fuses"], c["injections"]) == (1, 3))
        cell["metrics"]["accuracy"] += by
        return content

    return {"lor2c_grid.json": edit}


def lora_of(by):
    def edit(content):
        for run in content["runs"]:
            if run["method"] == "lora_same_r":
                run["trained"]["adapter"] *= by
        return content

    return {"lor2c_minilm.json": edit}


CASES = {  # claim: (files with which it holds, files with which it does not)
    "dense_perplexity": (of_studies("crnet", -1), of_studies("crnet", 1)),
    "cola_perplexity": (of_studies("crnet", -1), of_studies("crnet", 1)),
    "plain_low_rank": (of_studies("crnet", -1), of_studies("crnet", 1)),
    "plain_adam": ({}, {"compare_1m.json": at("methods", "crnet", "losses")([4.4, None, 4.4])}),
    "dense_perplexity_after_long": (ladder([1.0, 1.0]), ladder([1.0, 1.0], worse=1.0)),
    "as_models_grow": (ladder([1.3, 1.01]), ladder([1.0, 1.03])),
    "optimizer_methods": tuple(
        {"compare_1m_optimizers.json": comparison(crnet=2.0, galore=3.0, apollo=apollo)} for apollo in (3.0, 1.0)
    ),
    "faster_than_cola": tuple(
        {"throughput_cpu.json": at("contenders", "CR-Net", "tokens_per_s")(speed)} for speed in (1e4, 1.0)
    ),
    "activation_memory": tuple({"memory_cpu.json": at(*PEAK)(size)} for size in (-220_000_000, 1e9)),
    "recomputation": tuple({"memory_cpu.json": at(*SPEED)(over)} for over in (1.01, 1.4)),
    "inversion": ({"memory_cpu.json": EIGHTH(1e-9)}, {"memory_cpu.json": EIGHTH(1.0)}),
    "learnable_b": (ablation("b = 1, fixed", WORSE), ablation("b = 1, fixed", BETTER)),
    "carried_term": (ablation("no carried term", DIVERGED), ablation("no carried term", BETTER)),
    "first_layer": (ablation("low-rank first layer", WORSE), ablation("low-rank first layer", BETTER)),
    "first_layer_at_equal_parameters": tuple(
        {"first_layer.json": at("sections", "the norm of a dense start", "losses")(found)} for found in (WORSE, BETTER)
    ),
    "rank_profile_after_long": tuple(ablation("ranks middle high, ends low", found) for found in (BETTER, DIVERGED)),
    "rank_profile": tuple({"rank_suggestion.json": at(*CHOICE[0])(plus(by))} for by in (-1, 1)),
    "enough_rank": (ranks([5.0, 4.0, 4.0]), ranks([5.0, 4.0, 3.0])),
    "low_rank_differences": (closer(0.9), closer(1.1)),
    "families": tuple(
        {"families.json": at("summary", "moe", "the mixture carries", "perplexity")(p)} for p in (99, 200)
    ),
    "half_of_lora": ({}, lora_of(2)),
    "as_good_as_lora": (shifted("lor2c", 0.5), shifted("lor2c", -0.5)),
    "better_at_equal_parameters": (shifted("lor2c", 0.5), shifted("lor2c", -0.5)),
    "share": (shifted("sharelor2c", -0.5), shifted("sharelor2c", 0.5)),
    "merge": (shifted("mergelor2c", 0.5), shifted("mergelor2c", -0.5)),
    "inject": (shifted("injectlor2c", 0.5), shifted("injectlor2c", -0.5)),
    "imlor2c": (shifted("imlor2c", 0.5), shifted("imlor2c", -0.5)),
    "grid": (grid_cell(0.5), grid_cell(-0.5)),
    "gradients": (gradient([2.0, 1.0]), gradient([1.0, 2.0])),
    "gradients_of_24": (gradient([2.0, 1.0]), gradient([0.9, 0.5])),
    "on_images": ({"lor2c_vision.json": at("sections", "lor2c", "accuracies")([0.88, 0.87, 0.89])}, {}),
    "residual": (shifted("lor2c_no_residual", -0.5), shifted("lor2c_no_residual", 0.5)),
    "table_of_readme": ({}, {"compare_2m.json": at("methods", "crnet", "perplexity")(times(1.1))}),
    "faster_than_llama": ({}, {"throughput_cpu.json": at("contenders", "CR-Net", "speed_over_llama")(1.5)}),
    "time_saved": ({}, {"compare_1m.json": at("methods", "crnet", "seconds")(times(2))}),
    "activations": ({}, {"memory_cpu.json": at(*SAVED, "crnet", "growth_h")(20.0)}),
    "invert": tuple({"memory_cpu.json": at(*SPEED)(over)} for over in (1.01, 1.4)),
    "reversible": ({}, {"memory_cpu.json": at(*SAVED, "crnet_reversible_whole", "growth_h")(1.0)}),
    "resumed": ({}, {"kills.json": at("sections", "kills", "runs")([{"differences": ["final loss"]}])}),
    "suggested_ranks": tuple({"rank_suggestion.json": at(*CHOICE[1])(plus(by))} for by in (-1, 1)),
    "half_of_the_layers": (
        {},
        {"compare_2m.json": at("methods", "crnet", "parameters_without_embeddings")(times(1.5))},
    ),
    "decoding": tuple(
        {"generation_cpu.json": at("generation", "crnet", "decode", "speed_over_llama")(speed)} for speed in (1.2, 0.8)
    ),
    "cost_of_lor2c": ({}, {"lor2c_cost.json": at("rows", 0, "time_ratio")(1.1)}),
    "on_a_gpu": (gpu(1.2), gpu(0.9)),
    "start_of_factors": (starts([4.0, 4.01, 4.02]), starts([5.0, 5.01, 5.02])),
    "gpu_targets": (gpu_targets(1.5), gpu_targets(1.3)),
    "seven_billion": (seven_billion(0), seven_billion(4)),
}


def test_every_rule_has_its_cases():
    assert CASES.keys() == MEASURED.keys() - {"cost_of_1b", "cost_by_rank"}


@pytest.mark.parametrize("name", CASES)
def test_verdicts_follow_from_the_files(name):
    cells = {}
    for wanted, edits in zip((kinds.HOLDS, kinds.FAILS), CASES[name], strict=True):
        verdict, _, cells[wanted] = CLAIMS[name].verdict(Edited(edits))
        assert verdict == wanted
    assert cells[kinds.HOLDS] != cells[kinds.FAILS]


def test_claims_about_the_ladder():
    long, growing = CLAIMS["dense_perplexity_after_long"], CLAIMS["as_models_grow"]
    for claim, files, wanted in (
        (long, ladder([1.0, 1.0], mean=(1.02, 1.01, 1.03)), kinds.FAILS),
        (long, ladder([1.0, 1.0], mean=(1.02, None, None)), kinds.HOLDS),  # with no interval
        (long, ladder([1.0, 1.0], worse=-1.0), kinds.HOLDS),
        (long, ladder([1.0, 1.0], tokens=5), kinds.OPEN),
        (long, ladder([1.0], worse=1.0), kinds.FAILS),  # one size: no mean, but two seeds
        (long, ablation("dense", WORSE), kinds.HOLDS),
        (long, ablation("dense", BETTER), kinds.FAILS),
        (long, ladder([1.0, 1.0]) | ablation("dense", BETTER), kinds.FAILS),
        (growing, ladder([0.9, 1.01], doubling=(1.1, 1.05, 1.2)), kinds.FAILS),
        (growing, ladder([1.0]), kinds.OPEN),
    ):
        results = Edited(files)
        assert claim.verdict(results)[0] == wanted
        assert {*results.read} <= files.keys()


def test_level_is_neither_higher_nor_lower():
    assert kinds.compare([4.0, 4.1, 4.2], [4.01, 4.12, 4.19]) == 0
    assert kinds.compare([4.0, 4.01, 4.02], [4.1, 4.11, 4.12]) == -1
    assert kinds.compare([4.1, 4.11, 4.12], [4.0, 4.01, 4.02]) == 1
    assert kinds.compare([4.1, None, 4.12], [9.0, 9.01, 9.02]) == 1
    assert kinds.losses([4.0, None, 5.0]) == "4.5000 ± 0.7071, 1 of 3 diverged"
