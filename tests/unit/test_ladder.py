"""`crosslayer compare --sizes`: shapes and budgets, what is fitted to known laws, the files, resuming, wrong input."""

import importlib
import json
import math
import sys

import pytest
import yaml

from crosslayer.accounting import count_parameters, dense_counterpart
from crosslayer.cli import main
from crosslayer.compare import (
    LadderOptions,
    Options,
    Size,
    compare,
    compare_sizes,
    for_each,
    parse_sizes,
    recipe_of_size,
    with_budget,
)
from crosslayer.compare.ladder_findings import findings_of
from crosslayer.compare.ladder_report import draw_ladder, markdown_ladder
from crosslayer.compare.options import label_of
from crosslayer.errors import CheckpointError, ConfigError, TrainingError
from crosslayer.train import build_recipe, load_recipe
from crosslayer.train.run import build_model_config
from tiny_run import tiny_content, tiny_recipe

# Sizes and budgets


def test_sizes_are_read():
    assert parse_sizes("64x6, 96X9") == (Size(64, 6), Size(96, 9))
    assert [str(size) for size in parse_sizes("64x6,96x9")] == ["64x6", "96x9"]


@pytest.mark.parametrize("wrong", ["", "64", "64x", "x6", "64x6,", "64x6x2", "-64x6", "0x6", "64x0", "64.5x6", "6²x2"])
def test_wrong_sizes(wrong):
    with pytest.raises(ConfigError, match="is not HIDDENxLAYERS; write 64x6,96x9"):
        parse_sizes(wrong)


def test_one_number_or_one_for_each_size():
    sizes = parse_sizes("64x6,96x9,128x13")
    assert for_each("seeds", [2], sizes) == [2, 2, 2]
    assert for_each("seeds", [2, 1, 2], sizes) == [2, 1, 2]
    assert for_each("seeds", [2], ()) == [2]
    with pytest.raises(ConfigError, match="seeds='2,1' are 2 numbers for 3 sizes; give one or 3"):
        for_each("seeds", [2, 1], sizes)
    with pytest.raises(ConfigError, match="seeds='2,1' are 2 numbers for 0 sizes; give one, or --sizes"):
        for_each("seeds", [2, 1], ())


def test_a_size_has_the_proportions_of_the_recipe():
    base = load_recipe("crnet_1m_text")
    for size, heads, rank, intermediate in (
        (Size(64, 6), 2, 16, 172),
        (Size(96, 9), 3, 24, 258),
        (Size(192, 13), 6, 48, 516),
    ):
        model = recipe_of_size(base, size).model
        assert (model["hidden_size"], model["num_hidden_layers"]) == (size.hidden_size, size.num_hidden_layers)
        assert (model["num_attention_heads"], model["num_key_value_heads"], model["rank"]) == (heads, heads, rank)
        assert model["intermediate_size"] % 4 == 0
        assert abs(model["intermediate_size"] - intermediate) <= 2
    assert recipe_of_size(base, Size(128, 6)).model.items() >= base.model.items()
    base.model |= {"rank": None, "num_key_value_heads": 2, "first_layer_rank": 16}
    model = recipe_of_size(base, Size(64, 6)).model
    assert (model["rank"], model["num_key_value_heads"], model["first_layer_rank"]) == (None, 1, 8)


@pytest.mark.parametrize(
    ("size", "model", "message"),
    [
        (Size(100, 6), {}, "hidden 100 of 100x6 is no multiple of 32, .*; give 96x6 or 128x6"),
        (Size(16, 2), {}, "hidden 16 of 16x2 is no multiple of 32, .*; give 32x2"),
        (Size(96, 6), {"rank": 30}, "no multiple of 64"),
        (Size(64, 6), {"rank_pattern": {"layers.1.q": 8}}, r"model\.rank_pattern of the recipe belongs to one shape"),
        (Size(64, 6), {"base": {"model_type": "qwen3"}}, r"model\.base of the recipe belongs to one shape"),
    ],
)
def test_sizes_that_the_recipe_does_not_have(size, model, message):
    base = load_recipe("crnet_1m_text")
    base.model |= model
    with pytest.raises(ConfigError, match=message):
        recipe_of_size(base, size)


