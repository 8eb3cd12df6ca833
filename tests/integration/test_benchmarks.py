"""The scripts in benchmarks/ run, at tiny sizes, and their decisions are right."""

import argparse
import itertools
import json
import types

import pytest
import torch

from benchmark_scripts import BENCHMARKS, call
from crosslayer.bench.contenders import SETUPS

# result_file


def test_results_are_resumed_and_whole(script, tmp_path):
    ResultFile = script("result_file").ResultFile
    path = tmp_path / "deep" / "r.json"
    assert ResultFile(path, "what").section("a", lambda: {"value": 1})["value"] == 1
    again = ResultFile(path, "what")
    assert again.section("a", lambda: pytest.fail("measured twice"))["value"] == 1

    def breaks():
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError):
        again.section("b", breaks)
    assert list(json.loads(path.read_text())["sections"]) == ["a"]
    assert ResultFile(path, "what", redo=True).section("a", lambda: {"value": 2})["value"] == 2
    assert {"versions", "device", "commit", "command"} <= json.loads(path.read_text())["sections"]["a"]["run"].keys()
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]


def test_the_bars_of_the_committed_file_are_those_of_the_script(script):
    path = BENCHMARKS / "results" / "memory_cpu.json"
    results = script("result_file").ResultFile(path, "what")
    assert len(script("memory").bars(results)) == len(json.loads(path.read_text())["bars"])


# throughput


@pytest.mark.slow
def test_throughput(script, tmp_path, monkeypatch, capsys):
    throughput = script("throughput")
    monkeypatch.setattr(throughput, "SHAPE", throughput.SHAPE | {"hidden_size": 64, "intermediate_size": 96})
    out = tmp_path / "t.json"
    monkeypatch.setattr(throughput, "where_time_goes", lambda step: {"other": 1.0})
    call(throughput, monkeypatch, "--steps", 2, "--batch", 1, "--sequence", 16, "--threads", 1, "--out", out)
    content = json.loads(out.read_text())
    committed = json.loads((BENCHMARKS / "results" / "throughput_cpu.json").read_text())
    assert content.keys() == committed.keys()
    assert list(content["contenders"]) == list(committed["contenders"])
    for name, row in content["contenders"].items():
        assert row.keys() == committed["contenders"][name].keys()
    assert "| CR-Net written plainly |" in capsys.readouterr().out


# inference

TINY = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2, "rank": 32}


