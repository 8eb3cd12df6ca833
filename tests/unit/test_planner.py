"""Plans: what they recommend fits when it runs, costs what it says, and is the fastest; what they refuse."""

import json
import re
import resource
import subprocess
import sys

import pytest
import torch
import yaml
from test_cli import refused, run  # noqa: F401  run is a fixture

from crosslayer.accounting import (
    DEVICES,
    PRECISIONS,
    TRAININGS,
    Method,
    Shape,
    Sharding,
    Step,
    count_operations,
    count_parameters,
    estimate_memory,
    named_shape,
)
from crosslayer.accounting.devices import Device
from crosslayer.accounting.planner import (
    AS_FAST,
    Request,
    fastest,
    list_settings,
    make_plan,
    make_setting,
    parse_bytes,
    parse_tokens,
    policies_of,
)
from crosslayer.analysis import OperationCounter
from crosslayer.crnet import CRNetForCausalLM
from crosslayer.errors import ConfigError
from crosslayer.recipes import FOLDER
from crosslayer.train import build_recipe
from crosslayer.train.parallel import Parallel
from crosslayer.train.run import build_arguments, build_model_config
from family_cases import FAMILY_CASES
from model_cases import config_of
from peak_memory import allocated_peak, make_step

ISSUE = {"gpu_memory": 80e9, "gpus": 8, "sequence": 4096, "tokens_per_step": 1e6, "device": "h100"}
TINY = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4, "num_hidden_layers": 8, "rank": 16}
CPU = Device("a small CPU", 1e9, 1e9, 1e9, 1e9, 1e9, 1e9)


def test_the_recommendation_is_the_fastest_that_fits():
    plan = make_plan("llama_7b", **ISSUE)
    best = plan.recommended.setting
    assert best.fits
    assert best.peak_bytes <= plan.usable_bytes == 80e9 * 0.92
    assert all(not s.fits or AS_FAST * s.tokens_per_s <= best.tokens_per_s for s in plan.settings)
    same = [s.micro_batch for s in plan.settings if s.fits and (s.label, s.sharding) == (best.label, best.sharding)]
    assert best.micro_batch == max(same)
    assert {s.policy for s in plan.settings} == {"none", "replay", "invert", "reversible"}


def test_figures_add_up():
    plan = make_plan("llama_7b", **ISSUE, utilisation=0.5, tokens=1e11, tensor_parallel=1)
    for setting in plan.settings:
        operations = sum(setting.operations_per_token.values())
        computing = setting.step_seconds - setting.waiting_seconds
        assert setting.tokens_per_step / computing == pytest.approx(8 * 0.5 * 989e12 / operations)
        assert setting.tokens_per_s == pytest.approx(setting.tokens_per_step / setting.step_seconds)
        assert setting.days == pytest.approx(1e11 / setting.tokens_per_s / 86400)
        assert setting.device_hours == pytest.approx(setting.days * 24 * 8)
        assert setting.tokens_per_step == 8 * 4096 * setting.micro_batch * setting.accumulation
        assert setting.tokens_per_step == pytest.approx(1e6, rel=0.06)
    assert json.loads(json.dumps(plan.to_dict()))["recommended"]["setting"]["fits"]


def test_other_methods_beside_it():
    """By operations alone CR-Net is far ahead of dense; by what its kernels move it is not (docs/roofline.md)."""
    plan = make_plan("llama_1b", **ISSUE, utilisation=0.4)
    assert set(plan.beside) == {"dense", "cola", "galore"}
    dense, galore = plan.beside["dense"], plan.beside["galore"]
    assert dense.parameters == galore.parameters
    assert galore.setting.memory_bytes["optimizer"] < dense.setting.memory_bytes["optimizer"]
    assert plan.recommended.setting.tokens_per_s > 1.5 * dense.setting.tokens_per_s
    by_roofline = make_plan("llama_1b", **ISSUE, beside=("dense",))
    found, dense = (x.setting.kernel_seconds for x in (by_roofline.recommended, by_roofline.beside["dense"]))
    assert found["products"] < 0.6 * dense["products"]
    assert 1.4 < found["passes"] / dense["passes"] < 2.5