def test_a_budget_sets_the_steps_and_scales_the_rest(tmp_path):
    base = tiny_recipe(tmp_path, max_steps=12, warmup_steps=2, logging_steps=2, save_steps=4, eval_steps=6)
    counts = count_parameters(dense_counterpart(build_model_config(base)))
    dense = sum(counts.values()) - counts["embeddings"] - counts["head"]
    training = with_budget(base, 2).training
    assert training["max_steps"] == round(2 * dense / (4 * 32))
    assert training["warmup_steps"] == round(2 * training["max_steps"] / 12)
    assert training["logging_steps"] == round(2 * training["max_steps"] / 12)
    assert training["save_steps"] % training["logging_steps"] == 0
    assert training["eval_steps"] == pytest.approx(training["max_steps"] / 2, abs=training["logging_steps"])
    twice = with_budget(tiny_recipe(tmp_path, gradient_accumulation_steps=2), 2).training["max_steps"]
    assert twice == pytest.approx(training["max_steps"] / 2, abs=1)
    base.training["warmup_steps"] = 0.1
    assert with_budget(base, 2).training["warmup_steps"] == 0.1  # a share
    with pytest.raises(ConfigError, match=r"tokens_per_parameter=0\.001 is less than half a step of 128 tokens"):
        with_budget(base, 0.001)
    del base.training["max_steps"]
    with pytest.raises(ConfigError, match=r"logging_steps=2 is a share of no max_steps; give a share such as 0\.1"):
        with_budget(base, 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens_per_parameter": 0}, "tokens_per_parameter=0 must be a number above 0"),
        ({"sizes": (Size(64, 6),) * 2}, "sizes='64x6,64x6' must be two or more, each given once"),
        ({"sizes": (Size(64, 6),)}, "sizes='64x6' must be two or more"),
        ({"comparisons": (Options(),)}, "1 comparisons are given for 2 sizes"),
        ({"comparisons": (Options(), Options(methods=("crnet",)))}, "the methods differ from size to size"),
    ],
)
def test_wrong_options(wrong, message):
    right = {"sizes": parse_sizes("64x6,96x9"), "tokens_per_parameter": 20, "comparisons": (Options(), Options())}
    with pytest.raises(ConfigError, match=message):
        LadderOptions(**{**right, **wrong})


# What is fitted

SIZES = {"64x6": 0.3e6, "96x9": 1e6, "128x13": 2.6e6, "192x13": 5.8e6}


def ladder_of(laws, sizes=SIZES, seeds=1):
    """Rungs in which method -> (law of the dense parameters, own over dense parameters) holds exactly.

    FLOPs a token are ten times the own parameters, bytes twenty times them.
    """
    rungs = {}
    for name, count in sizes.items():
        methods = {}
        for method, (law, share) in laws.items():
            losses = [law(count)] * seeds
            known = None not in losses
            methods[method] = {
                "label": label_of(method),
                "losses": losses,
                "loss_mean": losses[0],
                "loss_stdev": 0.0 if known and seeds > 1 else None,
                "parameters_without_embeddings": share * count,
                "flops_per_token": 10 * share * count,
                "peak_memory_bytes": {"weights": 15 * share * count, "rest": 5 * share * count},
                "seconds": 1.0,
                "curves": [[]] * seeds,
            }
        rungs[name] = {"dense_parameters": count, "tokens": 20 * count, "epochs": 1.0, "methods": methods}
    return rungs


def power(a, b):
    return lambda size: a * size**-b


