"""`generate` and `evaluate` read an adapter: its folder, or that of the run that made it."""

import json
import shutil
import sys

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from crosslayer.analysis.loading import load_body
from crosslayer.cli import main
from crosslayer.cli.common import load_checkpoint
from crosslayer.errors import CheckpointError
from crosslayer.evaluate.documents import try_out
from crosslayer.train.methods import METHODS, AdapterConfig, attach
from tiny_finetune import tiny_tokenizer, write_decoder, write_encoder, write_instructions

ADAPTERS = [name for name in METHODS if AdapterConfig(method=name).is_peft]
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    write_decoder(root / "base")
    (root / "text.txt").write_text("the story and the song\n\na very bright film\n")
    return root


def adapted(base, method, kind="instruction", dtype=torch.float32):
    """A base with an adapter of random weights, fused and injected as far as its method does that."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model = attach(model, AdapterConfig(method=method, r=4), kind).model
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    if method in ("mergelor2c", "imlor2c"):
        model.fuse(0, 1)
    if method in ("injectlor2c", "imlor2c"):
        model.inject(3)
    return model.eval()


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["crosslayer", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, *capsys.readouterr()

    return call


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_of_every_method_is_read(root, method):
    model = adapted(root / "base", method)
    model.save_pretrained(root / method)
    loaded, tokenizer = load_checkpoint(str(root / method))
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not torch.allclose(logits_of(loaded), logits_of(AutoModelForCausalLM.from_pretrained(root / "base")))
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert try_out(loaded, torch.device("cpu")).keeps_documents_apart
    assert load_body(str(root / method)).config.model_type == "crnet"


def test_adapters_are_float32_on_a_half_precision_base(root):
    half = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
    half.save_pretrained(root / "half")
    tiny_tokenizer().save_pretrained(root / "half")
    model = adapted(root / "half", "lor2c", dtype=torch.bfloat16)
    model.save_pretrained(root / "of-half")
    loaded, _ = load_checkpoint(str(root / "of-half"))
    dtypes = {("lor2c" in name, parameter.dtype) for name, parameter in loaded.named_parameters()}
    assert dtypes >= {(True, torch.float32), (False, torch.bfloat16)}
    assert not {(True, torch.bfloat16)} & dtypes
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_a_base_that_reads_no_position_ids(root, tmp_path):
    """PEFT's forward takes any argument; what counts is what the base takes."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48}
    base = OPTForCausalLM(OPTConfig(vocab_size=400, word_embed_proj_dim=32, max_position_embeddings=64, **sizes))
    base.save_pretrained(tmp_path / "opt")
    tiny_tokenizer().save_pretrained(tmp_path / "opt")
    adapted(tmp_path / "opt", "lora").save_pretrained(tmp_path / "adapter")
    assert not try_out(load_checkpoint(str(tmp_path / "adapter"))[0], torch.device("cpu")).keeps_documents_apart


def test_generate_and_evaluate_what_finetune_wrote(root, run, tmp_path, monkeypatch):
    """From another folder than the one in which the base was named."""
    monkeypatch.chdir(root)
    data = write_instructions(root / "instructions.jsonl", 12)
    code, _, err = run(
        *("finetune", "--model", "base", "--data", data, "--output_dir", "tuned", "--learning_rate", "1e-2"),
        *("--use_cpu", "--disable_tqdm", "--max_length", "96", "--cache_dir", root / "cache"),
        *("--per_device_train_batch_size", "4"),
    )
    assert code == 0, err
    monkeypatch.chdir(tmp_path)
    for folder in (root / "tuned", root / "tuned" / "adapter"):
        code, out, err = run("generate", folder, "--prompt", "the film", "--max_new_tokens", "3", "--json")
        assert code == 0, err
        assert json.loads(out)["text"].startswith("the film")
    code, out, err = run("evaluate", root / "tuned", "--data", root / "text.txt", "--json")
    assert code == 0, err
    assert "read alone" not in err
    of_base = json.loads(run("evaluate", root / "base", "--data", root / "text.txt", "--json")[1])
    assert json.loads(out)["tokens"] == of_base["tokens"]
    assert json.loads(out)["loss"] != of_base["loss"]


def test_what_cannot_be_read_is_one_line(root, run, tmp_path):
    whole = tmp_path / "whole"
    adapted(root / "base", "lor2c").save_pretrained(whole)

    def case(name):
        return shutil.copytree(whole, tmp_path / name)

    def with_config(folder, **fields):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
        return folder

    cut = case("cut")
    weights = load_file(cut / "adapter_model.safetensors")
    del weights[sorted(weights)[0]]
    save_file(weights, cut / "adapter_model.safetensors")
    damaged = case("damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"no weights")
    without = case("without")
    (without / "adapter_model.safetensors").unlink()
    torch.manual_seed(0)
    other = tmp_path / "other"
    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2)).save_pretrained(other)
    encoder = AutoModelForSequenceClassification.from_pretrained(write_encoder(tmp_path / "encoder"))
    attach(encoder, AdapterConfig(r=4), "classification").model.save_pretrained(tmp_path / "classes")
    prompts = AutoModelForCausalLM.from_pretrained(root / "base")
    prompts = get_peft_model(prompts, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompts.save_pretrained(tmp_path / "prompts")
    for folder, parts in {
        with_config(case("lost"), base_model_name_or_path=str(tmp_path / "gone")): (
            "base model",
            "gone",
            "base_model_name",
        ),
        with_config(case("nameless"), base_model_name_or_path=None): ("base model", "base_model_name"),
        with_config(case("foreign"), base_model_name_or_path=str(other)): ("cannot be put on its base model",),
        with_config(case("kind"), peft_type="NOPE"): ("cannot be loaded", "NOPE"),
        tmp_path / "classes": ("is for SEQ_CLS", "causal language model"),
        tmp_path / "prompts": ("PROMPT_TUNING",),
        cut: ("lacks 1 weights",),
        damaged: ("cannot be put on",),
        without: ("cannot be put on",),
    }.items():
        for verb in (("generate", folder), ("evaluate", folder, "--data", root / "text.txt")):
            code, out, err = run(*verb)
            lines = [line for line in err.splitlines() if line.startswith("crosslayer: error")]
            assert (code, out, len(lines)) == (2, "", 1), (folder, err)
            for part in (folder.name, *parts):
                assert part in lines[0]
    with pytest.raises(CheckpointError, match="adapter_config"):
        load_checkpoint(str(tmp_path))
