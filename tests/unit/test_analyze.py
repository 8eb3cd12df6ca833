"""`crosslayer analyze`: its files, its numbers, the health of a run, and one clear line for every wrong input."""

import json
import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config

from crosslayer.analysis.health import HealthLog, b_values, gradient_norms, increment_ratios, read_health
from crosslayer.analysis.plots import draw_health
from crosslayer.analysis.text import text_batches
from crosslayer.cli import main
from crosslayer.crnet import CRNetConfig, CRNetForCausalLM, crnet_config
from crosslayer.data import train_tokenizer
from crosslayer.errors import CheckpointError, ConfigError, DataError
from crosslayer.loading import load_body
from crosslayer.train.run import pretrain
from tiny_run import tiny_recipe, write_texts

SMALL = ("--max_tokens", "600", "--block_size", "32")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("analyze")


@pytest.fixture(scope="module")
def crnet_run(root):
    """A finished CR-Net run that inverts its states, logged every second step."""
    recipe = tiny_recipe(root, max_steps=6, save_steps=2)
    recipe.model.update(recompute="invert", recompute_interval=1)
    pretrain(recipe, root / "crnet")
    return root / "crnet"


@pytest.fixture(scope="module")
def texts(root):
    return write_texts(root / "some-texts", documents=20, seed=1)


@pytest.fixture(scope="module")
def llamas(root):
    """Two Llamas of one shape, with the tokenizer that reads them."""
    tokenizer = train_tokenizer([f"the quick brown fox {i}" for i in range(50)], 300, 32)
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, vocab_size=300
        )
        LlamaForCausalLM(config).save_pretrained(root / f"llama-{seed}")
        tokenizer.save_pretrained(root / f"llama-{seed}")
    return root / "llama-0", root / "llama-1"