def test_laws_and_what_a_unit_buys():
    """CR-Net reaches the loss of a dense model of 1.2 times the size with half of its parameters."""
    rungs = ladder_of({"dense": (power(9.0, 0.08), 1.0), "crnet": (lambda size: 9.0 * (1.2 * size) ** -0.08, 0.5)})
    found = findings_of(rungs)
    for axis, exponent in (("size", 0.08), ("parameters", 0.08), ("flops", 0.04), ("bytes", 0.08)):
        for method in ("dense", "crnet"):
            assert found["laws"][axis][method]["b"]["value"] == pytest.approx(exponent)
            assert found["laws"][axis][method]["dof"] == 2
    assert found["laws"]["size"]["dense"]["a"]["value"] == pytest.approx(9.0)
    bought = found["bought"]["crnet"]
    for name in (*SIZES, "all sizes"):
        assert bought["parameters"][name]["times"]["value"] == pytest.approx(1.2 / 0.5)
        assert bought["bytes"][name]["times"]["value"] == pytest.approx(1.2 / 0.5)
        assert bought["flops"][name]["times"]["value"] == pytest.approx(1.2**2 / 0.5)  # tokens grow with the size
    beyond = {name: bought["parameters"][name]["is_extrapolated"] for name in SIZES}
    assert beyond == {"64x6": False, "96x9": False, "128x13": False, "192x13": True}
    text = markdown_ladder({"findings": found, "sizes": rungs, "options": {"sizes": [*SIZES]}})
    assert "| 2.400 (2.400 to 2.400) | 2.400 (2.400 to 2.400) (extrapolated) |" in text
    assert found["irreducible"] == {}


def test_where_laws_cross():
    meet = 2e6
    better = {"dense": (power(9.0, 0.08), 1.0), "crnet": (power(9.0 * meet**-0.02, 0.06), 0.5)}
    size, flops = findings_of(ladder_of(better))["crossings"]
    assert (size["methods"], size["axis"], size["ahead"]) == (("dense", "crnet"), "size", ("crnet", "dense"))
    assert size["at"]["value"] == pytest.approx(meet)
    # dense: 9 (C / 200)^-0.04; CR-Net: 9 meet^-0.02 (C / 100)^-0.03
    there = 200**4 / 100**3 * meet**2
    assert flops["axis"] == "flops"
    ends = [200 * count**2 for count in (min(SIZES.values()), max(SIZES.values()))]
    assert (flops["at"] is not None) is (ends[0] <= there <= ends[1] / 2)
    if flops["at"] is not None:
        assert flops["at"]["value"] == pytest.approx(there)
    apart = findings_of(ladder_of(better | {"crnet": (power(8.0, 0.08), 0.5)}))["crossings"][0]
    assert apart["at"] is None
    assert apart["ahead"] == ("crnet", "crnet")


def test_the_ratio_and_its_trend():
    def worse(size):
        return power(9.0, 0.08)(size) + math.log(1.02) + 0.01 * math.log2(size / 1e6)

    rungs = ladder_of({"dense": (power(9.0, 0.08), 1.0), "crnet": (worse, 0.5)}, seeds=2)
    ratio = findings_of(rungs)["ratios"]["crnet"]
    assert ratio["sizes"]["96x9"]["ratio"]["value"] == pytest.approx(1.02)
    assert ratio["doubling"]["value"] == pytest.approx(math.exp(0.01))
    assert ratio["extrapolated_to"] == pytest.approx(5.8e7)
    assert ratio["extrapolated"]["value"] == pytest.approx(1.02 * math.exp(0.01 * math.log2(58)))
    middle = sum(math.log2(count / 1e6) for count in SIZES.values()) / 4
    assert ratio["mean"]["value"] == pytest.approx(1.02 * math.exp(0.01 * middle))


def test_the_ratio_at_a_size_is_of_the_same_seeds():
    """What both share with their seed falls out; the spread is pooled over the sizes, one of which has one run."""
    rungs = ladder_of({"dense": (power(9.0, 0.08), 1.0), "crnet": (power(9.0, 0.08), 0.5)}, seeds=2)
    for rung in rungs.values():
        rung["methods"]["dense"]["losses"] = [3.0, 3.4]
        rung["methods"]["crnet"]["losses"] = [3.01, 3.41]
    rungs["96x9"]["methods"]["crnet"]["losses"] = [3.01, 3.43]  # differences 0.01, 0.03
    rungs["64x6"]["methods"]["crnet"]["losses"] = [3.02]
    ratio = findings_of(rungs)["ratios"]["crnet"]["sizes"]
    variance = 2 * 0.01**2 / 3  # of three sizes with two runs
    found = ratio["96x9"]["ratio"]
    assert found["value"] == pytest.approx(math.exp(0.02))
    assert math.log(found["high"]) - 0.02 == pytest.approx(3.1824 * math.sqrt(variance / 2), rel=1e-4)
    assert math.log(ratio["64x6"]["ratio"]["high"]) - 0.02 == pytest.approx(3.1824 * math.sqrt(variance), rel=1e-4)