def test_seventy_billion_on_512_devices():
    plan = make_plan("llama_70b", gpus=512, sequence=4096, tokens_per_step=8e6)
    best = plan.recommended.setting
    assert best.fsdp > 1  # no replica of 26 G parameters fits
    assert best.peak_bytes < 80e9 * 0.92
    split = make_plan("llama_70b", gpus=512, sequence=4096, tokens_per_step=8e6, tensor_parallel=8)
    assert split.recommended.setting.tensor_parallel == 8
    assert split.recommended.setting.tokens_per_s < best.tokens_per_s  # most of what is low rank is done eight times


@pytest.mark.parametrize("method", ["crnet", "dense", "cola"])
def test_devices_that_split_layers_do_what_counts_say(method):
    """The time of two that split a layer, without links, over one: their share of the operations (factors: partly)."""
    given = {**ISSUE, "beside": (), "bandwidth": 1e18, "network": 1e18, "micro_batch": 1, "fsdp": 1, "utilisation": 0.4}
    one, two = (make_plan("llama_7b", method, **given | {"gpu_memory": 1e12}, tensor_parallel=n) for n in (1, 2))
    slower = one.recommended.setting.tokens_per_s / two.recommended.setting.tokens_per_s
    if method == "dense":
        assert slower == pytest.approx(1, rel=1e-3)
    else:
        assert 1.2 < slower < 1.37  # 37 % of the factors' operations at r = h / 4 are done twice


def test_a_given_split_is_kept():
    plan = make_plan("llama_13b", gpus=64, tensor_parallel=2, fsdp=8, micro_batch=2, sequence=2048, beside=())
    assert {str(setting.sharding) for setting in plan.settings} == {"2 x 8 x 4"}
    assert {setting.micro_batch for setting in plan.settings} == {2}
    assert all(setting.sharding.devices == 64 for setting in plan.settings)


def test_slow_links_change_the_split():
    """The same devices: what crosses nodes waits for the network."""
    given = {"gpus": 16, "sequence": 4096, "tokens_per_step": 1e6, "beside": (), "utilisation": 0.4}
    fast, slow = (make_plan("llama_13b", **given, network=network) for network in (50e9, 0.5e9))
    assert fast.recommended.setting.waiting_seconds == 0 < slow.recommended.setting.waiting_seconds
    assert slow.recommended.setting.tokens_per_s < 0.7 * fast.recommended.setting.tokens_per_s
    crossing = [s for s in slow.settings if s.fits and s.fsdp == 16]
    assert slow.recommended.setting.fsdp == 8, "weights are gathered within a node"
    assert max(s.tokens_per_s for s in crossing) < slow.recommended.setting.tokens_per_s
    after = make_plan("llama_13b", **given, network=50e9, overlap=False).recommended.setting
    assert after.waiting_seconds > 0


def test_smaller_memory_chooses_less_to_keep():
    peaks = {}
    for memory in (141e9, 80e9, 69e9):
        best = make_plan("llama_7b", **{**ISSUE, "gpu_memory": memory}, fsdp=1, tensor_parallel=1).recommended.setting
        peaks[memory] = (best.tokens_per_s, best.policy)
    assert [policy for _, policy in peaks.values()] == ["none", "invert", "reversible"]
    speeds = [speed for speed, _ in peaks.values()]
    assert speeds == sorted(speeds, reverse=True)


def settings_of(config, limit, rows=16, tokens=64):
    request = Request(
        device=CPU,
        gpu_memory=limit,
        sequence=tokens,
        tokens_per_step=rows * tokens,
        tokens=1e6,
        precision="float32",
        reserve=0.0,
    )
    shape = Shape.of(config)
    step = Step(sequence=tokens, micro_batch=rows, precision=PRECISIONS["float32"], fused_norms=False)
    return request, shape, step


def run_peak(config, method, rows, tokens):
    """Bytes of a whole step: weights and AdamW's states, and what the allocator hands out beside them."""
    model = CRNetForCausalLM(config).train()
    model.set_recompute(method.recompute, method.interval)
    model.fused_loss = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    step = make_step(model, torch.randint(3, 101, (rows, tokens)), optimizer)
    step()
    fixed = sum(3 * p.numel() * p.element_size() for p in model.parameters())
    return fixed + allocated_peak(step)


