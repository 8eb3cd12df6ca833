"""Adapter sizes: the paper's numbers, by arithmetic and counted on real modules (on the meta device)."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

from crosslayer.accounting import lor2c_parameters, lora_parameters
from crosslayer.lor2c import AdaptedBlocks, LoR2CConfig

ROBERTA = (768, 12)
LLAMA_7B = (4096, 32)


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class(config)


def roberta():
    return on_meta(RobertaModel, RobertaConfig())


def llama_7b():
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    return on_meta(LlamaForCausalLM, config)


def trainable(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("build", "shape", "linears", "counts"),
    [
        (roberta, ROBERTA, ["query", "value"], (294_912, 147_456, 79_872)),
        (llama_7b, LLAMA_7B, ["q_proj", "v_proj"], (4_194_304, 2_097_152, 1_081_344)),
    ],
)
def test_published_counts(build, shape, linears, counts):
    hidden_size, blocks = shape
    lora, lor2c, shared = counts
    assert lora_parameters(blocks, [(hidden_size, hidden_size)] * 2, 8) == lora
    assert trainable(get_peft_model(build(), LoraConfig(r=8, target_modules=linears))) == lora
    assert lor2c_parameters(hidden_size, blocks, 8) == lor2c
    assert trainable(get_peft_model(build(), LoR2CConfig(r=8))) == lor2c
    assert lor2c_parameters(hidden_size, blocks, 8, share_A=True) == shared
    assert trainable(get_peft_model(build(), LoR2CConfig(r=8, share_A=True))) == shared


@pytest.mark.parametrize("share_A", [False, True])
def test_fuses_and_injections(share_A):
    model = get_peft_model(roberta(), LoR2CConfig(r=8, share_A=share_A, injectable=True))
    blocks = AdaptedBlocks(model)
    counts = [blocks.num_parameters()]
    for change in (lambda: blocks.fuse(3, 4), lambda: blocks.fuse(4, 5), lambda: blocks.inject(0)):
        change()
        counts.append(blocks.num_parameters())
    expected = [lor2c_parameters(768, 12, 8, share_A, fuses, injections) for fuses, injections in
                ((0, 0), (1, 0), (2, 0), (2, 1))]  # fmt: skip
    assert counts == expected
    if not share_A:
        assert counts == [147_456, 147_456 - 12_288, 147_456 - 2 * 12_288, 147_456 - 2 * 12_288]
    assert model.base_model.num_adapter_parameters() == counts[-1]


def test_grouped_queries_make_injection_cheaper():
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8,
                         num_key_value_heads=2, vocab_size=100)  # fmt: skip
    blocks = AdaptedBlocks(get_peft_model(on_meta(LlamaForCausalLM, config), LoR2CConfig(r=6, injectable=True)))
    blocks.inject(1)
    linears = [(64, 64), (64, 16)]
    expected = lor2c_parameters(64, 4, 6, injections=1, inject_linears=linears)
    assert blocks.num_parameters() == expected == 3 * 2 * 64 * 6 + 3 * (128 + 80)


def test_all_blocks_injected_leave_no_shared_A():
    assert lor2c_parameters(64, 2, 8, share_A=True, injections=2) == lora_parameters(2, [(64, 64)] * 2, 4)


@pytest.mark.parametrize(("fuses", "injections"), [(12, 0), (-1, 0), (0, 13), (6, 6)])
def test_impossible_structures(fuses, injections):
    with pytest.raises(ValueError, match=f"{fuses} fuses and {injections} injections"):
        lor2c_parameters(768, 12, 8, fuses=fuses, injections=injections)