def test_since_when_a_method_is_on_its_side():
    rungs = ladder_of({"dense": (power(9.0, 0.08), 1.0), "crnet": (power(9.0, 0.08), 0.5)})
    for method, losses in (("dense", (5.0, 4.0, 3.0)), ("crnet", (4.0, 3.8, 3.2))):
        for rung in rungs.values():
            points = zip((1, 2, 3), losses, strict=True)
            curve = [{"tokens": 10 * n * rung["dense_parameters"], "loss": loss} for n, loss in points]
            rung["methods"][method]["curves"] = [curve]
    assert findings_of(rungs)["ratios"]["crnet"]["sizes"]["96x9"]["since"] == pytest.approx(25.0)


def test_what_diverged_or_is_missing_is_left_out():
    laws = {"dense": (power(9.0, 0.08), 1.0), "crnet": (power(9.0, 0.08), 0.5)}
    rungs = ladder_of(laws | {"cola": (lambda size: None if size < 2e6 else size**-0.1, 0.5)})
    del rungs["192x13"]["methods"]["crnet"]
    found = findings_of(rungs)
    assert found["laws"]["size"]["cola"]["dof"] == 0  # two sizes, one run each
    assert found["ratios"]["crnet"]["sizes"].keys() == SIZES.keys() - {"192x13"}
    assert found["ratios"]["cola"]["sizes"].keys() == {"128x13", "192x13"}
    assert [crossing["methods"] for crossing in found["crossings"]].count(("crnet", "cola")) == 0  # one size together
    two = found["ratios"]["cola"]
    assert two["doubling"]["low"] is None
    assert two["extrapolated"] is None  # not without an interval
    one = findings_of({"64x6": rungs["64x6"]})
    assert one["laws"]["size"] == {}
    assert one["ratios"]["crnet"]["doubling"] is None


def test_five_sizes_have_an_irreducible_loss(tmp_path):
    sizes = SIZES | {"256x16": 13e6, "512x16": 50e6}
    rungs = ladder_of({"dense": (lambda size: 1.5 + 40 * size**-0.25, 1.0)}, sizes)
    found = findings_of(rungs)
    assert found["irreducible"]["dense"]["E"] == pytest.approx(1.5)
    content = {"findings": found, "sizes": rungs, "options": {"sizes": [*sizes]}}
    assert "| dense | 1.500 (1.500 to 1.500) | 40 | 0.250 (0.250 to 0.250) |" in markdown_ladder(content)


