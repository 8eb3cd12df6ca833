"""Time by a roofline: operations are those of flops.py, bytes those of real steps; device files are read or refused."""

import importlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_accounting_families import FAMILIES
from test_cli import refused, run  # noqa: F401  run is a fixture
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from crosslayer.accounting import DEVICES, PRECISIONS, TRAININGS, Method, Shape, Sharding, Step, method_of, named_shape
from crosslayer.accounting.flops import count_operations
from crosslayer.accounting.passes import list_passes, list_update_passes
from crosslayer.accounting.planner import make_plan
from crosslayer.accounting.rates import CALLS, Rates, device_and_rates, read_rates, sheet_rates
from crosslayer.accounting.roofline import predict_step
from crosslayer.bench.contenders import Contenders
from crosslayer.bench.device import measure_device, write_rates
from crosslayer.errors import ConfigError
from peak_memory import make_step
from property_cases import cases

ROOT = Path(__file__).parents[2]
H100 = sheet_rates(DEVICES["h100"])
TINY = {
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
METHODS = ("dense", "dense_checkpointing", "cola", "low_rank", "crnet", "crnet_invert", "crnet_replay")


def flat_rates(**fields):
    """A device on which every product runs at 1e9 operations per second, and every byte takes a nanosecond."""
    one = {"rows": [1], "inner": [1], "outer": [1], "output": [1e9], "input": [1e9], "weights": [1e9]}
    attention = {"sequence": [1], "head_dim": [1], "forward": [1e9], "backward": [1e9]}
    given = {
        "device": "a flat one",
        "kind": "cpu",
        "memory": 1e9,
        "launch": 1e-9,
        "call": 1e-9,
        "bandwidth": {"float32": 1e9, "bfloat16": 1e9},
        "products": {"float32": one, "bfloat16": one},
        "attention": {"float32": attention, "bfloat16": attention},
    }
    return Rates(**given | fields)


# Operations


@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("name", TRAININGS)
def test_operations_are_those_of_the_count(name, tensor):
    factorization, method = TRAININGS[name]
    shape = (
        named_shape("llama_130m", factorization) if name != "sltrain" else named_shape("llama_130m", name, None, 0.03)
    )
    step = Step(sequence=128, micro_batch=3, sharding=Sharding(tensor=tensor))
    counted = count_operations(shape, 128, method, tokens=step.tokens, tensor=tensor)
    found = predict_step(shape, step, sheet_rates(DEVICES["h100"]), method).operations
    own = sum(each.operations for each in found if each.phase != "update")
    assert own == pytest.approx(step.tokens * counted.total, rel=1e-12)
    for phase in ("forward", "backward", "recompute"):
        of_phase = sum(each.operations for each in found if each.phase == phase)
        assert of_phase == pytest.approx(step.tokens * sum(getattr(counted, phase).values()), rel=1e-12), phase


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_of_every_family(family):
    shape = Shape.of({"model_type": family, **FAMILIES[family]})
    step = Step(sequence=64, micro_batch=2)
    for recompute in ("none", "invert", "replay", "reversible"):
        method = Method(recompute=recompute)
        counted = count_operations(shape, 64, method, tokens=step.tokens).total * step.tokens
        products = sum(each.operations for each in predict_step(shape, step, H100, method).operations)
        assert products == pytest.approx(counted, rel=1e-12)


# Bytes


def test_the_sum_of_a_position_by_hand():
    """Two tokens, float32: b Y on a CPU is scaled by itself, read and written; G takes b G of the block above."""
    shape = Shape.of(TINY | {"model_type": "crnet", "rank": 8, "num_hidden_layers": 2})
    step = Step(sequence=2, fused_norms=False)
    width = 128 + 2 * 64 + 128 + 2 * 344 + 128  # q, k and v, o, gate and up, down
    found: Counter = Counter()
    for each, times in list_passes(shape, step, Method()).items():
        if each.what == "carried":
            found[each.phase] += times * each.moved
    assert found["forward"] == 2 * 4 * 2 * width
    below, top = 3, 2  # G = dY + b G above: two read, one written; a copy at the top
    assert found["backward"] == 2 * 4 * (below + top + 2) * width  # and <G, Y_prev> of the one that builds
    on_gpu = list_passes(shape, replace(step, fused_norms=True), Method())
    assert sum(t * p.moved for p, t in on_gpu.items() if p.what == "carried" and p.phase == "forward") == 2 * 4 * width


def test_the_update_by_hand():
    shape = Shape.of(TINY | {"model_type": "llama"})
    parameters = 2 * 500 * 128 + 128 + 5 * (2 * 128 + 128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 344)
    (update,) = list_update_passes(shape, Step(sequence=8), Method())
    assert update.moved == parameters * 4 * 7
    (light,) = list_update_passes(shape, Step(sequence=8, precision=PRECISIONS["bf16"]), Method(optimizer="adamw_8bit"))
    assert light.moved == parameters * (2 * 3 + 4)


class Bytes(TorchDispatchMode):
    """What every kernel of PyTorch reads and writes, products, attention and the optimizer aside."""

    FREE = ("view", "t.", "transpose", "expand", "slice.", "detach", "unsqueeze", "squeeze", "empty", "as_strided")
    FREE += ("permute", "split", "alias", "_unsafe_view", "select", "unbind")
    ELSEWHERE = ("mm", "adamw", "scaled_dot")

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        name = str(function).removeprefix("aten.")
        if not name.startswith(self.FREE) and not any(word in name for word in self.ELSEWHERE):
            read = {key: value for key, value in kwargs.items() if key not in ("out", "grad_input")}
            tensors = [x for x in tree_flatten((args, read, output))[0] if isinstance(x, torch.Tensor)]
            sizes = (min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
            self.moved += sum(sizes)  # what is expanded counts once
        return output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("name", [*METHODS, "crnet_reversible"])
def test_bytes_are_those_of_a_step(name, dtype):
    contenders = Contenders(TINY, [name], dtype=dtype)
    model, ids = contenders.model(name), contenders.tokens(2, 100)
    # The loss on whole logits: kernels within torch's chunked one are not seen.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    train = make_step(model, ids, optimizer, torch.bfloat16 if dtype == "mixed" else None)
    train()
    with Bytes() as counted:
        train()
    method = Method(recompute="layers") if "checkpointing" in name else method_of(model.config)
    precision = PRECISIONS[{"float32": "float32", "bfloat16": "bf16", "mixed": "bf16_autocast"}[dtype]]
    step = Step(sequence=100, micro_batch=2, precision=precision, fused_norms=False, fused_loss=False)
    predicted = sum(times * each.moved for each, times in list_passes(Shape.of(model.config), step, method).items())
    assert predicted == pytest.approx(counted.moved, rel=0.1)


# Seconds


def test_seconds_by_hand():
    """One layer, one token at a time, where an operation takes a nanosecond and a byte as well."""
    shape = Shape.of(TINY | {"model_type": "llama", "num_hidden_layers": 1})
    step = Step(sequence=1, micro_batch=4, fused_norms=False)
    time = predict_step(shape, step, flat_rates(), Method())
    parts = Counter()
    for each in time.operations:
        parts["moved" if each.what not in ("layers", "head", "attention") else each.what] += (
            each.moved if each.what not in ("layers", "head", "attention") else max(each.operations, each.moved)
        )
    products = parts["layers"] + parts["head"]
    assert time.by_part["products"] == pytest.approx(1e-9 * products)
    assert time.by_part["attention"] == pytest.approx(1e-9 * 3 * 4 * 4 * 128)
    assert time.by_part["passes"] + time.by_part["update"] == pytest.approx(1e-9 * parts["moved"])
    kernels = sum(each.kernels for each in time.operations)
    host = kernels * 1e-9 * (1 + CALLS["autograd"])
    assert sum(time.host.values()) == pytest.approx(host)
    assert time.seconds == pytest.approx(sum(time.by_part.values()) + host)


def test_the_head_of_a_chunked_loss_on_a_cpu():
    """Float32 whatever the dtype, four products instead of three with bf16 weights; elsewhere as any product."""
    slow = {"rows": [1], "inner": [1], "outer": [1], "output": [1e6], "input": [1e6], "weights": [1e6]}
    rates = flat_rates(products={"float32": slow, "bfloat16": flat_rates().products["bfloat16"]})
    shape = Shape.of(TINY | {"model_type": "llama", "num_hidden_layers": 1})

    def head(precision, kind="cpu", **given):
        step = Step(sequence=1, micro_batch=4, precision=PRECISIONS[precision], **given)
        operations = predict_step(shape, step, replace(rates, kind=kind), Method()).operations
        return sum(each.seconds for each in operations if each.what == "head") / (2 * 4 * 128 * 500)

    assert head("float32") == pytest.approx(3e-6)
    assert head("bf16_autocast") == pytest.approx(3e-6)
    assert head("bf16") == pytest.approx(4e-6)
    assert head("bf16", fused_loss=False) == head("bf16", kind="cuda") == pytest.approx(3e-9)


def test_an_accelerator_waits_for_the_longer_of_two():
    shape, step = named_shape("llama_60m", "cross_layer"), Step(sequence=8, precision=PRECISIONS["bf16"])
    time = predict_step(shape, step, H100, Method())
    assert time.by_phase["backward"] == time.host["backward"] > sum(time.by_part.values())
    long = predict_step(shape, replace(step, sequence=1024, micro_batch=64), H100, Method())
    assert long.seconds == pytest.approx(sum(long.by_part.values()))
    assert long.host == time.host


sizes = st.sampled_from((1, 2, 4, 16))


@cases(60)
@given(tokens=sizes, more=sizes, recompute=st.sampled_from(("none", "invert", "replay", "reversible")))
def test_more_takes_longer(tokens, more, recompute):
    """More tokens, layers or rank, slower products, memory or launches."""
    method, shape = Method(recompute=recompute), named_shape("llama_130m", "cross_layer", 64)
    step = Step(sequence=128, micro_batch=tokens)
    base = predict_step(shape, step, H100, method).seconds
    assert predict_step(shape, replace(step, micro_batch=tokens * more), H100, method).seconds >= base
    assert predict_step(named_shape("llama_130m", "cross_layer", 64 + more), step, H100, method).seconds >= base
    assert predict_step(named_shape("llama_350m", "cross_layer", 64), step, H100, method).seconds > base
    assert predict_step(shape, step, replace(H100, launch=more * H100.launch), method).seconds >= base
    slow = {name: speed / more for name, speed in H100.bandwidth.items()}
    assert predict_step(shape, step, replace(H100, bandwidth=slow), method).seconds >= base
    assert predict_step(shape, step, sheet_rates(replace(DEVICES["h100"], flops=989e12 / more)), method).seconds >= base


def test_recomputation_takes_longer():
    step = Step(sequence=1024, micro_batch=4)
    for factorization in ("dense", "cola", "cross_layer"):
        shape = named_shape("llama_1b", factorization)
        time = {name: predict_step(shape, step, H100, Method(recompute=name)).seconds for name in ("none", "layers")}
        assert time["none"] < time["layers"] or factorization != "dense"
    shape = named_shape("llama_1b", "cross_layer")
    policies = [
        predict_step(shape, step, H100, Method(recompute=n)) for n in ("none", "replay", "invert", "reversible")
    ]
    assert [*policies] == sorted(policies, key=lambda time: time.seconds)
    assert policies[0].by_phase["recompute"] == 0 < policies[1].by_phase["recompute"]


def test_rates_are_interpolated_in_logarithms():
    grid = {"rows": [4, 64], "inner": [8], "outer": [1, 100]}
    values = {of: [1e9, 1e11, 1e10, 1e12] for of in ("output", "input", "weights")}
    rates = flat_rates(products={"float32": grid | values}, bandwidth={"float32": 1e15})

    def rate(rows, inner, outer):
        return 2 * rows * inner * outer / rates.product_seconds("float32", "input", rows, inner, outer)

    assert rate(4, 8, 1) == pytest.approx(1e9)
    assert rate(64, 8, 100) == pytest.approx(1e12)
    assert rate(16, 8, 10) == pytest.approx(1e9 * 10**0.5 * 10)  # half way in both
    assert rate(1e6, 1, 1e6) == pytest.approx(1e12)
    assert rate(1, 99, 0.5) == pytest.approx(1e9)


def test_a_data_sheet_reaches_less_in_narrow_products():
    for device in DEVICES.values():
        rates = sheet_rates(device)
        wide, narrow = (
            8192 * 4096 * n / rates.product_seconds("bfloat16", "output", 8192, 4096, n) for n in (4096, 256)
        )
        assert 0.6 * device.flops < 2 * wide < 0.75 * device.flops
        assert 0.5 * wide < narrow < 0.9 * wide
        tf32 = rates.product_seconds("tf32", "output", 8192, 4096, 4096)
        assert tf32 == pytest.approx(2 * rates.product_seconds("bfloat16", "output", 8192, 4096, 4096))
        assert device.float32_flops < device.flops
    tiny = H100.product_seconds("bfloat16", "output", 64, 16, 65536)
    assert tiny == pytest.approx(2 * (64 * 16 + 16 * 65536 + 64 * 65536) / (0.85 * 3.35e12)), "bound by memory"


# The device at hand, and its file


def measure_little(monkeypatch):
    grid = {"rows": (16, 64), "inner": (16, 64), "outer": (16, 64)}
    for name, value in {"GRIDS": grid, "SEQUENCES": (16, 32), "POOL": 2**22, "PASS_ELEMENTS": 2**16}.items():
        monkeypatch.setattr(f"crosslayer.bench.device.{name}", {"cpu": value})


@pytest.fixture
def quickly(monkeypatch):
    """Devices are measured over next to nothing."""
    measure_little(monkeypatch)


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as monkeypatch:
        measure_little(monkeypatch)
        yield measure_device("cpu")


def test_a_device_is_measured(measured):
    assert measured.kind == "cpu"
    assert measured.threads == torch.get_num_threads()
    assert set(measured.products) == set(measured.attention) == set(measured.bandwidth) == {"float32", "bfloat16"}
    assert 1e6 < measured.peak["float32"] < 1e14
    assert 1e7 < measured.bandwidth["float32"] < 1e13
    assert 1e-8 < measured.launch < 1e-3
    assert measured.memory > 1e8
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_file_of_rates_comes_back(measured, tmp_path):
    path = tmp_path / "device.json"
    write_rates(measured, path)
    assert read_rates(path) == measured
    device, rates = device_and_rates(str(path))
    assert rates == measured
    assert (device.name, device.memory) == (measured.device, measured.memory)
    assert str(tmp_path) not in path.read_text()
    with pytest.raises(ConfigError, match=r"output=.* cannot be written"):
        write_rates(measured, tmp_path)


def test_a_known_card_keeps_its_links():
    rates = flat_rates(device="NVIDIA H100 80GB HBM3", kind="cuda")
    assert rates.to_device().link == DEVICES["h100"].link
    assert flat_rates().to_device().link < 1e10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("what"), "holds something else"),
        (lambda c: c.update(format=0), "is of another format than 1"),
        (lambda c: c.pop("launch"), "is damaged .*launch"),
        (lambda c: c.update(speed=1), "is damaged .*speed"),
        (lambda c: c.update(kind="tpu"), "is damaged .*kind"),
        (lambda c: c.update(launch=0), "is damaged .*launch"),
        (lambda c: c.update(memory="much"), "is damaged .*memory"),
        (lambda c: c["bandwidth"].pop("float32"), "is damaged .*bandwidth"),
        (lambda c: c["bandwidth"].update(float32=float("nan")), "is damaged .*bandwidth"),
        (lambda c: c["products"].pop("float32"), "is damaged .*products"),
        (lambda c: c["products"]["float32"].pop("rows"), "is damaged .*rows"),
        (lambda c: c["products"]["float32"]["input"].pop(), "is damaged .*values for"),
        (lambda c: c["products"]["float32"]["rows"].reverse(), "is damaged .*do not ascend"),
        (lambda c: c["attention"]["float32"].update(forward=[]), "is damaged .*above 0"),
        (lambda c: c.update(products=7), "is damaged"),
    ],
)
def test_bad_files(change, words, measured, tmp_path):
    content = json.loads(json.dumps(measured.to_dict()))
    change(content)
    path = tmp_path / "device.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=words) as caught:
        read_rates(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00\xff", '"rates of a device"'])
def test_foreign_files(text, tmp_path):
    path = tmp_path / "device.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"cannot be read|holds something else"):
        read_rates(path)
    with pytest.raises(ConfigError, match="does not exist"):
        device_and_rates(str(tmp_path / "none.json"))


def test_dtypes_that_a_device_lacks():
    one = flat_rates()
    only = flat_rates(products={"float32": one.products["float32"]})
    step = Step(sequence=8, precision=PRECISIONS["bf16"])
    with pytest.raises(ConfigError, match=r"a flat one has no rates for bfloat16 \(it has float32\)"):
        predict_step(named_shape("llama_60m"), step, only)
    with pytest.raises(ConfigError, match="has no rates for tf32"):
        predict_step(named_shape("llama_60m"), replace(step, precision=PRECISIONS["tf32"]), one)
    with pytest.raises(ConfigError, match=r"dtypes='tf32': .* has float32, bfloat16"):
        measure_device("cpu", ["tf32"])
    with pytest.raises(ConfigError, match="device='meta' cannot be measured"):
        measure_device("meta")


def test_plans_for_a_measured_device(measured, tmp_path):
    path = tmp_path / "device.json"
    write_rates(measured, path)
    given = {"gpu_memory": 80e9, "sequence": 128, "tokens_per_step": 1024, "beside": (), "micro_batch": 2}
    plan = make_plan("llama_60m", device=str(path), precision="float32", **given)
    assert plan.device == measured.device
    assert plan.is_measured
    assert plan.peak_flops == measured.peak["float32"]
    best = plan.recommended.setting
    step = Step(sequence=128, micro_batch=2, fused_norms=False, accumulates=True)
    time = predict_step(named_shape("llama_60m", "cross_layer"), step, measured, Method(recompute=best.policy))
    micro_batch = time.seconds - time.by_phase["update"]
    assert best.accumulation == 4
    assert best.step_seconds == pytest.approx(4 * micro_batch + time.by_phase["update"])
    assert best.kernel_seconds["products"] == pytest.approx(4 * time.by_part["products"])
    sheet = make_plan("llama_60m", device="h100", precision="float32", **given)
    assert not sheet.is_measured
    assert sheet.recommended.setting.tokens_per_s > best.tokens_per_s
    flat = make_plan("llama_60m", device=str(path), precision="float32", utilisation=0.5, **given)
    assert flat.recommended.setting.kernel_seconds == {}


def test_a_slow_device_is_measured_over_less(quickly, monkeypatch):
    monkeypatch.setattr("crosslayer.bench.device.SECONDS_OF_PRODUCTS", 1e-9)
    found = measure_device("cpu", ["float32"]).products["float32"]
    assert [found[axis] for axis in ("rows", "inner", "outer")] == [[16], [16], [16]]
    assert len(found["output"]) == 1


def test_the_commands(run, quickly, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "device.json"
    shown = run("bench", "device", "--device", "cpu", "--output", path)
    assert shown.code == 0, shown.err
    assert f"crosslayer plan --device {path}" in shown.out
    asked = ("plan", "--model", "llama_60m", "--device", path, "--gpu-memory", "80GB", "--sequence", "256")
    planned = run(*asked)
    assert planned.code == 0, planned.err
    text = " ".join(planned.out.split())
    assert "by a roofline per operation, as measured" in text
    assert "seconds of a step" in text
    assert "…" not in planned.out
    assert max(map(len, planned.out.splitlines())) <= 80
    assert json.loads(run(*asked, "--json").out)["is_measured"]
    printed = json.loads(run("bench", "device", "--device", "cpu", "--dtypes", "float32").out)
    assert list(printed["products"]) == ["float32"]
    path.write_text(json.dumps(printed))
    refused(run(*asked), "has no rates for bfloat16 (it has float32)")
    refused(run("bench", "device", "--device", "cpu", "--dtypes", "tf32"), "dtypes='tf32'", "float32, bfloat16")
    refused(run("bench", "device", "--output", tmp_path), "is a folder")
    refused(run("bench", "device", "--output", tmp_path / "no" / "device.json"), "lies in none")
    refused(run("plan", "--device", tmp_path / "none.json"), "does not exist", "crosslayer bench device")
    path.write_text("{}")
    refused(run("plan", "--device", path), "holds something else")
    refused(run("plan", "--device", "h1000"), "the nearest is h100", "crosslayer bench device")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("roofline")


def test_the_script_measures_and_compares(quickly, script, monkeypatch):
    """benchmarks/roofline.py at a tiny size."""
    monkeypatch.setattr(script, "SHAPES", {"tiny": (64, 96, 2, 2, 1, 16)})
    found = script.measure("tiny", "float32", turns=2)
    assert list(found["steps"]) == [*script.CONTENDERS]
    assert {len(seconds) for seconds in found["steps"].values()} == {2}
    rates = script.rates_of(json.loads(json.dumps(found)))
    for contender in script.CONTENDERS:
        assert script.predict("tiny", "float32", contender, rates).seconds > 0
    pairs = {"fast": (1.0, 2.0), "as fast": (1.04, 1.0), "slow": (1.2, 1.9)}
    assert script.wrong_orders(pairs) == [("fast", "slow")]


def test_what_was_measured_is_what_was_predicted(script):
    """The file that docs/roofline.md shows: within 15 %, and in the right order where 5 % lie between two."""
    found = script.compared(script.ResultFile(script.RESULTS, ""))
    assert len(found) == 6
    for place, pairs in found.items():
        assert list(pairs) == [*script.CONTENDERS]
        assert max(abs(predicted / measured - 1) for measured, predicted in pairs.values()) < 0.15, place
        assert not script.wrong_orders(pairs, apart=0.05), place


def cells_of(table):
    """{first cell: the others} of a Markdown table, numbers without what stands in brackets."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {first: [float(cell.split()[0].replace(",", "")) for cell in rest] for first, *rest in rows}


def test_what_the_page_says(script):
    """Its figures in words."""
    layer = cells_of(script.per_layer())
    dense, crnet = layer["dense"], layer["CR-Net, none"]
    assert round(crnet[0] / dense[0], 2) == 0.42
    assert round(crnet[-1] / dense[-1], 1) == 1.5
    assert round(crnet[5] / crnet[-1], 2) == 0.24
    assert round(1e3 * (crnet[0] + crnet[1]) / crnet[-1], -1) == 100
    ranks = cells_of(script.ranks())
    quarter, eighth, sixteenth = (ranks[f"{rank} (h / {2048 // rank})"] for rank in (512, 256, 128))
    halved = [fast / slow for fast, slow in zip(eighth, quarter, strict=True)]
    assert 1.25 < halved[-1] < 1.35
    assert [round(min(halved[:3]), 2), round(max(halved[:3]), 2)] == [1.09, 1.12]
    again = [fast / slow for fast, slow in zip(sixteenth[:3], eighth[:3], strict=True)]
    assert [round(min(again), 2), round(max(again), 2)] == [1.03, 1.05]
    carries = cells_of(script.carries())
    narrow, wide = carries["bf16 weights and carry"], carries["bf16 weights, float32 carry"]
    assert all(1.25 < fast / slow < 1.45 for fast, slow in zip(narrow, wide, strict=True))
    shares = script.bound().splitlines()
    assert all(float(share) > 50 for share in re.findall(r"/ (\d+)\)", shares[6])[:3]), "passes"
