"""Weights in 8 and 4 bits: what is quantized, to which numbers, what it does to perplexity, and what is refused."""

import json
import math

import pytest
import torch
import transformers
from test_adapter_checkpoints import run  # noqa: F401
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from crosslayer.crnet import CRNetConfig
from crosslayer.errors import ConfigError
from crosslayer.loading import load_checkpoint
from crosslayer.quantization import quantized_loading
from crosslayer.train.methods import AdapterConfig, attach
from family_cases import FAMILY_CASES
from model_cases import model_of, tokens
from tiny_finetune import tiny_tokenizer
from tolerances import assert_close, error_in_tolerances

needs_torchao = pytest.mark.skipif(
    not transformers.utils.is_torchao_available(), reason="torchao is not installed (extra 'quantize')"
)
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "rank": 32}
KINDS = {"int8": "Int8Tensor", "int4": "Int4OpaqueTensor"}


def effective(linear):
    """The matrix that a linear without bias multiplies with, whatever it is stored as: [out, in]."""
    with torch.no_grad():
        return linear(torch.eye(linear.in_features, dtype=linear.weight.dtype)).t().contiguous()


def linears_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, text of validation): a model that learned which token follows which, far better than chance."""
    folder, model = tmp_path_factory.mktemp("trained"), model_of("cross_layer", **SHAPE, vocab_size=400)
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(model.model.embed_tokens.weight, generator=generator)
    table = torch.rand(400, 400, generator=generator).pow(40)  # perplexity about 16, by its entropy
    text = torch.randint(3, 400, (40, 1), generator=generator)
    for _ in range(31):
        text = torch.cat([text, torch.multinomial(table[text[:, -1]], 1, generator=generator)], 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        rows = text[torch.arange(8 * step, 8 * step + 8) % 32]
        model.train()(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, text


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_linears_are_quantized_and_nothing_else(trained, kind):
    model, _ = load_checkpoint(str(trained[0]), quantize=kind)
    linears = linears_of(model).keys() - {"lm_head"}
    assert len(linears) == 7 + 2 * 14
    for name, parameter in model.named_parameters():
        is_linear = name.removesuffix(".weight") in linears
        assert type(parameter).__name__ == (KINDS[kind] if is_linear else "Parameter"), name
        if name.endswith("beta"):
            assert parameter.dtype == torch.float32


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_rounded_to_the_nearest_step(trained, kind):
    """Half a step away at most: int8, steps of max |w| / 127.5 of an output; int4, 15 steps from the smallest to the
    largest of 32 inputs, in bfloat16."""
    plain, quantized = (
        linears_of(load_checkpoint(str(trained[0]))[0]),
        load_checkpoint(str(trained[0]), quantize=kind)[0],
    )
    for name, linear in linears_of(quantized).items():
        if name == "lm_head":
            continue
        w, found = plain[name].weight.detach(), effective(linear).float()
        if kind == "int8":
            step, slack = w.abs().amax(1, keepdim=True) / 127.5, 1.02  # 127.5 itself is rounded to 127
        else:
            w, found = (tensor.view(len(tensor), -1, 32) for tensor in (w, found))
            step, slack = (w.amax(-1, keepdim=True) - w.amin(-1, keepdim=True)) / 15, 1.2
            assert max(len(group.unique()) for group in found[:8].flatten(0, 1)) <= 16
        error = (found - w).abs() / step
        assert error.max() < 0.5 * slack, name
        assert error.max() > 0.4, "not that coarse"


@needs_torchao
@pytest.mark.parametrize("case", ["cross_layer", "cola", "silu_increment", "tied", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_rounded_weights(tmp_path, case, kind):
    model_of(case, **SHAPE).save_pretrained(tmp_path)
    settings = quantized_loading(kind, AutoConfig.from_pretrained(tmp_path))
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, **settings)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=quantized.dtype)
    before = reference(tokens()).logits
    with torch.no_grad():
        for name, linear in linears_of(reference).items():
            linear.weight.copy_(effective(linears_of(quantized)[name]))
    expected = reference(tokens()).logits
    assert_close(quantized(tokens()).logits, expected)
    assert error_in_tolerances(before, expected) > 1.5  # in bfloat16, 10 and more in float32
    row = tokens(1, 1)
    with torch.no_grad():  # one token, without gradients: the path of decoding
        assert_close(quantized(row).logits, reference(row).logits)


@needs_torchao
@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.01), ("int4", 0.1)])
def test_perplexity_stays(trained, kind, tolerance):
    """Within 1 % in 8 bits and 10 % in 4 bits, where the model is far better than chance."""
    folder, text = trained
    rows = text[:32]

    def perplexity(model):
        with torch.no_grad():
            return math.exp(model(rows, labels=rows).loss)

    plain = perplexity(load_checkpoint(str(folder))[0])
    assert plain < 40  # of 400
    assert perplexity(load_checkpoint(str(folder), quantize=kind)[0]) == pytest.approx(plain, rel=tolerance)


@needs_torchao
def test_int8_is_saved_and_read_again(trained, tmp_path):
    model, tokenizer = load_checkpoint(str(trained[0]), quantize="int8")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_checkpoint(str(tmp_path))
    assert type(again.model.layers[1].mlp.up_proj.B.weight).__name__ == "Int8Tensor"
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    with pytest.raises(ConfigError, match="quantized already"):
        load_checkpoint(str(tmp_path), quantize="int8")


@needs_torchao
@pytest.mark.parametrize("name", FAMILY_CASES)
def test_every_family_in_eight_bits(name, tmp_path):
    """Within a tenth of the plain logits; routers and experts stay as they are."""
    plain = FAMILY_CASES[name].model()
    plain.save_pretrained(tmp_path)
    settings = quantized_loading("int8", AutoConfig.from_pretrained(tmp_path))
    quantized = type(plain).from_pretrained(tmp_path, **settings)
    kept = [name for name, p in quantized.named_parameters() if type(p) is nn.Parameter]
    assert not any("_proj" in name and name.endswith(("A.weight", "B.weight")) for name in kept)
    ids = tokens()
    assert (quantized(ids).logits - plain(ids).logits).norm() < 0.1 * plain(ids).logits.norm()


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_generate_and_evaluate(trained, run, tmp_path, kind):  # noqa: F811
    (tmp_path / "text.txt").write_text("the story and the song")
    code, out, err = run("generate", trained[0], "--quantize", kind, "--max_new_tokens", 4, "--seed", 1, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["quantize"] == kind
    losses = []
    for options in ([], ["--quantize", kind]):
        code, out, err = run("evaluate", trained[0], "--data", tmp_path / "text.txt", *options, "--json")
        assert (code, err) == (0, "")
        losses.append(json.loads(out)["loss"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.1)


@needs_torchao
@pytest.mark.parametrize("method", ["lor2c", "lora"])
def test_an_adapter_on_a_quantized_base(trained, tmp_path, method):
    base = AutoModelForCausalLM.from_pretrained(trained[0])
    model = attach(base, AdapterConfig(method=method, r=4), "instruction").model
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    model.eval().save_pretrained(tmp_path)
    quantized, _ = load_checkpoint(str(tmp_path), quantize="int8")
    assert "Int8Tensor" in {type(parameter).__name__ for parameter in quantized.parameters()}
    expected = model(input_ids=tokens()).logits
    assert (quantized(input_ids=tokens()).logits - expected).norm() < 0.05 * expected.norm()
    with model.disable_adapter():
        assert (model(input_ids=tokens()).logits - expected).norm() > 0.1 * expected.norm()


# Refused, in one line


def refusal(name, config, device="cpu"):
    with pytest.raises(ConfigError) as refused:
        quantized_loading(name, config, device)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_other_names_are_refused(trained, run):  # noqa: F811
    assert "int8, int4" in refusal("fp8", CRNetConfig())
    code, out, err = run("generate", trained[0], "--quantize", "fp8")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "fp8" in err
    assert "int8" in err


def test_without_torchao(trained, run, monkeypatch):  # noqa: F811
    monkeypatch.setattr(transformers.utils, "is_torchao_available", lambda: False)
    code, out, err = run("evaluate", trained[0], "--quantize", "int8")
    assert (code, out) == (2, "")
    assert err == "crosslayer: error: quantize='int8' needs torchao; pip install 'crosslayer[quantize]'\n"
    assert quantized_loading(None, CRNetConfig()) == {}


@needs_torchao
def test_widths_that_four_bits_cannot_take():
    said = refusal("int4", CRNetConfig(**SHAPE | {"rank": 28}, num_hidden_layers=2))
    assert "model.layers.1.self_attn.q_proj.B has rank 28; use int8" in said
    narrow = CRNetConfig(**SHAPE | {"intermediate_size": 208}, num_hidden_layers=2)
    assert "model.layers.0.mlp.down_proj has 208 inputs" in refusal("int4", narrow)
    heads = CRNetConfig(**SHAPE | {"head_dim": 20, "factorization": "dense"}, num_hidden_layers=2)
    assert "model.layers.0.self_attn.o_proj has 40 inputs" in refusal("int4", heads)
    heads = {"head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 1, "factorization": "dense"}
    keys = CRNetConfig(**SHAPE | heads, num_hidden_layers=2)
    assert "model.layers.0.self_attn.k_proj has 8; use int8" in refusal("int4", keys)
    assert quantized_loading("int4", keys, "cuda")  # its kernel pads them


@needs_torchao
def test_the_largest_group_that_fits():
    for widths, group in (({}, 32), ({"rank": 64}, 64), ({"rank": 128, "intermediate_size": 512}, 128)):
        config = CRNetConfig(**{**SHAPE, "hidden_size": 512, **widths}, num_hidden_layers=2)
        scheme = quantized_loading("int4", config)["quantization_config"].quant_type
        assert scheme.group_size == group
    assert quantized_loading("int4", config)["dtype"] == torch.bfloat16
    on_cuda = quantized_loading("int4", config, "cuda")
    assert on_cuda["device_map"] == "cuda"
    assert on_cuda["quantization_config"].quant_type.int4_packing_format == "tile_packed_to_4d"


@needs_torchao
def test_a_model_without_linears():
    assert "gpt2" in refusal("int8", GPT2Config(n_layer=1, n_embd=8, n_head=1))
