"""`crosslayer compare`: the search for learning rates, equal parameters, resuming, the files it leaves, wrong input."""

import importlib.util
import json
import math
import sys

import pytest
import yaml

from crosslayer.accounting import count_parameters
from crosslayer.cli import main
from crosslayer.compare import CONTENDERS, Job, Options, compare, has_worse_neighbours, recipe_of, search_rates
from crosslayer.compare import comparison as comparing
from crosslayer.compare.runs import content_of
from crosslayer.errors import ConfigError, TrainingError
from crosslayer.train import build_recipe
from crosslayer.train.memory import training_method
from crosslayer.train.run import build_arguments, build_model_config
from tiny_run import tiny_content, tiny_recipe

QUICK = {"seeds": 2, "tuning_runs": 4, "tuning_steps": 3, "workers": 1, "validation_blocks": 4}


# The search


def bowl(**best):
    """A loss with its minimum, 1, at these rates, and how often it was asked."""

    def loss(rates):
        loss.calls += 1
        return 1 + sum(math.log2(rates[kind] / best[kind]) ** 2 for kind in rates)

    loss.calls = 0
    return loss


def test_search_finds_the_best_of_factors_of_two():
    loss = bowl(embedding=8e-3, full_rank=1e-3)
    rates, tried = search_rates({"embedding": 1e-3, "full_rank": 4e-3}, loss, 50)
    assert rates == {"embedding": 8e-3, "full_rank": 1e-3}
    assert len(tried) == loss.calls  # nothing twice
    assert has_worse_neighbours(rates, tried) == {"embedding": True, "full_rank": True}


def test_search_stops_at_its_limit_with_the_best_so_far():
    loss = bowl(embedding=1.0)
    rates, tried = search_rates({"embedding": 1e-3}, loss, 5)
    assert loss.calls == 5
    assert rates["embedding"] == max(key[0] for key in tried)
    assert has_worse_neighbours(rates, tried) == {"embedding": False}


def test_search_goes_round_again_when_rates_depend_on_one_another():
    def loss(rates):
        a, b = (math.log2(rate) for rate in rates.values())
        return 0.4 * (a - b) ** 2 + (a - 3) ** 2

    rates, _ = search_rates({"a": 1.0, "b": 1.0}, loss, 60)
    assert rates == {"a": 8.0, "b": 8.0}


def test_a_rate_that_diverges_is_no_minimum():
    rates, tried = search_rates({"a": 1.0}, lambda rates: math.inf if rates["a"] > 1 else -rates["a"], 9)
    assert rates == {"a": 1.0}
    assert has_worse_neighbours(rates, tried) == {"a": True}


# The recipes of the methods


def body(content):
    counts = count_parameters(build_model_config(build_recipe(content)))
    return sum(counts.values()) - counts["embeddings"] - counts["head"]


@pytest.mark.parametrize("method", ["cola", "low_rank"])
def test_equal_parameters(tmp_path, method):
    base = tiny_recipe(tmp_path)
    content = recipe_of(method, base)
    wanted = body(recipe_of("crnet", base))
    here = body(content)
    for rank in (content["model"]["rank"] - 1, content["model"]["rank"] + 1):
        other = body({**content, "model": {**content["model"], "rank": rank}})
        assert abs(here - wanted) <= abs(other - wanted)


def test_run_of_a_method_has_its_rates_and_shortened_warmup(tmp_path):
    base = tiny_recipe(tmp_path)
    rates = {"embedding": 1e-2, "low_rank": 4e-3, "full_rank": 5e-4}
    settings = {"seed": 9, "steps": 6, "validation_blocks": 4, "whole_validation": True}
    job = Job(method="crnet", recipe=recipe_of("crnet", base), rates=rates, **settings)
    content = content_of(job)
    groups, training = content["parameter_groups"], content["training"]
    rate = training["learning_rate"]
    assert groups["embedding_lr_factor"] * rate == pytest.approx(1e-2)
    assert groups["low_rank_lr_factor"] * rate == pytest.approx(4e-3)
    assert groups["beta_lr_factor"] * rate == pytest.approx(4e-3)
    assert groups["full_rank_lr_factor"] * rate == pytest.approx(5e-4)
    assert (training["seed"], training["data_seed"], training["max_steps"], training["warmup_steps"]) == (9, 9, 6, 1)
    other = Job(method="crnet", recipe=recipe_of("crnet", base), rates=rates, threads=2, **settings)
    assert job.key == other.key  # how many threads decides nothing
    assert job.key != Job(method="crnet", recipe=job.recipe, rates=rates, **{**settings, "seed": 10}).key