@pytest.mark.parametrize(("layers", "widest"), [(8, 8), (24, 24), (80, 24)])
def test_no_interval_is_proposed_that_costs_gradients_their_exactness(layers, widest):
    """docs/benchmarks.md, exactness: with one state for 80 layers their error is seven times plain autograd's."""
    assert max(policy.interval or 0 for policy in policies_of("cross_layer", layers)) == widest


@pytest.mark.parametrize("share", [1.1, 0.7, 0.55])
def test_what_is_recommended_fits_when_it_runs(share):
    """The limit is a share of what `none` takes, with 5 % in reserve, the error that the estimate may have."""
    config, rows, tokens = config_of("cross_layer", **TINY), 16, 64
    limit = share * run_peak(config, Method(), rows, tokens)
    request, shape, step = settings_of(config, limit)
    needs = {method: sum(estimate_memory(shape, step, method).values()) for method in policies_of("cross_layer", 8)}
    fitting = [method for method, size in needs.items() if size <= 0.95 * limit]
    best = min(fitting, key=lambda method: count_operations(shape, tokens, method).total)
    assert (best.recompute == "none") == (share > 1)
    assert run_peak(config, best, rows, tokens) <= limit
    if share < 1:
        assert run_peak(config, Method(), rows, tokens) > limit  # and the faster one would not
    planned = fastest(list_settings(shape, policies_of("cross_layer", 8), request))
    assert planned is not None
    assert planned.fits


def test_order_of_policies_is_that_of_what_runs():
    """By torch's counter: none < replay <= invert < reversible, as planned."""
    config = config_of("cross_layer", **TINY)
    request, shape, _ = settings_of(config, 1e9)
    planned, ran = {}, {}
    for method in policies_of("cross_layer", 8)[:4]:
        planned[method.recompute] = make_setting(shape, method, request, Sharding(), 2).tokens_per_s
        model = CRNetForCausalLM(config).train()
        model.set_recompute(method.recompute, method.interval)
        with OperationCounter() as counter:
            make_step(model, torch.randint(3, 101, (2, 64)))()
        ran[method.recompute] = counter.get_total_flops()
    assert sorted(planned, key=planned.get, reverse=True) == sorted(ran, key=ran.get)
    assert list(planned) == ["none", "replay", "invert", "reversible"]


def test_recipe_lines_build(tmp_path):
    for method in ("crnet", "dense", "cola", "low_rank"):
        plan = make_plan("llama_350m", method, **{**ISSUE, "gpu_memory": 12e9}, beside=())
        lines = plan.recommended.recipe
        assert lines["training"]["per_device_train_batch_size"] == plan.recommended.setting.micro_batch
        base = yaml.safe_load((FOLDER / "dense_350m_c4.yaml").read_text())
        for section, fields in lines.items():
            base[section] = {**base.get(section, {}), **fields}
        base["training"]["bf16"] = False
        recipe = build_recipe(base)
        config = build_model_config(recipe)
        arguments = build_arguments(recipe, tmp_path)
        assert arguments.per_device_train_batch_size == plan.recommended.setting.micro_batch
        assert config.factorization == lines["model"]["factorization"]
    shared = make_plan("llama_7b", **ISSUE, tensor_parallel=2, fsdp=2, beside=()).recommended
    assert shared.recipe["parallel"] == {"fsdp_size": 2, "tensor_parallel": 2}
    assert Parallel(**shared.recipe["parallel"]).distributed_config(8).dp_replicate_size == shared.setting.replicas
    galore = make_plan("llama_350m", "galore", **ISSUE, beside=()).recommended.recipe["training"]
    assert galore["optim"] == "galore_adamw"
    assert make_plan("llama_350m", "lor2c", **ISSUE, beside=()).recommended.recipe == {}