@pytest.fixture
def run(monkeypatch, capsys):
    """run("MODEL", ...) -> (exit code, standard output, standard error) of `crosslayer analyze`, in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["crosslayer", "analyze", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return types.SimpleNamespace(code=stopped.value.code or 0, out=out, err=err)

    return call


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_one_model(run, llamas, texts, root):
    folder = root / "one"
    result = run(llamas[0], "--data", texts, *SMALL, "--output_dir", folder, "--suggest-ranks", "--rank_budget", "2k")
    assert result.code == 0, result.err
    assert sorted(path.name for path in folder.iterdir()) == [
        "curves.png",
        "maps.png",
        "ranks.png",
        "spectra.json",
        "summary.md",
    ]
    assert all(is_png(path) for path in folder.glob("*.png"))
    content = json.loads((folder / "spectra.json").read_text())
    assert 592 < content["tokens"] <= 600  # a rest under 8 tokens is left out
    assert content["positions"]["down"] == {"module": "mlp.down_proj", "width": 16}
    assert len(content["linears"]) == 3 * 7
    assert content["suggested"]["parameters"] <= 2000
    assert content["run"]["versions"]["torch"] == torch.__version__
    assert "## Finding" in result.out
    assert str(folder / "maps.png") in result.out


def test_json_is_all_of_standard_output(run, crnet_run, texts, root):
    result = run(crnet_run, "--data", texts, *SMALL, "--output_dir", root / "as-json", "--json", "--ranks", "8,2")
    assert result.code == 0, result.err
    content = json.loads(result.out)
    assert content["ranks"] == [2, 8]
    second = next(x for x in content["linears"] if (x["layer"], x["position"]) == (1, "q"))
    assert second["rank"] == 8
    assert second["relative_error"]["learned"][1] < 2e-3 < second["relative_error"]["learned"][0]


def test_untrained_weights_differ_by_seed(llamas):
    def weights(**more):
        return load_body(str(llamas[0]), **more).layers[0].mlp.up_proj.weight

    first = weights(untrained=True, seed=1)
    assert torch.equal(first, weights(untrained=True, seed=1))
    assert not torch.equal(first, weights(untrained=True, seed=2))
    assert not torch.equal(first, weights())
    assert weights(dtype="float64").dtype == torch.float64


def test_without_matplotlib(run, llamas, texts, root, monkeypatch):
    from crosslayer.analysis import results

    monkeypatch.setattr(results, "has_matplotlib", lambda: False)
    result = run(llamas[0], "--data", texts, *SMALL, "--output_dir", root / "words", "--untrained")
    assert result.code == 0, result.err
    assert sorted(path.name for path in (root / "words").iterdir()) == ["spectra.json", "summary.md"]
    assert "untrained, seed 0" in result.out


def test_before_and_after(run, llamas, texts, root):
    folder = root / "two"
    result = run("--before", llamas[0], "--after", llamas[1], "--data", texts, *SMALL, "--output_dir", folder)
    assert result.code == 0, result.err
    assert is_png(folder / "comparison.png")
    assert "## What changed" in result.out
    content = json.loads((folder / "spectra.json").read_text())
    assert content["before_spectra"]["tokens"] == content["after_spectra"]["tokens"] > 592
    assert content["before_spectra"]["linears"] != content["after_spectra"]["linears"]


def test_health_of_a_run(run, crnet_run, root):
    folder = root / "health"
    result = run(crnet_run, "--health", "--output_dir", folder)
    assert result.code == 0, result.err
    assert is_png(folder / "health.png")
    assert "drift" in result.out
    assert "not measured" not in result.out
    content = json.loads(run(crnet_run, "--health", "--output_dir", folder, "--json").out)
    assert content["logs"] == 3


def test_health_lines_say_what_the_model_says(crnet_run):
    """The last line against the saved model; every quantity for 2 layers of each position."""
    health, log = read_health(crnet_run)
    assert [line["step"] for line in health] == [2, 4, 6]
    assert any("recompute_drift" in line for line in log)
    last = health[-1]
    for table in (last["b"], last["increment_ratio"], last["gradient_norm"]):
        assert list(table) == ["q", "k", "v", "o", "gate", "up", "down"]
        assert all(len(row) == 2 and min(row) > 0 for row in table.values())
    model = CRNetForCausalLM.from_pretrained(crnet_run / "model")
    for position, row in b_values(model).items():
        assert last["b"][position] == pytest.approx(row, rel=1e-4)


def test_a_resumed_run_goes_on_with_its_health(root):
    recipe = tiny_recipe(root, max_steps=6, save_steps=2)
    pretrain(recipe, root / "through")
    whole = (root / "through" / "health.jsonl").read_text()
    pretrain(tiny_recipe(root, max_steps=4, save_steps=2), root / "stopped")
    pretrain(recipe, root / "stopped", resume=True)
    lines = [json.loads(line) for line in (root / "stopped" / "health.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [json.loads(line)["step"] for line in whole.splitlines()] == [2, 4, 6]


def test_health_log_is_cut_where_a_run_resumes(tmp_path):
    log = HealthLog(tmp_path / "health.jsonl")
    log.cut(0)  # nothing there yet
    for step in (2, 4, 6):
        log.append({"step": step})
    with log.path.open("a") as file:
        file.write('{"step": 8, "b"')  # killed while writing
    log.cut(4)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [2, 4]


def test_health_does_not_disturb_training(root):
    """The same weights with and without it, to the last bit."""
    from crosslayer.train.trainer import PretrainTrainer

    with_health = pretrain(tiny_recipe(root, max_steps=4), root / "with").model
    original = PretrainTrainer.__init__

    def without(self, *args, health_file=None, **kwargs):
        original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainTrainer, "__init__", without)
        plain = pretrain(tiny_recipe(root, max_steps=4), root / "without").model
    assert not (root / "without" / "health.jsonl").exists()
    for (name, a), b in zip(with_health.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_increment_ratios_and_gradients_directly():
    """Against the definition, on one linear."""
    model = CRNetForCausalLM(
        CRNetConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    ).double()
    linear = model.model.layers[1].mlp.up_proj
    torch.nn.init.normal_(linear.B.weight)
    seen = {}
    handle = linear.register_forward_hook(lambda module, arguments, output: seen.update(x=arguments))
    ids = torch.randint(0, 40, (2, 5))
    ratios = increment_ratios(model.train(), {"input_ids": ids})
    handle.remove()
    x, previous = seen["x"]
    expected = torch.linalg.norm(linear.B(linear.A(x))) / torch.linalg.norm(linear.b() * previous)
    assert ratios["up"] == pytest.approx([float(expected)], rel=1e-4)
    assert model.training
    assert gradient_norms(model)["up"] == [0.0]
    model(ids, labels=ids).loss.backward()
    expected = torch.cat([linear.A.weight.grad.flatten(), linear.B.weight.grad.flatten()]).norm()
    assert gradient_norms(model)["up"] == pytest.approx([float(expected)], rel=1e-4)


@pytest.mark.parametrize(
    ("family", "fields", "positions"),
    [
        ("gpt2", {"resid_pdrop": 0.0}, ["q", "k", "v", "o", "up", "down"]),
        (
            "qwen3_moe",
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "mlp_only_layers": [0],
                "rank": 4,
            },
            ["q", "k", "v", "o", "experts"],
        ),
    ],
)
def test_health_of_other_families(family, fields, positions, tmp_path):
    """Names and places are the configuration's; None where a position does not build on the layer below."""
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 40}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    llama = {} if family == "gpt2" else {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(crnet_config({"model_type": family, **shape, **ids, **llama, **fields}))
    tokens = torch.randint(0, 40, (4, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    inputs = {"input_ids": tokens}
    tables = {"b": b_values(model), "increment_ratio": increment_ratios(model, inputs)}
    tables["gradient_norm"] = gradient_norms(model)
    for table in tables.values():
        assert list(table) == positions
        assert all(len(row) == 2 for row in table.values())
    assert tables["b"]["q"] == [pytest.approx(1.0), pytest.approx(1.0)]
    assert all((row[0] is None) == (name == "experts") for name, row in tables["gradient_norm"].items())
    assert tables["gradient_norm"][positions[-1]][1] > 0  # B = 0 lets nothing through to the others yet
    line = {"step": 1, "tokens": 100, **tables}
    log = [{"num_input_tokens_seen": 100, "loss": 3.0, "grad_norm": 1.0}]
    draw_health([line, {**line, "tokens": 200}], log, tmp_path / "health.png", family)
    assert (tmp_path / "health.png").stat().st_size > 1000


# Text


def tokenizer_of(llama) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(llama)


def test_batches_cover_the_text_once(llamas):
    texts = ["the quick brown fox " * n for n in (1, 5, 40)] + ["x"]
    tokenizer = tokenizer_of(llamas[0])
    batches = text_batches(texts, tokenizer, max_tokens=10**6, block_size=16, batch_size=3)
    found = sorted(
        tuple(row[mask.bool()].tolist())
        for batch in batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )
    expected = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        expected += [tuple(ids[i : i + 16]) for i in range(0, len(ids), 16)]
    assert found == sorted(piece for piece in expected if len(piece) >= 8)
    assert max(len(batch["input_ids"]) for batch in batches) == 3


def test_max_tokens_is_a_limit(llamas):
    texts = (f"the quick brown fox {i} " * 30 for i in range(1000))
    batches = text_batches(texts, tokenizer_of(llamas[0]), max_tokens=500, block_size=32, batch_size=4)
    assert 492 < sum(int(batch["attention_mask"].sum()) for batch in batches) <= 500
    assert next(texts).startswith("the quick brown fox 3")  # the rest was not read


def test_text_refusals(llamas):
    tokenizer = tokenizer_of(llamas[0])
    with pytest.raises(DataError, match="no document of a few tokens"):
        text_batches([], tokenizer, max_tokens=100, block_size=32, batch_size=4)
    with pytest.raises(ConfigError, match="batch_size=0; give at least 1"):
        text_batches(["x"], tokenizer, max_tokens=100, block_size=32, batch_size=0)


# Wrong input


def refused(result, folder, *parts):
    assert result.code == 2, result.err
    assert result.out == ""
    lines = [line for line in result.err.strip().splitlines() if line.startswith("crosslayer: error: ")]
    assert len(lines) == 1, result.err
    for part in parts:
        assert part in lines[0]
    assert "Traceback" not in result.err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("give MODEL, or both --before and --after",)),
        (("MODEL", "--before", "MODEL"), ("give MODEL, or both",)),
        (("--before", "MODEL"), ("give MODEL, or both",)),
        (("--before", "MODEL", "--after", "OTHER", "--suggest-ranks"), ("--suggest-ranks is for one MODEL",)),
        (("MODEL", "--suggest-ranks", "--rank_budget", "100"), ("budget of 100 parameters is too small", "at least")),
        (("MODEL", "--suggest-ranks", "--rank_budget", "much"), ("rank_budget='much'", "250k")),
        (("MODEL", "--rank_budget", "1k"), ("need --suggest-ranks",)),
        (("MODEL", "--suggest-ranks", "--rank_multiple", "0"), ("rank_multiple=0",)),
        (("MODEL", "--ranks", "4,500"), ("rank 500 is outside 1..40",)),
        (("MODEL", "--ranks", "four"), ("ranks='four'", "16,64,256")),
        (("MODEL", "--positions", "q,z"), ("'z' is not one of this model's", "gate")),
        (("MODEL", "--max_tokens", "20", "--ranks", "32"), ("20 tokens span at most rank 20",)),
        (("MODEL", "--block_size", "1"), ("block_size=1",)),
        (("MODEL", "--dtype", "int4"), ("dtype='int4'", "bfloat16")),
        (("MODEL", "--device", "cuda:99"), ("cuda:99",)),
        (("MODEL", "--data", "missing.txt"), ("missing.txt",)),
        (("MODEL", "--health"), ("holds no health.jsonl", "CR-Net run")),
        (("./nowhere",), ("model './nowhere' does not exist",)),
        (("no-such/model",), ("model 'no-such/model' cannot be loaded",)),
        (("TEXTS",), ("is not a model: it has no config.json",)),
        (("T5",), ("is an encoder-decoder",)),
        (("MODEL", "--gram_memory", "-1"), ("gram_memory='-1'",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) and value and len(value[0]) < 12 else None,
)
def test_refuses(run, llamas, texts, root, arguments, parts):
    T5Config().save_pretrained(root / "t5")
    names = {"MODEL": llamas[0], "OTHER": llamas[1], "TEXTS": texts, "T5": root / "t5"}
    given = [names.get(argument, argument) for argument in arguments]
    data = () if "--data" in arguments else ("--data", texts)
    size = () if "--max_tokens" in arguments or "--block_size" in arguments else SMALL
    folder = root / "refused"
    refused(run(*given, *data, *size, "--output_dir", folder), folder, *parts)


def test_a_near_miss_is_named(run, llamas, root):
    refused(run(root / "lama-0", "--output_dir", root / "refused"), root / "refused", "did you mean", "llama-0")


def test_truncated_weights(run, llamas, texts, root):
    from shutil import copytree

    broken = root / "broken"
    copytree(llamas[0], broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(run(broken, "--data", texts, "--output_dir", root / "refused"), root / "refused", "cannot be loaded")


def test_a_tokenizer_of_another_model(run, llamas, texts, root):
    small = root / "small"
    config = LlamaConfig(
        hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, vocab_size=20
    )
    LlamaForCausalLM(config).save_pretrained(small)
    result = run(small, "--tokenizer", llamas[0], "--data", texts, *SMALL, "--output_dir", root / "refused")
    refused(result, root / "refused", "the model knows 20")


def test_health_of_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_health(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"holds no health\.jsonl"):
        read_health(tmp_path)
