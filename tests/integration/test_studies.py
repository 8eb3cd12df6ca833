"""The studies in benchmarks/ run, at tiny sizes, and what they compare is what they say."""

import argparse
import itertools
import json
import math
import types

import pytest
import torch

from benchmark_scripts import BENCHMARKS, call
from tiny_run import write_texts

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
    dense_norm = "the norm of a dense start"
    names = ("low rank", "orthogonal start", "spectral start", "plus a diagonal", "carries its input", dense_norm)
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
    largest = [torch.linalg.matrix_norm(factor.weight, 2) for factor in (up[dense_norm].A, up[dense_norm].B)]
    assert torch.stack(largest).prod().item() == pytest.approx(expected, rel=0.1)
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
    monkeypatch.setattr(first_layer, "FINALISTS", 2)
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


# starts


@pytest.mark.slow
def test_starts(script, ablation_options, tmp_path, monkeypatch, capsys):
    starts = script("starts")
    fields = {field: (methods[:1], values[:2]) for field, (methods, values) in starts.FIELDS.items()}
    monkeypatch.setattr(starts, "FIELDS", fields)
    out, texts = tmp_path / "s.json", ("--train", ablation_options.train, "--validation", ablation_options.validation)
    arguments = (*texts, "--work", ablation_options.work, "--out", out, "--smoke")
    call(starts, monkeypatch, *arguments)
    content = json.loads(out.read_text())
    for field, (methods, values) in fields.items():
        sections = [content["sections"][f"{field} {value}"] for value in values]
        found = [section["methods"][method] for section in sections for method in methods]
        assert [row["model"][field] for row in found] == list(values)
        assert len({row["losses"][0] for row in found}) == len(values)
    monkeypatch.setattr(starts, "losses", lambda row: f"{row['losses'][0]:.4f}")  # of one seed there is no deviation
    page = starts.starts(out)
    assert page.count("\n") == 5
    assert "| CoLA | `low_rank_initializer_range` cola |" in page
    assert str(tmp_path) not in out.read_text()
    call(starts, monkeypatch, *arguments)
    assert json.loads(out.read_text()) == content
    assert starts.starts(tmp_path / "none.json") == "Not measured yet."


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


@pytest.mark.parametrize("name", ["first_layer", "stability", "starts"])
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
