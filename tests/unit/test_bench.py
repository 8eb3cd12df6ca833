"""The measuring code of `crosslayer bench` and of benchmarks/, and the verb itself."""

import importlib
import json
import multiprocessing
import re
import sys
import types
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from crosslayer.analysis import measure_peak_memory
from crosslayer.bench import speed as speed_module
from crosslayer.bench.contenders import SETUPS, ChunkedLoss, Contenders
from crosslayer.bench.memory import memory_rows, saved_by_depth
from crosslayer.bench.speed import (
    OwnProcess,
    matrix_operations,
    measure_generation,
    measure_memory,
    measure_training,
    summarize,
    take_turns,
    training_rows,
    training_step,
)
from crosslayer.cli import main
from crosslayer.crnet import CRNetForCausalLM
from crosslayer.errors import ConfigError
from tolerances import assert_all_close

SHAPE = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 130, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 3, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}


# Contenders


def test_every_method_trains_as_it_says():
    contenders = Contenders(SHAPE | {"rank": 7}, list(SETUPS), interval=2)
    for name, method in SETUPS.items():
        model = contenders.model(name)
        assert model.training
        assert model.is_activation_checkpointing == method.checkpointing
        assert isinstance(model, LlamaForCausalLM if method.model == "llama" else CRNetForCausalLM)
        if method.model != "llama":
            assert (model.config.factorization, model.config.rank) == (method.model, 7)
        if method.policy is not None:
            assert model.config.recompute == method.policy
            assert model.config.recompute_interval == (None if method.policy == "none" else 2)


def test_methods_of_one_model_share_its_weights():
    contenders = Contenders(SHAPE, ["dense", "dense_checkpointing", "crnet", "crnet_replay"])
    assert contenders.model("dense") is contenders.model("dense_checkpointing")
    assert contenders.model("crnet") is contenders.model("crnet_replay")
    assert not contenders.model("dense").is_activation_checkpointing


@pytest.mark.parametrize(
    ("shape", "arguments", "parts"),
    [
        ({}, {"methods": ["lama"]}, ("lama", "llama, dense")),
        ({}, {"methods": []}, ("methods is empty", "choose from")),
        ({}, {"methods": ["dense"], "dtype": "int8"}, ("int8", "float32, bfloat16, mixed")),
        ({"num_attention_heads": 5}, {"methods": ["llama"]}, ("transformers Llama",)),
        ({"rank": 10**4}, {"methods": ["cola"]}, ("CoLA", "rank=10000")),
        ({}, {"methods": ["crnet_replay"], "interval": 9}, ("recompute_interval=9", "1..3")),
    ],
)
def test_wrong_contenders(shape, arguments, parts):
    methods = arguments.pop("methods")
    with pytest.raises(ConfigError) as error:
        Contenders(SHAPE | shape, methods, **arguments)
    for part in parts:
        assert part in str(error.value)


# The loss


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", SETUPS)
def test_the_chunked_loss_is_the_plain_loss(name):
    contenders = Contenders(SHAPE, [name])
    model, ids = contenders.model(name), contenders.tokens(2, 9)
    plain = model(input_ids=ids, labels=ids, use_cache=False).loss
    plain.backward()
    expected = gradients(model)
    chunked = ChunkedLoss(model)(input_ids=ids, labels=ids, use_cache=False)
    assert chunked.logits is None
    chunked.loss.backward()
    assert chunked.loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert_all_close(gradients(model), expected)