@pytest.mark.parametrize(("method", "package"), [("galore", "galore_torch"), ("apollo", "apollo_torch")])
def test_optimizers_of_the_dense_model(tmp_path, method, package):
    pytest.importorskip(package)
    base = tiny_recipe(tmp_path)
    recipe = build_recipe(recipe_of(method, base))
    config, arguments = build_model_config(recipe), build_arguments(recipe, tmp_path / "unused")
    assert config.factorization == "dense"
    assert training_method(config, arguments).optimizer == method
    content = compare(base, Options(methods=(method,), **{**QUICK, "seeds": 1, "tuning_runs": 2}), tmp_path / "out")
    row = content["methods"][method]
    assert row["curves"][0][-1]["loss"] < row["curves"][0][0]["loss"]
    assert row["rates"].keys() == {"embedding", "full_rank"}


def test_optimizers_of_contenders(tmp_path):
    base = tiny_recipe(tmp_path, optim="muon", optim_args="momentum=0.9")
    assert recipe_of("crnet", base)["training"] == base.training
    assert recipe_of("crnet+muon", base)["training"] == base.training
    for name, optim in (("dense+adamw", "adamw_torch_fused"), ("cola+spectron", "spectron")):
        content = recipe_of(name, base)
        assert content["training"]["optim"] == optim
        assert "optim_args" not in content["training"]  # those of another optimizer
        assert content["model"] == recipe_of(name.partition("+")[0], base)["model"]
    methods = ("cola", "cola+muon", "cola+spectron")
    out = tmp_path / "out"
    content = compare(tiny_recipe(tmp_path), Options(methods=methods, **{**QUICK, "seeds": 1, "tuning_runs": 3}), out)
    rows = content["methods"]
    assert [rows[name]["label"] for name in methods] == ["CoLA", "CoLA, Muon", "CoLA, Spectron"]
    assert len({rows[name]["loss_mean"] for name in methods}) == 3
    assert len({rows[name]["parameters"] for name in methods}) == 1
    for name in methods:
        assert rows[name]["rates"].keys() == {"embedding", "low_rank"}
        assert len(rows[name]["tuning"]) == 3
        assert f"| {rows[name]['label']} |" in (out / "compare.md").read_text()
    states = {name: row["peak_memory_bytes"]["optimizer"] for name, row in rows.items()}
    assert states["cola+muon"] < states["cola+spectron"] < states["cola"]


# The whole


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    told = []
    content = compare(tiny_recipe(root), Options(methods=("dense", "crnet"), **QUICK), root / "out", tell=told.append)
    return root, content, told


def test_what_is_written(compared):
    root, content, told = compared
    out = root / "out"
    assert json.loads((out / "compare.json").read_text()) == json.loads(json.dumps(content))
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "compare.md").read_text()
    assert "| dense |" in table
    assert "| CR-Net |" in table
    assert any(line.startswith("crnet: learning rates") for line in told)
    for name, row in content["methods"].items():
        assert len(row["losses"]) == 2
        assert row["loss_mean"] == pytest.approx(sum(row["losses"]) / 2)
        assert row["losses"][0] != row["losses"][1]
        assert len(row["tuning"]) == 4
        assert set(row["rates"]) == set(CONTENDERS[name].rates)
        for curve in row["curves"]:
            assert [point["step"] for point in curve] == list(range(1, 13))
            assert curve[-1]["tokens"] == 12 * 4 * 32
            seconds = [point["seconds"] for point in curve]
            assert seconds == sorted(seconds)
            assert curve[-1]["loss"] < curve[0]["loss"]
    dense, crnet = content["methods"]["dense"], content["methods"]["crnet"]
    assert crnet["parameters"] < dense["parameters"]
    assert crnet["flops_per_token"] < dense["flops_per_token"]


def test_going_on_makes_only_what_is_missing(compared):
    root, content, _ = compared
    before = {path: path.stat().st_mtime_ns for path in (root / "out" / "runs").iterdir()}
    assert len(before) == 2 * (4 + 2)
    options = Options(methods=("dense", "crnet", "low_rank"), **QUICK)
    again = compare(tiny_recipe(root), options, root / "out", resume=True)
    after = {path: path.stat().st_mtime_ns for path in (root / "out" / "runs").iterdir()}
    assert before.items() <= after.items()
    assert len(after) == 3 * (4 + 2)
    for name in ("dense", "crnet"):
        assert again["methods"][name]["losses"] == content["methods"][name]["losses"]


def test_without_a_search_the_rates_are_the_recipes(tmp_path):
    options = Options(methods=("crnet",), **{**QUICK, "tuning_runs": 0, "seeds": 1})
    row = compare(tiny_recipe(tmp_path, max_steps=2), options, tmp_path / "out")["methods"]["crnet"]
    assert row["rates"] == pytest.approx({"embedding": 5e-3, "low_rank": 5e-3, "full_rank": 1e-3})
    assert row["loss_stdev"] is None


