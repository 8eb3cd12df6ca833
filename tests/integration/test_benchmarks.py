"""The scripts in benchmarks/ run, at tiny sizes, and their decisions are right."""

import argparse
import importlib
import itertools
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch

from crosslayer.bench.contenders import SETUPS
from tiny_run import write_texts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """script("gpu") -> the module benchmarks/gpu.py, freshly imported."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    yield load
    torch.set_num_threads(threads)


def call(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()


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


# ablations


@pytest.fixture
def ablation_options(tmp_path):
    texts = write_texts(tmp_path / "texts")
    lines = [json.dumps({"text": path.read_text()}) for path in sorted(texts.iterdir())]
    for name, part in (("train", lines[:45]), ("valid", lines[45:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    return argparse.Namespace(
        train=tmp_path / "train.jsonl", validation=tmp_path / "valid.jsonl", work=tmp_path / "work", smoke=False
    )


def test_ablations_are_what_they_say(script, ablation_options):
    ablations = script("ablations")
    base = ablations.base_content(ablation_options)
    about = {
        name: ablations.about(ablations.content_for(changes, base, None), ablation_options)
        for name, changes in ablations.ABLATIONS.items()
    }
    sizes = {name: content["parameters_without_embeddings"] for name, content in about.items()}
    layer, low_rank = 4 * 64**2 + 3 * 64 * 172, 16 * (11 * 64 + 3 * 172)
    norms, betas = 13 * 64, 5 * 7
    assert sizes["dense"] == 6 * layer + norms
    assert sizes["CR-Net"] == layer + 5 * low_rank + norms + betas
    assert sizes["b = 1, fixed"] == sizes["ranks middle high, ends low"] == sizes["CR-Net"]
    assert sizes["no carried term"] == sizes["CR-Net"] - betas
    assert sizes["low-rank first layer"] == 6 * low_rank + norms + betas
    assert sizes["low-rank first layer, equal parameters"] == pytest.approx(sizes["CR-Net"], rel=0.03)
    (tokens,) = {content["tokens"] for content in about.values()}
    assert tokens == pytest.approx(20 * sizes["dense"], rel=0.001)
    rates = {"embedding": 0.01, "low_rank": 0.004, "full_rank": 0.001}
    factors = ablations.content_for({}, base, rates)["parameter_groups"]
    assert [factors[f"{kind}_lr_factor"] for kind in rates] == [5, 2, 0.5]


@pytest.mark.slow
@pytest.mark.long
def test_ablations(script, ablation_options, tmp_path, monkeypatch, capsys):
    ablations = script("ablations")
    monkeypatch.setattr(ablations, "RANKS", (6,))
    kept = {name: ablations.ABLATIONS[name] for name in ("CR-Net", "b = 1, fixed")}
    monkeypatch.setattr(ablations, "ABLATIONS", kept)
    out, texts = (
        tmp_path / "ablations.json",
        ("--train", ablation_options.train, "--validation", ablation_options.validation),
    )
    arguments = (*texts, "--work", ablation_options.work, "--out", out, "--smoke")
    call(ablations, monkeypatch, *arguments)
    sections = json.loads(out.read_text())["sections"]
    assert list(sections) == ["CR-Net", "b = 1, fixed", "rank 6"]
    assert all(len(set(section.get("losses") or section["result"]["losses"])) == 3 for section in sections.values())
    assert sections["CR-Net"]["result"]["rates"] == sections["rank 6"]["tuning"][0]["rates"]
    trace = sections["rank 6"]["traces"][0]
    assert [line["step"] for line in trace] == list(range(1, 7))
    assert trace[-1]["b"]["min"] < trace[-1]["b"]["mean"] < trace[-1]["b"]["max"]
    assert len(trace[-1]["gradient_norm"]) == 5
    assert str(tmp_path) not in out.read_text()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    call(ablations, monkeypatch, *arguments)
    assert json.loads(out.read_text())["sections"] == sections
    monkeypatch.syspath_prepend(BENCHMARKS.parent / "docs")
    pytest.importorskip("scipy")
    from claims import claim, crnet

    values, _ = crnet.learnable_b(claim.Results(out.parent))
    assert values["crnet"].startswith(f"{sections['CR-Net']['result']['loss_mean']:.4f} ± ")


# first_layer


def first_layer_models(first_layer, options, *names):
    """Built models of contenders, altered."""
    from crosslayer.train.run import build_model, build_model_config

    study = first_layer.Study(options, {})
    for name in names:
        model = build_model(build_model_config(first_layer.as_recipe(study.content(name))), 0)
        first_layer.alter(model, first_layer.CONTENDERS[name])
        yield model


def test_first_layers_have_equal_parameters(script, ablation_options):
    first_layer = script("first_layer")
    study = first_layer.Study(ablation_options, {})
    sizes = {name: study.parameters(name) for name in first_layer.CONTENDERS}
    layer, low_rank = 4 * 64**2 + 3 * 64 * 172, 11 * 64 + 3 * 172
    others, whole = 13 * 64 + 5 * 7, sizes.pop("full rank (CR-Net)")
    assert whole == layer + 5 * 16 * low_rank + others
    assert sizes.pop(first_layer.NOT_EQUAL) == 6 * 16 * low_rank + others
    assert sizes["low rank"] == sizes["low rank, 30 and 18 above"] == 6 * 20 * low_rank + others
    assert sizes["plus a diagonal"] - sizes["low rank"] == 7 * 64
    assert sizes["carries its input"] - sizes["low rank"] == 7
    assert all(size == pytest.approx(whole, rel=0.01) for size in sizes.values())


def test_first_layers_start_as_they_say(script, ablation_options):
    first_layer = script("first_layer")
    names = ("low rank", "orthogonal start", "spectral start", "plus a diagonal", "carries its input")
    models = dict(zip(names, first_layer_models(first_layer, ablation_options, *names), strict=True))
    up = {name: model.model.layers[0].mlp.up_proj for name, model in models.items()}
    down = {name: model.model.layers[0].mlp.down_proj for name, model in models.items()}
    for linear in (up["orthogonal start"], down["orthogonal start"]):
        for gram in (linear.A.weight @ linear.A.weight.T, linear.B.weight.T @ linear.B.weight):
            torch.testing.assert_close(gram, gram[0, 0] * torch.eye(20), atol=1e-5, rtol=0)
    norms = [(linear.B.weight @ linear.A.weight).norm().item() for linear in up.values()]
    assert norms[1] == pytest.approx(norms[0], rel=0.1)
    singular = torch.linalg.svdvals(up["spectral start"].B.weight @ up["spectral start"].A.weight)
    expected = 0.02 * (64**0.5 + 172**0.5)  # of a dense matrix: its largest, about
    assert singular[0].item() == pytest.approx(expected, rel=0.1)
    assert (singular > 1e-5).sum() == 20
    x = torch.randn(3, 64)
    wide = torch.cat([x, x, x], dim=-1)[:, :172]  # of gate and up
    torch.testing.assert_close(up["carries its input"](x), wide)
    h = torch.randn(3, 172)
    torch.testing.assert_close(down["carries its input"](h), h[:, :64])
    for linear, given in ((up["plus a diagonal"], x), (down["plus a diagonal"], h)):
        torch.testing.assert_close(linear(given), given @ linear.A.weight.T @ linear.B.weight.T)
        torch.nn.init.normal_(linear.diagonal)
        matrix = torch.zeros(linear.out_features, linear.in_features)
        matrix.fill_diagonal_(1.0)
        matrix[:64, :64] *= linear.diagonal
        dense = linear.B.weight @ linear.A.weight + matrix
        torch.testing.assert_close(linear(given), given @ dense.T, atol=1e-5, rtol=1e-4)


def test_factorized_is_the_best_of_its_rank(script):
    weight = torch.randn(30, 12, dtype=torch.float64).float()
    linear = script("first_layer").factorized(weight, 5)
    rest = torch.linalg.svdvals(weight)[5:].norm()
    torch.testing.assert_close((weight - linear.B.weight @ linear.A.weight).norm(), rest)
    torch.testing.assert_close(linear.A.weight.norm(dim=1), linear.B.weight.norm(dim=0))


def test_first_layers_train_as_they_say(script, ablation_options, monkeypatch):
    """Factors join the optimizer when the full-rank layer ends, and a slower layer has its own rate."""
    first_layer = script("first_layer")
    ablation_options.smoke = True
    study = first_layer.Study(ablation_options, {"embedding": 0.03, "low_rank": 0.004, "full_rank": 0.0004})
    trainers, prepare = [], first_layer.prepare

    def watched(trainer, **settings):
        trainers.append(trainer)
        prepare(trainer, **settings)

    monkeypatch.setattr(first_layer, "prepare", watched)
    half = first_layer.Contender(model=first_layer.EQUAL, full_rank_share=0.5)
    monkeypatch.setitem(first_layer.CONTENDERS, "half", half)
    study.run("half", 1.0, 0, True)
    study.run("a quarter of the rate", 2.0, 0, True)
    linear = trainers[0].model.model.layers[0].mlp.up_proj
    optimizer = trainers[0].own_optimizer()
    groups = {group["name"]: group["params"] for group in optimizer.param_groups}
    assert groups["full_rank"] == []
    assert len(groups["low_rank"]) == 6 * 7 * 2
    assert linear.A.out_features == 20
    assert optimizer.state[linear.A.weight]["step"] == 3  # of six steps
    assert optimizer.state.keys() == set(trainers[0].model.parameters())
    rates = {group["name"]: group["initial_lr"] for group in trainers[1].own_optimizer().param_groups}
    assert (rates["low_rank"], rates["first_layer"]) == pytest.approx((0.008, 0.002))
    sizes = {group["name"]: len(group["params"]) for group in trainers[1].own_optimizer().param_groups}
    assert (sizes["low_rank"], sizes["first_layer"]) == (5 * 7 * 2, 7 * 2)


@pytest.mark.slow
@pytest.mark.long
def test_first_layer(script, ablation_options, tmp_path, monkeypatch, capsys):
    first_layer = script("first_layer")
    kept = ("full rank (CR-Net)", "low rank", "spectral start", "plus a diagonal", "carries its input")
    monkeypatch.setattr(first_layer, "CONTENDERS", {name: first_layer.CONTENDERS[name] for name in kept})
    out, texts = tmp_path / "f.json", ("--train", ablation_options.train, "--validation", ablation_options.validation)
    arguments = (*texts, "--rates", 0.03, 0.004, 0.0004, "--work", ablation_options.work, "--out", out, "--smoke")
    call(first_layer, monkeypatch, *arguments)
    sections = json.loads(out.read_text())["sections"]
    screening = {name: sections[f"screening: {name}"] for name in kept}
    assert len({section["loss"] for section in screening.values()}) == 5
    best = min(kept[2:], key=lambda name: screening[name]["loss"])
    assert best in sections
    assert sum(name in sections for name in kept) == 4
    assert sections["low rank"]["rates"]["low_rank"] == 0.004 * screening["low rank"]["best_factor"]
    assert first_layer.screened(out).count("\n") == 6
    assert first_layer.trained(out).count("\n") == 5
    assert str(tmp_path) not in out.read_text()
    call(first_layer, monkeypatch, *arguments)
    assert json.loads(out.read_text())["sections"] == sections


# stability


def test_products_are_bounded(script):
    from crosslayer.crnet import CrossLayerLinear

    stability = script("stability")
    torch.manual_seed(0)
    linears = torch.nn.ModuleList(CrossLayerLinear(12, out, 4) for out in (12, 30, 12, 12))
    for linear, scale in zip(linears, (0.1, 3.0, 1.5, 0.0), strict=True):
        linear.B.weight.data.mul_(scale)

    def product(linear):
        return (linear.B.weight @ linear.A.weight).detach()

    before = [product(linear) for linear in linears]
    callback, bound = stability.BoundedProducts(0.5), 0.5
    for _ in range(3):
        callback.on_optimizer_step(None, None, None, model=linears)
    for linear, was in zip(linears, before, strict=True):
        norm = torch.linalg.matrix_norm(was, 2)
        expected = was * min(1.0, bound / norm) if norm > 0 else was
        torch.testing.assert_close(product(linear), expected, atol=1e-3, rtol=1e-3)
    assert sum(torch.linalg.matrix_norm(was, 2) > bound for was in before) == 2


def test_normalized_increments(script):
    from crosslayer import CRNetConfig, CRNetForCausalLM

    stability = script("stability")
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    torch.manual_seed(0)
    model = CRNetForCausalLM(CRNetConfig(**shape, num_attention_heads=2, rank=4)).double()
    for linear in stability.cross_layer_linears(model):
        torch.nn.init.normal_(linear.B.weight, std=0.1)
    stability.normalize_increments(argparse.Namespace(model=model))
    linear = model.model.layers[1].mlp.up_proj
    x, below = torch.randn(2, 5, 16).double(), torch.randn(2, 5, 24).double()
    low_rank = x @ linear.A.weight.T
    rms = (low_rank.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(linear(x, below), (1 + 1e-6) * below + low_rank / rms @ linear.B.weight.T)
    ids = torch.randint(32, (2, 6))
    model.train()(ids, labels=ids).loss.backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.eval()(ids, labels=ids).loss.backward()  # plain autograd
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad)


def test_a_limit_is_found(script, ablation_options, monkeypatch):
    """At multiple m all seeds below 40 / m train; a multiple is given up at the first that does not."""
    stability = script("stability")
    study = stability.Study(ablation_options, {})
    study.unigram_loss = 6.0
    tried = []

    def run(name, multiple, seed):
        tried.append((multiple, seed))
        return None if multiple > 20 else 5.0 + abs(multiple - 2) / 100 if seed < 40 / multiple else 6.5

    monkeypatch.setattr(study, "run", run)
    found = study.measure_variant("plain")
    assert (found["largest_multiple"], found["is_at_end_of_grid"]) == (4.0, False)
    tested = {test["multiple"]: test["losses"] for test in found["tested"]}
    assert {multiple: len(losses) for multiple, losses in tested.items()} == {2.0: 10, 4.0: 10, 8.0: 6}
    assert found["best"]["multiple"] == 2.0
    assert found["best"]["loss_mean"] == 5.0
    assert [point["multiple"] for point in found["losses"]] == [0.5, 1.0, 2.0, 4.0, 8.0]
    monkeypatch.setattr(study, "run", lambda *_: 5.0)
    assert study.measure_variant("plain")["is_at_end_of_grid"]
    monkeypatch.setattr(study, "run", lambda *_: None)
    found = study.measure_variant("plain")
    assert found["largest_multiple"] is found["best"] is None


def test_what_a_unigram_model_loses(script, ablation_options):
    from crosslayer.data import prepare_data

    stability = script("stability")
    ablation_options.smoke = True
    study = stability.Study(ablation_options, {})
    prepared = prepare_data(stability.as_recipe(study.base).data)
    counts = dict.fromkeys(range(len(prepared.tokenizer)), 1)
    for row in prepared.train:
        for token in row["input_ids"]:
            counts[token] += 1
    total, losses = sum(counts.values()), []
    for row in itertools.islice(prepared.validation, 64):
        losses += [-math.log(counts[label] / total) for label in row["labels"][1:] if label >= 0]
    assert study.unigram_loss == pytest.approx(sum(losses) / len(losses))


@pytest.mark.slow
@pytest.mark.long
def test_stability(script, ablation_options, tmp_path, monkeypatch, capsys):
    stability = script("stability")
    kept = ("plain", "beta's rate x 10", "norm of A B at most 1", "normalised increment")
    monkeypatch.setattr(stability, "VARIANTS", {name: stability.VARIANTS[name] for name in kept})
    out, texts = tmp_path / "s.json", ("--train", ablation_options.train, "--validation", ablation_options.validation)
    arguments = (*texts, "--rates", 0.03, 0.004, 0.0004, "--work", ablation_options.work, "--out", out, "--smoke")
    call(stability, monkeypatch, *arguments)
    sections = json.loads(out.read_text())["sections"]
    assert list(sections) == ["settings", *kept, "time"]
    assert sections["time"]["over_plain"]["plain"] == 1.0
    losses = {name: sections[name]["losses"][0]["loss_mean"] for name in kept}
    assert len(set(losses.values())) == 3  # products are below their bound after four steps
    assert sections["plain"]["tested"][-1]["losses"] == [None]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert stability.limits(out).count("\n") == 5
    assert str(tmp_path) not in out.read_text()
    call(stability, monkeypatch, *arguments)
    assert json.loads(out.read_text())["sections"] == sections


@pytest.mark.parametrize("name", ["first_layer", "stability"])
def test_tables_of_ablations_are_up_to_date(script, name):
    module, filled = script(name), script("page_tables").filled
    page = module.PAGE.read_text(encoding="utf-8")
    assert filled(page, module.TABLES, module.PAGE.name) == page, f"run: python benchmarks/{name}.py --write"


def test_rates_of_a_study(script, tmp_path, monkeypatch):
    """Those it was begun with, else those given, else those that ablations.py found."""
    ablations, ResultFile = script("ablations"), script("result_file").ResultFile
    given, mine = (1.0, 2.0, 3.0), {"embedding": 4.0, "low_rank": 5.0, "full_rank": 6.0}
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(ablations, "__file__", str(tmp_path / "ablations.py"))
    file = ResultFile(tmp_path / "r.json", "")
    with pytest.raises(SystemExit, match="--rates"):
        ablations.rates_of(None, file)
    found = {"sections": {"CR-Net": {"result": {"rates": mine}}}}
    (tmp_path / "results" / "ablations.json").write_text(json.dumps(found))
    assert ablations.rates_of(None, file) == mine
    assert ablations.rates_of(given, file) == {"embedding": 1.0, "low_rank": 2.0, "full_rank": 3.0}
    file.section("settings", lambda: {"rates": mine})
    assert ablations.rates_of(None, file) == mine
    with pytest.raises(SystemExit, match="begun with the rates"):
        ablations.rates_of(given, file)


# studies of adapters


@pytest.mark.parametrize(
    ("best", "tried"),
    [(0.004, (1, 4, 16)), (0.0000625, (1 / 64, 1 / 16, 1 / 4, 1, 4, 16)), (1e9, (1, 4, 16, 64, 256, 1024))],
)
def test_rates_are_searched_until_the_best_lies_inside(script, best, tried):
    found = script("adapter_study").tune(lambda rate: {"loss": abs(math.log(rate / best))}, 0.004)
    assert [rate * 1000 for rate, _ in found["tried"]] == pytest.approx(list(tried))
    assert found["inside"] is (best < 1)
    assert found["rate"] == pytest.approx(min(best, 1.024))


def test_a_rate_that_diverged_is_not_the_best(script):
    found = script("adapter_study").tune(lambda rate: {"loss": 1.0 if rate == 1.0 else None}, 1.0)
    assert found == {"rate": 1.0, "inside": True, "tried": [[0.25, None], [1.0, 1.0], [4.0, None]]}


@pytest.fixture
def tiny_tokenizer():
    from crosslayer.data.tokenizer import train_tokenizer

    return train_tokenizer(["what is two and two? it is four."] * 9, 300, 64)


def test_texts_of_the_causal_study(script, tiny_tokenizer, tmp_path):
    """Every byte is counted once, prompts are not predicted, and training rows hold nothing of the held-out ones."""
    causal = script("lor2c_causal")
    questions = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n} \u00e9"} for n in range(40)]
    asked = [{"instruction": f"Say {n}.", "input": "", "output": f"{n} " * 3} for n in range(40)]
    for name, rows in (("gsm8k", questions), ("instructions", asked)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = argparse.Namespace(gsm8k=tmp_path / "gsm8k.jsonl", instructions=tmp_path / "instructions.jsonl")
    length = causal.Length(tokens=96, validation_rows=3)
    texts = causal.Texts(options, tiny_tokenizer, length)
    documents = ["one \u00e9", "two"] * 40
    rows = texts._packed(documents)
    predicted = [token for row in rows for token in row["labels"][1:]]
    stream = "".join(documents).encode()
    counted = sum(texts.bytes_of[token] for token in predicted)
    assert len(stream) - 97 < counted <= len(stream)
    assert all(len(row["input_ids"]) == 96 for row in rows)
    training, held_out = texts["instructions"]
    assert (len(training), len(held_out)) == (36, 3)
    for row in training:
        text = tiny_tokenizer.decode([token for token in row["labels"] if token != -100], skip_special_tokens=True)
        whole = tiny_tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        assert whole.endswith(f"### Response:\n{text}")
        assert text.split() == [text.split()[0]] * 3
    assert not {tuple(row["input_ids"]) for row in training} & {tuple(row["input_ids"]) for row in held_out}


def test_bits_per_byte(script, tiny_tokenizer, tmp_path):
    """A model that knows nothing: the logarithm of its vocabulary for each token."""
    causal = script("lor2c_causal")
    texts = causal.Texts(argparse.Namespace(), tiny_tokenizer, causal.Length(tokens=16))
    rows = texts._packed(["what is two and two? it is four."] * 4)

    class Uniform(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return types.SimpleNamespace(logits=torch.zeros(*input_ids.shape, 512))

    size = sum(texts.bytes_of[token] for row in rows for token in row["labels"][1:])
    model = Uniform().train()
    assert causal.bits_per_byte(model, rows, texts.bytes_of, 3) == pytest.approx(9 * 15 * len(rows) / size)
    assert model.training


def test_contenders_of_the_causal_study(script, tmp_path):
    """LoRA with half the rank has LoR2C's parameters; SHADOW has about those of LoRA at the same rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    causal = script("lor2c_causal")
    base = causal.BASE
    shape = {name: getattr(base, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = LlamaConfig(vocab_size=base.vocabulary, num_attention_heads=4, tie_word_embeddings=True, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    sizes = {
        name: causal.trained_parameters(causal.adapted(tmp_path, adapter).model)
        for name, adapter in causal.METHODS.items()
    }
    lor2c = 2 * 8 * 256 * 8
    assert sizes["lor2c"] == sizes["injectlor2c"] == sizes["lora_same_parameters"] == lor2c
    assert sizes["lora_same_r"] == sizes["rslora"] == 2 * lor2c
    assert sizes["sharelor2c"] == 8 * 256 * 9
    assert sizes["dora"] == 2 * lor2c + 2 * 8 * 256
    assert sizes["shadow"] == pytest.approx(2 * lor2c, rel=0.15)
    assert sizes["full"] == LlamaForCausalLM(config).num_parameters()


@pytest.mark.slow
@pytest.mark.long
def test_lor2c_causal(script, tmp_path, monkeypatch, capsys):
    causal = script("lor2c_causal")
    folder = write_texts(tmp_path / "texts")
    lines = [path.read_text() for path in sorted(folder.iterdir())]
    for name, rows in (
        ("texts", [{"text": line} for line in lines]),
        ("gsm8k", [{"question": line[:40], "answer": line} for line in lines]),
        ("instructions", [{"instruction": line[:20], "input": "", "output": line} for line in lines]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "causal.json"
    names = ("texts", "gsm8k", "instructions")
    files = [part for name in names for part in (f"--{name}", tmp_path / f"{name}.jsonl")]
    places = ("--work", tmp_path / "work", "--out", out)
    arguments = (*files, *places, "--smoke", "--png", "--methods", "imlor2c", "shadow")
    call(causal, monkeypatch, *arguments)
    sections = json.loads(out.read_text())["sections"]
    assert list(sections)[:3] == ["base", "rates of imlor2c", "rates of shadow"]
    assert len(sections) == 3 + 2 * 3
    for section in list(sections.values())[3:]:
        assert len(section["curves"]) == 3
        assert len(set(section["bits_per_byte"])) == 3
        assert list(section["curves"][0]) == ["0", "2", "4"]
        assert len({curve["0"] for curve in section["curves"]}) == 1
    assert sections["imlor2c on gsm8k"]["structure"][0]
    assert str(tmp_path) not in out.read_text()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "| shadow |" in capsys.readouterr().out


@pytest.mark.slow
def test_lor2c_vision(script, tmp_path, monkeypatch, capsys):
    vision = script("lor2c_vision")
    monkeypatch.setattr(vision, "SEEDS", (0, 1))
    out = tmp_path / "vision.json"
    methods = ("lor2c", "injectlor2c", "lora_same_parameters", "head")
    call(vision, monkeypatch, "--smoke", "--work", tmp_path / "work", "--out", out, "--methods", *methods)
    sections = json.loads(out.read_text())["sections"]
    assert list(sections) == ["base", *methods, "gradients"]
    assert sections["lor2c"]["trained"] == sections["lora_same_parameters"]["trained"] | {"head": 5 * 65}
    assert sections["lor2c"]["trained"]["adapter"] == 2 * 4 * 64 * 8
    assert all(len(row) == 8 for row in sections["gradients"]["ratios"])
    assert out.with_name("vision_gradients.png").is_file()
    assert "| head | 0 |" in capsys.readouterr().out


def test_digits_of_the_halves_are_others(script):
    vision = script("lor2c_vision")
    halves = [vision.digits(classes) for classes in (vision.FIRST_HALF, vision.SECOND_HALF)]
    assert [len(rows) for rows in halves] == [901, 896]
    assert all({row["labels"] for row in rows} == set(range(5)) for rows in halves)
    assert max(row["pixel_values"].max().item() for rows in halves for row in rows) == 1.0


@pytest.mark.slow
def test_gradients_of_a_model_made_for_it(script, tmp_path, monkeypatch, capsys):
    gradients = script("lor2c_gradients")
    texts = tmp_path / "texts.jsonl"
    lines = [path.read_text() for path in sorted(write_texts(tmp_path / "texts").iterdir())]
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    rows = [{"text": line, "label": number % 2} for number, line in enumerate(lines)]
    for name in ("train", "validation"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "gradients.json"
    options = ("--task", "classification", "--data", tmp_path / "data", "--rows", 16, "--epochs", 1, "--max_length", 16)
    call(
        gradients,
        monkeypatch,
        *("--pretrain", texts, "--work", tmp_path / "work", "--out", out, "--smoke", *options),
    )
    content = json.loads(out.read_text())
    assert [len(content["gradient"][method]) for method in ("lor2c", "lora")] == [24, 24]
    assert content["model"]["num_hidden_layers"] == 24
    assert str(tmp_path) not in out.read_text()
    assert "--pretrain TEXTS" in content["run"]["command"]


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