def test_quantization(script, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchao", reason="needs the extra 'quantize'")
    quantization, out = script("quantization"), tmp_path / "q.json"
    monkeypatch.setattr(quantization, "SHAPE", quantization.SHAPE | TINY)
    call(
        quantization,
        monkeypatch,
        *["--batches", "1", "8", "--prompt", "4", "--new", "2", "--turns", "2", "--threads", "1", "--out"],
        out,
    )
    content = json.loads(out.read_text())
    committed = json.loads((BENCHMARKS / "results" / "quantization_cpu.json").read_text())
    assert content.keys() == committed.keys()
    assert content["batches"].keys() == committed["batches"].keys()
    sizes = content["weight_bytes"]
    assert sizes["float32"] == pytest.approx(2 * sizes["bfloat16"], rel=1e-3)
    assert sizes["float32"] > sizes["bfloat16"] > sizes["int8"] > sizes["int4"]
    assert "| int4 |" in capsys.readouterr().out


def test_low_rank_cache(script, tmp_path, monkeypatch, capsys):
    benchmark, out = script("low_rank_cache"), tmp_path / "c.json"
    monkeypatch.setattr(benchmark, "SHAPE", benchmark.SHAPE | TINY)
    call(benchmark, monkeypatch, "--prompts", 8, "--turns", 2, "--threads", 1, "--out", out)
    content, path = json.loads(out.read_text()), BENCHMARKS / "results" / "low_rank_cache_cpu.json"
    assert content.keys() == json.loads(path.read_text()).keys()
    row = content["prompts"]["8"]
    assert row["bytes_whole"] == 8 * 2 * 2 * 128 * 4  # tokens, k and v, layers, width, float32
    assert row["bytes_kept"] == 8 * 2 * (128 + 32) * 4 + 8 * 8  # one layer whole, one by its rank, the positions
    assert "| 8 |" in capsys.readouterr().out


def test_decode_dtypes(script, tmp_path, monkeypatch, capsys):
    benchmark, out = script("decode_dtypes"), tmp_path / "d.json"
    monkeypatch.setattr(benchmark, "SHAPE", benchmark.SHAPE | TINY)
    call(benchmark, monkeypatch, "--batches", 1, 3, "--turns", 2, "--steps", 2, "--out", out)
    (section,) = json.loads(out.read_text())["sections"].values()
    assert [set(row["step_ms"]) for row in section["batches"].values()] == 2 * [{"float32", "bfloat16"}]
    assert "| 3 |" in capsys.readouterr().out


def test_packed_attention(script, tmp_path, monkeypatch, capsys):
    benchmark, out = script("packed_attention"), tmp_path / "p.json"
    monkeypatch.setattr(benchmark, "SHAPE", benchmark.SHAPE | TINY)
    call(benchmark, monkeypatch, "--lengths", 16, "--mean", 5, "--turns", 2, "--out", out)
    section = json.loads(out.read_text())["sections"]["16"]
    assert section["documents"] > 1
    assert section["step_s"].keys() == {"sdpa", "sdpa_documents"}
    assert "| 16 |" in capsys.readouterr().out


# memory


@pytest.mark.slow
@pytest.mark.long
def test_memory(script, tmp_path, monkeypatch, capsys):
    memory = script("memory")
    out, figure = tmp_path / "m.json", tmp_path / "m.png"
    sections = ("saved", "peak", "speed", "interval", "interval_deep")
    once = ("--turns", 1, "--restarts", 1, "--threads", 1)
    arguments = ("--smoke", *once, "--out", out, "--figure", figure, "--sections", *sections)
    call(memory, monkeypatch, *arguments)
    content = json.loads(out.read_text())
    assert list(content["sections"]) == list(sections)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert content["bars"]
    assert set(content["sections"]["interval"]["largest_interval"]) == {"float32", "mixed", "bfloat16"}
    capsys.readouterr()
    call(memory, monkeypatch, *arguments)
    assert capsys.readouterr().out.count("there already") == len(sections)


@pytest.mark.slow
@pytest.mark.long
def test_resident_memory_agrees_with_the_count(script, monkeypatch):
    """One process for each of two depths, small, and so with a wider margin than the benchmark's 10 %."""
    memory = script("memory")
    sizes = memory.FULL | {"hidden": 128, "resident": [4, 20]}
    monkeypatch.setattr(memory, "RESIDENT", {"crnet": None})
    row = memory.measure_resident(sizes)["methods"]["crnet"]
    assert row["ratio"] == pytest.approx(1, abs=0.15)


def test_bars_can_fail(script):
    memory = script("memory")
    speed = {"step_over_none": 1.0, "speed_over_dense": 2.0, "speed_over_dense_checkpointing": 2.0}
    names = ("crnet_invert", "crnet_replay", "crnet_reversible")

    def bars(**changed):
        return memory.bars({"speed": {"dtypes": {"float32": {"8": dict.fromkeys(names, speed | changed)}}}})

    assert len(bars()) == 7
    assert all(holds for *_, holds in bars())
    assert sum(not holds for *_, holds in bars(step_over_none=1.2)) == 2
    assert sum(not holds for *_, holds in bars(speed_over_dense=1.45)) == 1
    assert sum(not holds for *_, holds in bars(speed_over_dense_checkpointing=1.8)) == 1


def test_an_interval_beyond_a_gap_does_not_count(script):
    unbroken = script("memory")._unbroken
    assert unbroken([8, 12, 16, 24], [8, 12, 24]) == [8, 12]
    assert unbroken([8, 12], [12]) == []


# on_device


@pytest.mark.parametrize("limit", [1, 7, 64])
def test_largest(script, limit):
    largest = script("on_device").largest
    for most in (0, 1, 2, 3, 5, 8, 63, 64, 65, 1000):
        for start in (1, 16):
            tried = []

            def fits(n, most=most, tried=tried):
                tried.append(n)
                return n <= most

            fitting = min(most, limit)
            assert largest(fits, start=start, limit=limit) == (fitting, fitting + 1 if fitting < limit else None)
            assert max(tried) <= limit
            assert len(tried) <= 14


def test_largest_within_a_time(script, monkeypatch):
    """An attempt takes as many seconds as its size; none is begun that may end too late."""
    on_device, now = script("on_device"), [0.0]
    monkeypatch.setattr(on_device.time, "monotonic", lambda: now[0])

    def fits(n):
        now[0] += n
        return n < 13

    assert on_device.largest(fits, seconds=1000) == (12, 13)
    for seconds in range(100):
        now[0] = 0.0
        low, failed = on_device.largest(fits, seconds=seconds)
        assert now[0] <= seconds + 1  # the first one is tried in any case
        assert low < 13 <= (failed or 13)
    assert on_device.largest(fits, seconds=40) == (8, 16)


def test_cells_within_a_time(script, tmp_path):
    """What has no time left, or fails, is left for the next run; what is there needs none."""
    on_device, file = script("on_device"), script("result_file").ResultFile(tmp_path / "r.json", "what")

    def fails():
        raise ValueError("two\nlines")

    cells = {"a": (1, lambda: {"value": 1}), "b": (1, fails), "c": (1000, dict), "d": (1, dict)}
    left = on_device.measure_in_order(file, cells, minutes=1)
    assert left == "Failed: b (ValueError: two lines). No time left for: c. Run the command again."
    assert list(file.content["sections"]) == ["a", "d"]
    assert on_device.measure_in_order(file, {"a": cells["a"]}, minutes=0) is None


def test_states_are_made_ahead(script):
    parameter = torch.nn.Parameter(torch.randn(3))
    before = parameter.detach().clone()
    optimizer = torch.optim.AdamW([parameter], weight_decay=0.0)
    script("on_device").make_states(optimizer)
    assert parameter.grad is None
    assert torch.equal(parameter, before)
    assert {"exp_avg", "exp_avg_sq"} <= optimizer.state[parameter].keys()


def test_out_of_memory_is_an_answer(script):
    runs, model = script("on_device").runs, torch.nn.Linear(2, 2)

    def step(full):
        model(torch.ones(2)).sum().backward()
        if full:
            raise torch.OutOfMemoryError("full")

    assert runs(lambda: step(False), model)
    assert not runs(lambda: step(True), model)
    assert all(parameter.grad is None for parameter in model.parameters())


# gpu


@pytest.mark.slow
def test_gpu(script, tmp_path, monkeypatch, capsys):
    """A cell of each kind, over two runs; that the whole of it runs is for `--device cpu --smoke`."""
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "RANKS", {"tiny": {"crnet": 5}})
    out, arguments = tmp_path / "g.json", ("--device", "cpu", "--smoke", "--turns", 1, "--dtype", "float32")
    call(gpu, monkeypatch, *arguments, "--out", out, "--minutes", 0)
    assert json.loads(out.read_text())["sections"] == {}
    assert "No time left for: eager tiny 16 dense" in capsys.readouterr().out
    chosen = ["eager tiny 16 dense", "eager tiny 16 crnet", "eager tiny 16 cola_invert", "compiled tiny 16 dense"]
    chosen += ["limits tiny crnet_invert", "decode tiny dense", "static tiny dense"]
    cells = gpu.Bench.cells
    monkeypatch.setattr(gpu.Bench, "cells", lambda bench: {name: cells(bench)[name] for name in chosen})
    call(gpu, monkeypatch, *arguments, "--out", out)
    content = json.loads(out.read_text())
    assert list(content["sections"]) == chosen
    assert content["sections"]["eager tiny 16 crnet"]["parameters"] < content["sections"][chosen[0]]["parameters"]
    assert content["sections"]["limits tiny crnet_invert"]["batch"] == {"fits": 3, "fails": None}
    assert content["sections"]["limits tiny crnet_invert"]["sequence"] == {"fits": 48, "fails": None}
    assert {"eager tiny 16 crnet", "static tiny dense batch 32"} <= content["speed_over_dense"].keys()
    assert "No time" not in capsys.readouterr().out