def test_the_final_loss_is_of_the_whole_split(tmp_path):
    """However many blocks the curves are of."""
    rows = {}
    for blocks in (1, 10**6):
        options = Options(methods=("crnet",), **{**QUICK, "tuning_runs": 0, "seeds": 1, "validation_blocks": blocks})
        content = compare(tiny_recipe(tmp_path, max_steps=2), options, tmp_path / str(blocks))
        rows[blocks] = content["methods"]["crnet"]
    assert rows[1]["losses"] == rows[10**6]["losses"]
    assert rows[1]["curves"][0][-1]["loss"] != rows[1]["losses"][0]
    assert rows[1]["bits_per_byte"] == pytest.approx(rows[10**6]["bits_per_byte"])


@pytest.mark.slow
def test_seeds_and_processes_change_nothing_but_the_time(compared, tmp_path):
    """The same runs from two processes beside one another."""
    root, content, _ = compared
    options = Options(methods=("crnet",), **{**QUICK, "workers": 2})
    other = compare(tiny_recipe(root), options, tmp_path / "out")
    assert other["methods"]["crnet"]["losses"] == content["methods"]["crnet"]["losses"]


def test_a_method_that_diverges_is_reported_as_such(tmp_path):
    recipe = tiny_recipe(tmp_path, max_steps=6, learning_rate=1e30, max_grad_norm=0.0)
    options = Options(methods=("crnet",), **{**QUICK, "tuning_runs": 0})
    content = compare(recipe, options, tmp_path / "out")
    assert content["methods"]["crnet"]["loss_mean"] is None
    assert "diverged" in (tmp_path / "out" / "compare.md").read_text()


def test_interrupted(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "run_once", interrupt)
    options = Options(methods=("crnet",), **{**QUICK, "tuning_runs": 0})
    with pytest.raises(TrainingError, match="after 0 runs; --resume goes on"):
        compare(tiny_recipe(tmp_path), options, tmp_path / "out")


# Wrong input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": ("cnet",)}, "'cnet' is none of .*the nearest is crnet"),
        ({"methods": ()}, "methods is empty"),
        ({"seeds": 0}, "seeds=0 must be a whole number of at least 1"),
        ({"tuning_runs": -1}, "tuning_runs=-1 must be a whole number of at least 0"),
        ({"tuning_steps": 0}, "tuning_steps=0 must be a whole number of at least 1"),
        ({"methods": ("crnet+moun",)}, "method='crnet.moun': after . give one of adamw, .*; the nearest is muon"),
        ({"methods": ("crnt+muon",)}, "method='crnt' is none of"),
        ({"methods": ("galore+muon",)}, "galore is an optimizer itself; give galore or dense.muon"),
        ({"workers": 0}, "workers=0 must be a whole number of at least 1"),
        ({"validation_blocks": 0}, "validation_blocks=0 must be a whole number of at least 1"),
    ],
)
def test_wrong_options(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Options(**wrong)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="method galore needs a package that is missing: pip install galore-torch"):
        Options(methods=("galore",))


def test_a_time_limit_is_for_one_run(tmp_path):
    recipe = tiny_recipe(tmp_path)
    recipe.monitor.max_hours = 1.0
    with pytest.raises(ConfigError, match=r"monitor\.max_hours=1 would end runs of a comparison early"):
        compare(recipe, Options(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_number_of_steps(tmp_path):
    recipe = tiny_recipe(tmp_path)
    del recipe.training["max_steps"]
    with pytest.raises(ConfigError, match=r"training\.max_steps is missing"):
        compare(recipe, Options(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rank_that_does_not_fit_is_found_before_anything_runs(tmp_path):
    recipe = tiny_recipe(tmp_path)
    recipe.model["rank"] = 64
    with pytest.raises(ConfigError, match="rank"):
        compare(recipe, Options(**QUICK), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_content(tmp_path)))
    folder = tmp_path / "out"

    def call(*more):
        arguments = ["--methods", "crnet,low_rank", "--seeds", "1", "--tuning_runs", "1", "--tuning_steps", "2"]
        fixed = ["--recipe", str(path), "--output_dir", str(folder), "--workers", "1", "--max_steps", "4"]
        monkeypatch.setattr(sys, "argv", ["crosslayer", "compare", *fixed, *arguments, *more])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, *capsys.readouterr()

    code, out, err = call()
    assert code == 0, err
    assert "| CR-Net |" in out
    assert "| plain low rank |" in out
    assert str(folder) in out
    code, out, err = call()
    assert (code, out) == (2, "")
    assert "already holds a run; give --resume" in err
    code, out, err = call("--resume", "--json")
    assert code == 0, err
    assert json.loads(out)["methods"].keys() == {"crnet", "low_rank"}
    code, out, err = call("--resume", "--hidden_size", "64")
    assert (code, out) == (2, "")
    assert "cannot be resumed with another model" in err