class RowsOfLogits(TorchDispatchMode):
    """Most rows of a tensor that is as wide as the vocabulary."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        wide = [x for x in tree_leaves(made) if isinstance(x, torch.Tensor) and x.shape[-1:] == (SHAPE["vocab_size"],)]
        self.most = max(self.most, *(x.numel() // SHAPE["vocab_size"] for x in wide), 0)
        return made


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="this torch has no linear_cross_entropy")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SETUPS)
def test_a_training_step_makes_no_logits(name, dtype):
    contenders = Contenders(SHAPE, [name], dtype=dtype)
    model, ids = contenders.model(name), contenders.tokens(2, 32)
    with RowsOfLogits() as seen:
        training_step(model, ids)()
    assert seen.most < ids.numel()  # in half precision the chunks themselves are seen
    with RowsOfLogits() as seen:
        model(input_ids=ids, labels=ids, use_cache=False)
    assert seen.most == ids.numel()


def test_memory_is_of_the_chunked_loss():
    """What is kept outside the layers does not grow with the vocabulary times tokens; the peak has no logits either."""
    wide = SHAPE | {"vocab_size": 4000}
    saved = saved_by_depth(wide, ["llama"], [1], batch=2, sequence=32)["llama"][1]
    assert saved.elsewhere_bytes < 4 * 64 * 4000
    contenders = Contenders(wide | {"num_hidden_layers": 1}, ["llama"])
    ids = contenders.tokens(2, 32)
    plain = measure_peak_memory(contenders.model("llama"), ids).total_bytes
    assert measure_memory(contenders, ids)["llama"]["total"] < plain - 4 * 64 * 4000


# The clock


def test_contenders_take_turns(monkeypatch):
    """Interleaved; the warm-up and what runs before a turn are outside the clock."""
    now, order = [0.0], []
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: now[0])

    def step(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds[order.count(name) - 1]

        return run

    def before(name):
        now[0] += 100

    steps = {"a": step("a", [9, 1, 2, 3]), "b": step("b", [9, 2, 4, 6])}
    seconds = take_turns(steps, 3, warm_up=1, before=before)
    assert order == ["a", "b"] * 4
    assert seconds == {"a": [1, 2, 3], "b": [2, 4, 6]}
    assert summarize(seconds["a"], 10)["tokens_per_s"] == 5.0
    rows = training_rows(seconds, {"a": 100, "b": 50}, {"a": 1, "b": 2}, 10, "a")
    assert [row["speed_over_llama"] for row in rows.values()] == [1.0, 0.5]
    assert [row["speed_if_operations_decided"] for row in rows.values()] == [1.0, 2.0]
    assert rows["b"]["step_s"]["p20"] < rows["b"]["step_s"]["median"] < rows["b"]["step_s"]["p80"]


def test_one_turn_has_no_spread():
    seconds = {"median": 2.0, "p20": 2.0, "p80": 2.0, "turns": [2.0]}
    assert summarize([2.0], 10) == {"tokens_per_s": 5.0, "step_s": seconds}


def test_training_step_trains():
    contenders = Contenders(SHAPE, ["crnet_reversible"])
    model, ids = contenders.model("crnet_reversible"), contenders.tokens(2, 9)
    loss = model(ids, labels=ids).loss.item()
    step = training_step(model, ids, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for _ in range(5):
        step()
    assert model(ids, labels=ids).loss.item() < loss
    assert all(parameter.grad is None for parameter in model.parameters())


def test_matrix_operations_of_llama():
    """6 for each weight of a product and token, and the two products of attention over all pairs."""
    contenders = Contenders(SHAPE, ["llama"])
    layer = 4 * 48 * 48 + 3 * 48 * 130
    weights = 3 * layer + 48 * 101
    attention = 3 * 2 * 2 * 2 * 9 * 9 * 48  # layers, products, sequences, 2 per element
    found = matrix_operations(contenders.model("llama"), contenders.tokens(2, 9))
    assert found == 3 * (2 * weights * 18 + attention)


@pytest.mark.parametrize("dtype", ["float32", "mixed", "bfloat16"])
def test_measure_training(dtype):
    contenders = Contenders(SHAPE, ["dense", "llama", "crnet_invert", "crnet_replay"], dtype=dtype)
    rows = measure_training(contenders, contenders.tokens(1, 9), turns=2, warm_up=0)
    assert list(rows) == contenders.methods
    assert rows["llama"]["speed_over_llama"] == 1.0
    assert all(row["tokens_per_s"] > 0 for row in rows.values())
    assert rows["crnet_invert"]["matrix_operations"] == rows["crnet_replay"]["matrix_operations"]


def test_the_name_that_invert_had():
    with pytest.warns(FutureWarning, match="method 'crnet_low_rank' is called 'crnet_invert' now"):
        contenders = Contenders(SHAPE, ["crnet_low_rank", "crnet_invert"])
    assert contenders.methods == ["crnet_invert"]


@pytest.mark.long
def test_measure_training_in_own_processes(monkeypatch):
    steps, step = [], OwnProcess.__call__
    monkeypatch.setattr(OwnProcess, "__call__", lambda process: steps.append(process.name) or step(process))
    methods = ["llama", "crnet", "crnet_reversible"]
    contenders = Contenders(SHAPE, methods, interval=2)
    rows = measure_training(contenders, contenders.tokens(1, 9), turns=1, warm_up=0, own_processes=2)
    assert list(rows) == methods
    assert all(len(row["step_s"]["turns"]) == 2 for row in rows.values())
    assert steps == [name for name in methods for _ in range(2)] * 2  # one ahead of the counted one
    assert not multiprocessing.active_children()


def test_failure_of_an_own_process(capfd):
    contenders = Contenders(SHAPE, ["crnet"])
    unknown = torch.full((1, 9), SHAPE["vocab_size"])
    with closing(OwnProcess(contenders, "crnet", unknown)) as step:
        step.wait_until_ready()
        with pytest.raises(RuntimeError, match="trains crnet has ended"):
            step()
    assert "IndexError" in capfd.readouterr().err


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_generation_is_transformers_own(compiled):
    """The decode loops make the tokens that `generate` makes, again after a second prompt."""
    contenders = Contenders(SHAPE, ["crnet"])
    model, ids = contenders.model("crnet").eval(), contenders.tokens(2, 7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    run = speed_module._Generation(contenders, "crnet", ids, 1)
    if compiled:
        torch.compiler.reset()
        counters.clear()
        run = speed_module._StaticGeneration(contenders, "crnet", ids, 5, "aot_eager")
        run.new_tokens = 1
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    for _ in range(2):
        with torch.no_grad():
            run.prefill()
            found = [run.next]
            for _ in range(5):
                run.decode()
                found.append(run.next)
        assert torch.equal(torch.cat(found, 1), expected[:, 7:])
    if compiled:
        assert counters["stats"]["unique_graphs"] == 1  # for all tokens


def test_measure_generation():
    contenders = Contenders(SHAPE, ["llama", "dense_checkpointing", "crnet_invert", "crnet_replay"])
    rows = measure_generation(contenders, batch=2, prompt=5, new_tokens=3, turns=2, warm_up=0)
    assert list(rows) == ["llama", "dense_checkpointing", "crnet_invert"]  # one for each model
    assert rows["llama"]["decode"]["speed_over_llama"] == 1.0
    weights = sum(p.numel() for p in contenders.model("llama").parameters()) - 101 * 48
    assert rows["llama"]["weight_bytes"] == 4 * weights


def test_saved_by_depth():
    saved = saved_by_depth(SHAPE, ["dense_checkpointing", "crnet_reversible"], [2, 6], sequence=16, interval=4)
    rows = memory_rows(saved, 48)
    assert rows["dense_checkpointing"]["growth_h"] == 1.0
    state = 6 + 2 * 130 / 48  # kept once in six layers of an interval of 4, never in two
    assert rows["crnet_reversible"]["growth_h"] == pytest.approx(state / 4, abs=1e-3)
    with pytest.raises(ConfigError, match="two different depths"):
        memory_rows(saved_by_depth(SHAPE, ["dense"], [2]), 48)


# The verb


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["crosslayer", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return types.SimpleNamespace(code=stopped.value.code or 0, out=out, err=err)

    return call


TINY = ("--hidden-size", 32, "--vocab-size", 50, "--batch-size", 1, "--sequence", 8, "--device", "cpu")


def test_bench_memory(run):
    result = run("memory", *TINY, "--layers", "2,3", "--methods", "crnet_replay", "--json")
    assert result.code == 0, result.err
    content = json.loads(result.out)
    assert list(content["contenders"]) == ["llama", "crnet_replay"]
    assert content["run"]["versions"]["torch"]
    assert "commit" in content["run"]
    row = content["contenders"]["crnet_replay"]
    peak = dict(row["peak_bytes"])
    assert peak.pop("phase") in ("forward", "backward", "optimizer")
    assert peak.pop("total") == sum(peak.values())
    assert [len(row["depths"][depth]["layer_bytes_per_token"]) for depth in ("2", "3")] == [2, 3]


def test_bench_memory_in_words(run):
    result = run("memory", *TINY, "--layers", "2,3", "--dtype", "bfloat16")
    assert result.code == 0, result.err
    assert "CR-Net, reversible" in result.out
    assert "growth" in result.out


@pytest.mark.parametrize("extra", [(), ("--json",)])
def test_bench_speed(run, extra):
    short = ("--num-hidden-layers", 2, "--turns", 1, "--warm-up", 0, "--prompt", 4, "--new-tokens", 2)
    result = run("speed", *TINY, *short, "--methods", "cola,crnet_invert", *extra)
    assert result.code == 0, result.err
    if not extra:
        assert "decode tokens/s" in result.out
        return
    content = json.loads(result.out)
    for part in ("training", "memory", "generation"):
        assert list(content[part]) == ["llama", "cola", "crnet_invert"]
    assert content["shape"]["sequence"] == 8
    assert content["device"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("memory", "--layers", "4"), ("layers='4'", "two different depths")),
        (("memory", "--layers", "4,deep"), ("4,deep",)),
        (("memory", "--layers", "0,4"), ("layers='0,4'", "from 1 to")),
        (("memory", "--methods", "galore"), ("method='galore' is none of llama",)),
        (("memory", "--recompute-interval", "40"), ("recompute_interval=40",)),
        (("speed", "--dtype", "fp8"), ("fp8", "float32, bfloat16, mixed")),
        (("speed", "--parts", "training,sleeping"), ("sleeping", "some of training, generation, memory")),
        (("speed", "--turns", "0"), ("turns=0",)),
        (("speed", "--warm-up", "-1"), ("warm_up=-1",)),
        (("speed", "--device", "cuda:9"), ("cuda:9",)),
        (("speed", "--hidden-size", "0"), ("hidden_size=0",)),
        (("speed", "--num-attention-heads", "7"), ("heads",)),
        (("fast",), ("fast",)),
    ],
)
def test_bench_refuses(run, arguments, parts):
    result = run(*arguments)
    assert result.code == 2, result.err
    assert result.out == ""
    assert len(result.err.strip().splitlines()) == 1, result.err
    for part in parts:
        assert part in result.err


SCRIPTS = sorted(Path(__file__).parents[2].joinpath("benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_imports_of_the_package_exists(script):
    """Programs that scripts start as text as well, which nothing else looks into."""
    pattern = r"^\s*from (crosslayer[\w.]*) import (\([^)]*\)|[^\n]*)"
    for module, names in re.findall(pattern, script.read_text(), re.MULTILINE):
        for name in re.findall(r"\w+", names.split("#")[0]):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