def test_an_interval_is_within_the_layers():
    """`reversible` keeps a state every 8 layers, where there are as many."""
    config = config_of("cross_layer", **TINY | {"num_hidden_layers": 6})
    for method in ("crnet", "crnet_reversible"):
        plan = make_plan(config, method, gpu_memory=1e9, sequence=64, precision="float32", beside=())
        for setting in plan.settings:
            config_of("cross_layer", num_hidden_layers=6, recompute=setting.policy, recompute_interval=setting.interval)


def test_every_method_has_a_plan():
    for method in TRAININGS:
        plan = make_plan("llama_130m", method, beside=())
        assert plan.recommended.setting.fits, method


def test_the_name_that_invert_had():
    with pytest.warns(FutureWarning, match="method 'crnet_low_rank' is called 'crnet_invert' now"):
        plan = make_plan("llama_60m", "crnet_low_rank", beside=())
    assert {setting.policy for setting in plan.settings} == {"invert"}
    with pytest.warns(FutureWarning, match="'invert'"):
        assert Method(recompute="low_rank") == Method(recompute="invert")
    assert make_plan("llama_60m", "low_rank", beside=()).recommended.recipe["model"]["factorization"] == "low_rank"


@pytest.mark.parametrize(
    ("text", "value"), [("1M", 1e6), ("500k", 5e5), ("2.5B", 2.5e9), ("1_000", 1e3), ("1e6", 1e6), ("12", 12.0)]
)
def test_tokens(text, value):
    assert parse_tokens(text) == value


@pytest.mark.parametrize(("text", "value"), [("80GB", 80e9), ("80GiB", 80 * 2**30), ("512MB", 512e6), ("1.5g", 1.5e9)])
def test_sizes_of_memory(text, value):
    assert parse_bytes(text) == value