def test_gpu_out_of_memory_is_a_result(script, monkeypatch):
    gpu = script("gpu")
    bench = gpu.Bench(argparse.Namespace(device="cpu", dtype="float32", smoke=True))

    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(gpu, "matrix_operations", full)
    assert bench.train("tiny", "dense", 16, compiled=False) == {"label": "dense", "out_of_memory": True}


def test_gpu_cells_and_targets(script):
    """Every contender in every way of training, the targets' first; what was aimed at, beside what came."""
    gpu = script("gpu")
    names = list(gpu.Bench(argparse.Namespace(device="cpu", smoke=False)).cells())
    for size, sequence, kind in itertools.product(("1B", "350M"), (1024, 4096), ("eager", "compiled")):
        for method in ("dense", "dense_checkpointing", "cola", "cola_invert", *(n for n in SETUPS if "crnet" in n)):
            assert f"{kind} {size} {sequence} {method}" in names
    assert names[:4] == [f"eager 1B 1024 {method}" for method in ("dense", "crnet", "cola", "crnet_invert")]
    speeds = {"dense": 10.0, "crnet": 14.0, "cola": 16.0, "crnet_invert": 13.0}
    sections = {f"eager 1B 1024 {name}": {"tokens_per_s": speed} for name, speed in speeds.items()}
    found = gpu.targets(types.SimpleNamespace(content={"sections": sections}))
    assert [(row["measured"], row["holds"]) for row in found] == [(1.4, True), (0.875, False), (0.929, True)]