def test_tables_and_figure(tmp_path):
    pytest.importorskip("matplotlib")
    laws = {"dense": (power(9.0, 0.08), 1.0), "crnet": (power(9.0 * 2e6**-0.02, 0.06), 0.5)}
    rungs = ladder_of(laws | {"cola+muon": (lambda size: None, 0.5)}, seeds=2)
    content = {"findings": findings_of(rungs), "sizes": rungs, "options": {"sizes": [*SIZES, "256x16"]}}
    text = markdown_ladder(content)
    for part in (
        "4 of 5 sizes are done.",
        "| 64x6 | 6M | 1 | dense | 300k | 1.8e13 | 6 MiB | 1 | 2 |",
        "| CoLA, Muon | 150k | 9e12 | 3 MiB | 1 | 2 | diverged |  |",
        "extrapolated to 58M, 10 times the largest",
        "| dense and CR-Net | dense parameters of the size | 2M (2M to 2M) | CR-Net below, dense above |",
    ):
        assert part in text
    widths = {len(line.replace("\\|", "").split("|")) for line in text.splitlines() if line.startswith("| size")}
    assert widths == {13}
    assert draw_ladder(content, tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")


# The whole

QUICK = {"methods": ("dense", "crnet"), "tuning_steps": 0.5, "workers": 1, "validation_blocks": 4}


def options_for(sizes, seeds=(1, 1), runs=(3, 2), **changes):
    pairs = zip(seeds, runs, strict=True)
    comparisons = [Options(**{**QUICK, **changes, "seeds": count, "tuning_runs": most}) for count, most in pairs]
    return LadderOptions(sizes=parse_sizes(sizes), tokens_per_parameter=0.1, comparisons=tuple(comparisons))


def untrained(job, folder):
    """In place of a run: its file, with a loss that the embeddings' rate makes better, up to 0.01."""
    path = folder / f"{job.key}.json"
    if path.is_file():
        return json.loads(path.read_text())
    recipe = build_recipe(job.recipe, ran=True)
    config = build_model_config(recipe)
    counts = count_parameters(config)
    loss = 9.0 * sum(counts.values()) ** -0.1 + abs(math.log(job.rates["embedding"] / 0.01)) + 0.001 * job.seed
    tokens = job.steps * recipe.training["per_device_train_batch_size"] * recipe.data.block_size
    result = {
        "method": job.method,
        "rates": job.rates,
        "seed": job.seed,
        "steps": job.steps,
        "tokens": tokens,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss,
        "seconds": 1.0,
        "curve": [{"step": job.steps, "tokens": tokens, "seconds": 1.0, "loss": loss}],
        "parameters": counts,
        "flops_per_token": 6 * sum(counts.values()),
        "peak_memory_bytes": {"weights": 4 * sum(counts.values())},
    }
    path.write_text(json.dumps(result))
    return result


class Runs:
    """In place of `run_once`; interrupted after `end` calls."""

    end = math.inf

    def __call__(self, job, folder):
        self.end -= 1
        if self.end < 0:
            raise KeyboardInterrupt
        return untrained(job, folder)


@pytest.fixture
def runs(monkeypatch):
    found = Runs()
    for module in ("comparison", "tuning"):
        monkeypatch.setattr(importlib.import_module(f"crosslayer.compare.{module}"), "run_once", found)
    monkeypatch.setattr("crosslayer.compare.report.draw", lambda content, path: False)  # test_compare.py looks at it
    return found


@pytest.fixture
def climbed(tmp_path, runs):
    told = []
    content = compare_sizes(tiny_recipe(tmp_path), options_for("16x2,32x2"), tmp_path / "out", tell=told.append)
    return tmp_path, content, told


def runs_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/runs/*.json")}


def test_what_is_written(climbed):
    root, content, told = climbed
    out = root / "out"
    assert json.loads((out / "ladder.json").read_text()) == json.loads(json.dumps(content))
    assert {path.name for path in out.iterdir()} == {
        *("recipe.yaml", "run.json", "ladder.json", "ladder.md", "ladder.png", "16x2", "32x2")
    }
    assert "| 32x2 |" in (out / "ladder.md").read_text()
    assert any(line.startswith("32x2: crnet: learning rates") for line in told)
    for name, rung in content["sizes"].items():
        comparison = json.loads((out / name / "compare.json").read_text())
        assert rung["methods"] == comparison["methods"]
        assert f"{rung['model']['hidden_size']}x{rung['model']['num_hidden_layers']}" == name
        assert rung["dense_parameters"] == rung["methods"]["dense"]["parameters_without_embeddings"]
        assert rung["tokens"] == rung["steps"] * 4 * 32
        assert rung["tokens"] == pytest.approx(0.1 * rung["dense_parameters"], abs=64)
        assert {row["curves"][0][-1]["tokens"] for row in rung["methods"].values()} == {rung["tokens"]}
        assert rung["tuning"]["steps"] == max(1, rung["steps"] // 2)
        assert rung["epochs"] == pytest.approx(rung["tokens"] / rung["data"]["train"]["tokens"])
    assert content["findings"]["laws"]["size"].keys() == {"dense", "crnet"}


def test_a_search_starts_at_the_rates_of_the_size_before(climbed):
    _, content, _ = climbed
    small, large = content["sizes"].values()
    for name, row in small["methods"].items():
        assert len(row["tuning"]) == 3
        assert large["methods"][name]["tuning"][0]["rates"] == row["rates"]
        assert len(large["methods"][name]["tuning"]) == 2
        assert row["rates"]["embedding"] == pytest.approx(0.01)  # where `untrained` is best
        assert row["tuning"][0]["rates"]["embedding"] == pytest.approx(0.005)


def test_going_on_makes_only_what_is_missing(climbed):
    root, content, _ = climbed
    before = runs_in(root / "out")
    again = compare_sizes(
        tiny_recipe(root), options_for("16x2,32x2,32x3", (1, 2, 1), (3, 2, 0)), root / "out", resume=True
    )
    after = runs_in(root / "out")
    assert before.items() <= after.items()
    assert len(after) == len(before) + 2 + 2  # a seed of 32x2, and 32x3 without a search; two methods
    assert again["sizes"].keys() == {"16x2", "32x2", "32x3"}
    assert again["sizes"]["16x2"]["methods"] == content["sizes"]["16x2"]["methods"]
    found = [size["methods"]["crnet"]["rates"] for size in again["sizes"].values()]
    assert found[2] == found[1]  # tuning_runs 0: those of the size before


@pytest.mark.parametrize("end", [2, 9])
def test_ended_anywhere_it_goes_on(climbed, runs, tmp_path, end):
    """In the first and in the second size; the finished one stands in ladder.json."""
    _, content, _ = climbed
    out = tmp_path / "ended"
    runs.end = end
    with pytest.raises(TrainingError, match="--resume goes on"):
        compare_sizes(tiny_recipe(tmp_path), options_for("16x2,32x2"), out)
    done = json.loads((out / "ladder.json").read_text())["sizes"] if (out / "ladder.json").exists() else {}
    assert done.keys() == ({"16x2"} if end == 9 else set())
    before = runs_in(out)
    assert len(before) == end
    runs.end = math.inf
    again = compare_sizes(tiny_recipe(tmp_path), options_for("16x2,32x2"), out, resume=True)
    assert before.items() <= runs_in(out).items()
    for name, rung in again["sizes"].items():
        assert rung["methods"] == content["sizes"][name]["methods"]


def test_resumed_it_never_shows_less_than_before(climbed, monkeypatch):
    root, _, _ = climbed
    seen = []
    monkeypatch.setattr("crosslayer.compare.ladder.write_ladder", lambda out, content: seen.append([*content["sizes"]]))
    compare_sizes(tiny_recipe(root), options_for("16x2,32x2"), root / "out", resume=True)
    assert seen == [["16x2", "32x2"]] * 2
    seen.clear()
    other = options_for("16x2,32x2", runs=(0, 0))
    other.tokens_per_parameter = 0.2  # compare.json of another budget is none of it
    compare_sizes(tiny_recipe(root), other, root / "out", resume=True)
    assert seen == [["16x2"], ["16x2", "32x2"]]


def test_a_method_that_diverges_at_once(tmp_path, runs, monkeypatch):
    """Without a point of its curve."""

    def diverges(job, folder):
        found = untrained(job, folder)
        return {**found, "loss": None, "perplexity": None, "bits_per_byte": None, "curve": []}

    monkeypatch.setattr("crosslayer.compare.comparison.run_once", diverges)
    content = compare_sizes(tiny_recipe(tmp_path), options_for("16x2,32x2", runs=(0, 0)), tmp_path / "out")
    assert content["findings"]["ratios"] == {}
    assert (tmp_path / "out" / "ladder.md").read_text().count("diverged") == 4
    assert (tmp_path / "out" / "ladder.png").is_file()


def test_wrong_input_writes_nothing(climbed, tmp_path):
    root, _, _ = climbed
    out = tmp_path / "wrong"
    for sizes, message in (
        ("32x2,16x2", "sizes must grow in dense parameters .*32x2"),
        ("16x2,24x2", "no multiple of 16"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare_sizes(tiny_recipe(root), options_for(sizes), out)
    recipe = tiny_recipe(root)
    recipe.monitor.max_hours = 1.0
    with pytest.raises(ConfigError, match="max_hours"):
        compare_sizes(recipe, options_for("16x2,32x2"), out)
    recipe = tiny_recipe(root)
    recipe.model["rank"] = 16  # half of the width
    with pytest.raises(ConfigError, match="rank"):
        compare_sizes(recipe, options_for("16x2,32x2"), out)
    assert not out.exists()
    with pytest.raises(CheckpointError, match="already holds a run"):
        compare_sizes(tiny_recipe(root), options_for("16x2,32x2"), root / "out")
    with pytest.raises(ConfigError, match="cannot be resumed with another model"):
        compare_sizes(recipe, options_for("16x2,32x2"), root / "out", resume=True)
    with pytest.raises(ConfigError, match="holds a comparison without sizes; leave --sizes out"):
        compare_sizes(tiny_recipe(root), options_for("16x2,32x2"), root / "out" / "16x2", resume=True)
    with pytest.raises(ConfigError, match="holds a ladder; give its --sizes"):
        compare(tiny_recipe(root), Options(**QUICK), root / "out", resume=True)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """A function that runs the command on a tiny recipe, into `tmp_path`/out."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_content(tmp_path)))
    fixed = ["--recipe", str(path), "--output_dir", str(tmp_path / "out"), "--workers", "1", "--methods", "dense,crnet"]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["crosslayer", "compare", *fixed, *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, *capsys.readouterr()

    return run


BUDGET = ("--tokens_per_parameter", "0.1", "--tuning_runs", "0")
TWO = ("--sizes", "16x2,32x2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (TWO, "--sizes has no budget; give --tokens_per_parameter, such as 20"),
        ((*BUDGET, "--max_steps", "3"), "--tokens_per_parameter and --max_steps exclude each other"),
        ((*BUDGET, "--training.max-steps", "3"), "--tokens_per_parameter and --max_steps exclude each other"),
        ((*BUDGET, "--warmup_steps", "10"), "--warmup_steps 10 is no number of steps for --tokens_per_parameter"),
        ((*BUDGET, "--seeds", "2,1"), "seeds='2,1' are 2 numbers for 0 sizes"),
        ((*BUDGET, *TWO, "--seeds", "2,x"), "seeds='2,x' must be a whole number of at least 1, or one for each size"),
        ((*BUDGET, *TWO, "--seeds", "0"), "seeds='0' must be a whole number of at least 1, or one for each size"),
        ((*BUDGET, *TWO, "--seeds", "1,2,1"), "seeds='1,2,1' are 3 numbers for 2 sizes; give one or 2"),
        ((*BUDGET, "--sizes", "16x2,banana"), "'banana' is not HIDDENxLAYERS"),
        ((*BUDGET, "--sizes", "16x2"), "must be two or more"),
        ((*TWO, "--tokens_per_parameter", "0"), "tokens_per_parameter=0.0 must be a number above 0"),
        ((*BUDGET, "--tuning_steps", "1.5"), "tuning_steps=1.5 must be a whole number of at least 1, or a share"),
    ],
)
def test_what_the_command_refuses(call, tmp_path, arguments, message):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_command(call, tmp_path):
    """Real runs."""
    folder = tmp_path / "out"
    code, out, err = call(*BUDGET, *TWO, "--seeds", "1")
    assert code == 0, err
    assert "## Perplexity over dense" in out
    assert f"{folder}/ladder.json, ladder.md, ladder.png" in out
    before = runs_in(folder)
    assert len(before) == 4
    code, out, err = call(*BUDGET, *TWO, "--seeds", "1", "--resume", "--json")
    assert code == 0, err
    assert runs_in(folder) == before
    for rung in json.loads(out)["sizes"].values():
        for row in rung["methods"].values():
            assert row["curves"][0][-1]["tokens"] == rung["tokens"] == rung["steps"] * 4 * 32
            assert 0 < row["loss_mean"] < row["curves"][0][0]["loss"]
    code, out, err = call(*BUDGET, "--seeds", "1", "--methods", "crnet", "--overwrite")  # without sizes
    assert code == 0, err
    assert "| CR-Net |" in out
    training = json.loads((folder / "compare.json").read_text())["recipe"]["training"]
    assert training["max_steps"] == with_budget(tiny_recipe(tmp_path), 0.1).training["max_steps"]
    assert not (folder / "ladder.json").exists()