BAD = [
    (["--model", "llama_8b"], ["llama_8b", "nearest", "llama_7b"]),
    (["--model", "nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
    (["--method", "crnit"], ["crnit", "nearest is crnet", "cola"]),
    (["--device", "h1000"], ["h1000", "nearest is h100"]),
    (["--gpu-memory", "80"], ["gpu_memory='80'", "80GB"]),
    (["--gpu-memory", "0GB"], ["gpu_memory=0"]),
    (["--tokens-per-step", "many"], ["tokens_per_step='many'", "1M"]),
    (["--tokens-per-step", "1k"], ["tokens_per_step=1,000", "at least 1,024"]),
    (["--tokens", "0"], ["tokens=0"]),
    (["--gpus", "0"], ["gpus=0"]),
    (["--gpus", "8", "--tensor-parallel", "3"], ["tensor_parallel=3 does not divide gpus=8"]),
    (["--rank", "0"], ["rank=0 must be a whole number from 1"]),
    (["--rank", "5000"], ["rank=5000 is outside 1..2047"]),
    (["--precision", "fp8"], ["'fp8'", "bf16_autocast"]),
    (["--gpus", "64", "--tensor-parallel", "2", "--fsdp", "24"], ["tensor_parallel=2 x fsdp=24 does not divide"]),
    (["--gpus", "64", "--tensor-parallel", "64"], ["num_attention_heads=32 cannot be split over 64 ranks"]),
    (["--gpus", "8", "--tensor-parallel", "2", "--method", "lora"], ["tensor_parallel=2 is not known for adapters"]),
    (["--gpus", "8", "--fsdp", "8", "--method", "galore"], ["fsdp=8: galore projects whole gradients", "give 1"]),
    (["--fsdp", "0"], ["fsdp=0"]),
    (["--micro-batch", "0"], ["micro_batch=0"]),
    (["--micro-batch", "999"], ["micro_batch=999", "tokens_per_step"]),
    (["--bandwidth", "fast"], ["bandwidth='fast'", "80GB"]),
    (["--network", "0GB"], ["network=0"]),
    (["--utilisation", "40"], ["utilisation=40"]),
    (
        ["--gpu-memory", "10GB"],
        [
            "does not fit in 10.0 GB",
            "the smallest setting",
            "needs",
            "reversible",
            "give 16 gpus, tensor_parallel=1, fsdp=16",
        ],
    ),
    (["--optimizer", "sgd"], ["optimizer='sgd'", "adamw_8bit"]),
    (["--optimizer", "adamw_8bit", "--method", "galore"], ["galore is trained by galore", "leave it out"]),
    (["--optimizer", "muon", "--method", "lora"], ["optimizer='muon'", "lora is trained by adamw", "leave it out"]),
    (
        ["--optimizer", "spectron", "--gradient-release"],
        ["gradient_release=True", "crnet with optimizer='spectron'", "AdamW or Muon"],
    ),
    (["--gradient-release", "--method", "lora"], ["gradient_release=True", "not known for lora"]),
    (["--gradient-release", "--gpus", "2"], ["gradient_release=True with gpus=2", "give one device"]),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_refusals(run, arguments, parts):  # noqa: F811
    given = arguments if "--model" in arguments else ["--model", "llama_7b", *arguments]
    refused(run("plan", *given), *parts)


def test_what_the_refusal_asks_for_does():
    with pytest.raises(ConfigError) as caught:
        make_plan("llama_7b", gpu_memory=10e9)
    needed = float(str(caught.value).split("needs ")[1].split(" GB")[0]) * 1e9
    assert not make_plan("llama_7b", gpu_memory=needed + 0.1e9, beside=()).changes
    changed = make_plan("llama_7b", gpu_memory=needed - 0.1e9, beside=())
    assert changed.changes
    assert changed.needed_bytes == pytest.approx(needed, rel=2e-3)


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("crnet", {"gpus": 1, "gpu_memory": 15e9}),
        ("dense", {"gpus": 8, "fsdp": 1, "tensor_parallel": 1}),
        ("dense", {"gpus": 8, "micro_batch": 16}),
        ("dense", {"gpus": 2, "gpu_memory": 20e9}),
    ],
)
def test_the_change_that_a_refusal_names_makes_it_fit(method, request_):
    given = {"sequence": 4096, "beside": (), "gpu_memory": 40e9, "tokens_per_step": 1e6, **request_}
    with pytest.raises(ConfigError) as caught:
        make_plan("llama_7b", method, **given)
    change = re.search(r"give (?:(\d+) gpus, )?tensor_parallel=(\d+), fsdp=(\d+) and micro_batch=1", str(caught.value))
    assert change is not None, caught.value
    gpus, tensor, fsdp = (int(number or request_["gpus"]) for number in change.groups())
    again = {"gpus": gpus, "tensor_parallel": tensor, "fsdp": fsdp, "micro_batch": 1}
    assert not make_plan("llama_7b", method, **given | again).changes
    if gpus > request_["gpus"]:
        assert does_not_fit("llama_7b", method, **given | {"gpus": gpus // 2})


def does_not_fit(model, method, **given):
    """As asked."""
    try:
        return bool(make_plan(model, method, **given).changes)
    except ConfigError as error:
        return "does not fit" in str(error)


@pytest.mark.parametrize("family", ["qwen3_moe_interleaved", "deepseek_v3"])
def test_families_without_tensor_parallelism(family):
    """Left out where nothing is asked; refused, as the model itself refuses it, where it is."""
    shape = Shape.of(FAMILY_CASES[family].config())
    request = {"gpus": 8, "sequence": 64, "tokens": 1e6, "tokens_per_step": 1e4, "beside": ()}
    plan = make_plan(shape, **request)
    assert {setting.tensor_parallel for setting in plan.settings} == {1}
    with pytest.raises(
        ConfigError, match=r"tensor_parallel=2: tensor parallelism of this model is not known: .*experts"
    ):
        make_plan(shape, **request, tensor_parallel=2)


def test_keys_and_devices_of_which_neither_divides_the_other():
    shape = Shape.of({"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 48, "intermediate_size": 128})
    with pytest.raises(ConfigError, match="num_key_value_heads=3 and 2 ranks: neither divides the other"):
        make_plan(shape, gpus=2, tensor_parallel=2, tokens=1e6)


def test_the_command_prints_tables_and_json(run, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "80")
    command = ("plan", "--model", "llama_7b", "--gpu-memory", "80GB", "--gpus", "8", "--sequence", "4096")
    shown = run(*command)
    assert shown.code == 0
    assert "…" not in shown.out, "a cell is cut"
    assert max(map(len, shown.out.splitlines())) <= 80
    for part in (
        "recommended: recompute",
        "because it is",
        "per_device_train_batch_size",
        "\ndense ",
        "\n1 x 8 x 1 ",
        "reversible every 24",
        "GB sent by each device in a step: fsdp",
        "360 GB/s within a node of 8",
    ):
        assert part in shown.out or part in " ".join(shown.out.split())
    content = json.loads(run(*command, "--json").out)
    assert content["recommended"]["setting"]["policy"] in shown.out
    assert content["beside"].keys() == {"dense", "cola", "galore"}
    everything = run(*command, "--all").out
    assert "…" not in everything
    assert everything.count(" yes ") + everything.count(" no ") == len(content["settings"]) > 15
    assert shown.out.count(" yes ") + shown.out.count(" no ") < 15
    split = run(*command, "--tensor-parallel", "2", "--fsdp", "2").out
    assert "parallel:\n  fsdp_size: 2\n  tensor_parallel: 2\n" in split


def test_models_from_files(run, tmp_path):  # noqa: F811
    from_recipe = json.loads(run("plan", "--model", "crnet_1b_c4", "--json").out)
    from_path = json.loads(run("plan", "--model", FOLDER / "crnet_1b_c4.yaml", "--json").out)
    assert from_path["settings"] == from_recipe["settings"]
    assert round(from_recipe["parameters"] / 1e6, 2) == 582.44
    assert from_recipe["rank"] == 448
    CRNetForCausalLM(config_of("cross_layer", **TINY)).config.save_pretrained(tmp_path)
    from_config = json.loads(run("plan", "--model", tmp_path, "--method", "dense", "--json").out)
    assert from_config["parameters"] > 0
    (tmp_path / "config.json").write_text("[1]")
    refused(run("plan", "--model", tmp_path), "holds no model")
    (tmp_path / "config.json").write_text("{")
    refused(run("plan", "--model", tmp_path), "cannot be read")


def test_it_is_quick_and_light():
    """Under 2 seconds of CPU time, without torch, transformers or datasets: nothing can start CUDA."""
    code = "import sys; sys.argv = ['crosslayer', 'plan', '--model', 'llama_70b', '--gpus', '512', '--sequence', '4096'"
    code += ", '--tokens-per-step', '4M']\nfrom crosslayer.cli import main\ntry: main()\n"
    code += "finally: print(sorted(set(sys.modules) & {'torch', 'transformers', 'datasets', 'numpy'}))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.strip().endswith("[]")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_devices_are_known_by_both_names():
    for name, device in DEVICES.items():
        assert make_plan("llama_60m", device=name, beside=()).device == device.name
        assert make_plan("llama_60m", device=f"NVIDIA {device.name}", beside=()).device == device.name


def test_an_optimizer_of_matrices(tmp_path):
    """Half of the moments of the layers; the recipe says it, and `pretrain` estimates what the plan did."""
    adamw = make_plan("llama_1b", **ISSUE, beside=())
    counts = count_parameters(named_shape("llama_1b", "cross_layer"))
    for optimizer in ("muon", "spectron"):
        plan = make_plan("llama_1b", **ISSUE, optimizer=optimizer, beside=())
        assert plan.optimizer == optimizer
        assert plan.recommended.recipe["training"]["optim"] == optimizer
        assert "optim_target_modules" not in plan.recommended.recipe["training"]
        at = {s.label: s for s in plan.settings if s.micro_batch == 1 and s.fsdp == s.tensor_parallel == 1}
        before = {s.label: s for s in adamw.settings if s.micro_batch == 1 and s.fsdp == s.tensor_parallel == 1}
        for label, setting in at.items():
            saved = before[label].memory_bytes["optimizer"] - setting.memory_bytes["optimizer"]
            assert saved == pytest.approx(4 * (counts["full_rank"] + counts["low_rank"]), rel=1e-3)
    released = make_plan("llama_1b", gpu_memory=80e9, optimizer="muon", gradient_release=True, beside=())
    assert released.recommended.recipe["optimizer"] == {"gradient_release": True}