def test_gpu_expectation(script, capsys):
    """By hand: CR-Net of rank 448 at 1B over dense, as the accounting has it."""
    script("gpu").expect(("h100",))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| 1B 1024 dense | ")
    assert "(1.00)" in lines[2]
    assert len(lines) == 2 + 4 * 8


# seven_billion


def seven_options(**changed):
    given = {"device": "cpu", "smoke": True, "plain_optimizer": True, "sequence": 16, "limit": 2, "turns": 1}
    return argparse.Namespace(**given | {"cap": 24.0} | changed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crnet_reversible", "cola_checkpointing"])
def test_seven_billion_trains(script, name, monkeypatch):
    """Gradients are released within the backward, and the optimizer has stepped."""
    seven, models = script("seven_billion"), []
    monkeypatch.setattr(seven, "LAYERS", 3)
    build = seven.build
    monkeypatch.setattr(seven, "build", lambda *given: models.append(build(*given)) or models[-1])
    found = seven.measure(name, 512, seven_options())
    assert (found["rows"], found["fails_with_rows"], found["tokens_per_micro_batch"]) == (2, None, 32)
    assert found["optimizer"] == "AdamW, bf16 states"
    model, before = models[0], dict(build(name, 512, "cpu", seven.SCALE).named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    changed = [key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])]
    assert any("layers.0" in key for key in changed)
    assert any("layers.2" in key for key in changed)


@pytest.mark.long
def test_seven_billion(script, tmp_path, monkeypatch, capsys):
    """The command as it is typed, one contender in its process."""
    seven, out = script("seven_billion"), tmp_path / "s.json"
    arguments = ("--device", "cpu", "--smoke", "--plain-optimizer", "--only", "crnet_invert", "--out", out)
    call(seven, monkeypatch, *arguments)
    content = json.loads(out.read_text())
    assert content["sections"].keys() == {"crnet_invert r=512", "crnet_invert r=1024"}
    assert [row["holds"] for row in content["targets"]] == [True, True]
    assert "crnet_invert r=512 trains under 24 GiB, tokens: 96, holds" in capsys.readouterr().out


def test_seven_billion_out_of_memory(script, monkeypatch):
    """Shorter sequences are tried before giving up; weights that do not fit are an answer."""
    seven = script("seven_billion")
    monkeypatch.setattr(seven, "LAYERS", 3)
    options = seven_options(sequence=256)
    forward, most = seven.CRNetForCausalLM.forward, 70

    def bounded(model, ids, **arguments):
        if ids.numel() > most:
            raise torch.OutOfMemoryError("full")
        return forward(model, ids, **arguments)

    monkeypatch.setattr(seven.CRNetForCausalLM, "forward", bounded)
    found = seven.measure("crnet_reversible", 512, options)
    assert (found["sequence"], found["rows"], found["fails_with_rows"]) == (64, 1, 2)

    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(seven, "build", full)
    assert seven.measure("dense", 0, options)["tokens_per_micro_batch"] == 0


def test_seven_billion_expectation(script, monkeypatch):
    """Weights, states and gradients by hand; what is left is divided by the bytes of a token."""
    seven = script("seven_billion")
    monkeypatch.setattr(seven, "bytes_per_token", lambda name, rank: 1e6 / seven.SCALE)
    found = seven.expect("crnet_reversible", 1024)
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    low_rank = 31 * 1024 * (11 * 4096 + 3 * 11008)
    assert found["parameters"] == layer + low_rank + 2 * 32000 * 4096 + 65 * 4096 + 31 * 7
    assert found["weights_gb"] == pytest.approx(5.89, abs=0.01)
    assert found["gradients_gb"] == pytest.approx(2 * layer / 1e9, abs=0.01)
    left = (24 - seven.ELSEWHERE_GIB) * 2**30 - found["parameters"] * (2 + seven.STATE_BYTES) - 2 * layer
    assert found["tokens_per_micro_batch"] == int(left / 1e6)
    assert not seven.expect("dense", 0)["fits"]
    assert not seven.expect("crnet_reversible", 1024, cap_gib=12)["fits"]


@pytest.mark.slow
def test_bytes_per_token_scale_with_the_width(script, monkeypatch):
    """The step from 1/32 of the width to the whole: from 1/32 to 1/16 they double."""
    seven = script("seven_billion")
    monkeypatch.setattr(seven, "LAYERS", 3)
    narrow = seven.bytes_per_token("crnet_reversible", 1024)
    monkeypatch.setattr(seven, "SCALE", seven.SCALE // 2)
    assert seven.bytes_per_token("crnet_reversible", 1024) == pytest.approx(2 * narrow, rel=0.02)
    assert narrow >= 4 * (11 * 128 + 4 * 344)  # the live state and the gradients of Y


def test_eight_bit_adamw(script):
    pytest.importorskip("bitsandbytes", reason="needs the extra 'baselines'")
    seven = script("seven_billion")
    parameter = torch.nn.Parameter(torch.randn(128, 256, dtype=torch.bfloat16))
    optimizer = seven.make_optimizer([parameter], eight_bits=True)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    states = [v for k, v in optimizer.state[parameter].items() if torch.is_tensor(v) and not k.startswith("qmap")]
    assert sum(state.nbytes for state in states) == seven.STATE_BYTES * parameter.numel()


# plan_limits


@pytest.mark.slow
def test_plan_limits(script, tmp_path, monkeypatch, capsys):
    limits, out = script("plan_limits"), tmp_path / "p.json"
    call(limits, monkeypatch, "--smoke", "--out", out)
    sections = json.loads(out.read_text())["sections"].values()
    assert [row["holds"] for row in sections] == [True, True]
    assert [row["recommended"]["label"] for row in sections] == ["none", "invert"]
    assert "does not hold" not in capsys.readouterr().out
    monkeypatch.setattr(limits, "run", lambda config, about: 10**12)
    monkeypatch.setattr(limits, "SMOKE_LIMITS_MB", (50,))
    call(limits, monkeypatch, "--smoke", "--out", out)
    assert "does not hold" in capsys.readouterr().out


# long runs


def test_soak_tells_what_grows_from_what_does_not(script):
    trend = script("soak").trend
    flat = [(float(second), 10**9 + second % 7 * 10**5) for second in range(600)]
    assert abs(trend(flat)) < 1e-3
    assert trend([(second, size + 10**5 * second) for second, size in flat]) > 0.04


def test_kills_tell_a_run_that_ended_otherwise(script, tmp_path):
    from safetensors.torch import save_file

    kills = script("kills")
    runs = [kills.Run(tmp_path / "recipe.yaml", tmp_path / name, 1) for name in ("one", "other")]
    for run in runs:
        (run.folder / "model").mkdir(parents=True)
        save_file({"a": torch.ones(2)}, run.folder / "model" / "model.safetensors")
        content = {"history": [{"step": 2, "loss": 1.5}], "after": {"loss": 1.0}}
        (run.folder / "report.json").write_text(json.dumps(content))
    assert kills.differences(*runs) == []
    save_file({"a": torch.tensor([1.0, 1.0 + 1e-6])}, runs[0].folder / "model" / "model.safetensors")
    content["history"].append({"step": 2, "loss": 1.5})
    (runs[0].folder / "report.json").write_text(json.dumps({**content, "after": {"loss": 1.1}}))
    assert kills.differences(*runs) == ["a loss twice", "final loss", "a"]
