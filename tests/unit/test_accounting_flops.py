"""Operations by arithmetic against torch's counter on a real step: matrix products equal to the operation."""

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crosslayer.accounting import Adapter, Method, Shape, count_operations, count_parameters, training_flops_per_token
from crosslayer.accounting.flops import optimizer_operations
from crosslayer.analysis import OperationCounter
from crosslayer.crnet import POSITIONS, CRNetForCausalLM
from crosslayer.methods import MATRIX_OPTIMIZERS
from model_cases import config_of
from optimizer_cases import optimizer_of
from peer_models import Residual, llama, sltrain_model

WIDE = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": 5, "rank": 16}
ROWS, TOKENS = 2, 32


def counted(model, counter=OperationCounter):
    """Operations per token of one forward and backward."""
    ids = torch.randint(3, 101, (ROWS, TOKENS))
    with counter() as operations:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return operations.get_total_flops() / ids.numel()


def trained(attention="sdpa", **fields):
    return CRNetForCausalLM._from_config(
        config_of("cross_layer", **(WIDE | fields)), attn_implementation=attention
    ).train()


@pytest.mark.parametrize(("attention", "heads"), [("eager", 4), ("sdpa", 2)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("factorization", ["dense", "cola", "low_rank"])
def test_on_autograd(factorization, checkpointing, attention, heads):
    model = trained(attention, factorization=factorization, num_key_value_heads=heads)
    if checkpointing:
        model.gradient_checkpointing_enable()
    method = Method(recompute="layers" if checkpointing else "none")
    assert counted(model) == count_operations(model.config, TOKENS, method).matrix_products


@pytest.mark.parametrize("interval", [None, 1, 2, 5])
@pytest.mark.parametrize("policy", ["invert", "replay"])
@pytest.mark.parametrize("factorization", ["cola", "low_rank"])
def test_policies_where_nothing_carries(factorization, policy, interval):
    model = trained(factorization=factorization, recompute=policy, recompute_interval=interval)
    expected = count_operations(model.config, TOKENS, Method(recompute=policy, interval=interval))
    assert counted(model) == expected.matrix_products


@pytest.mark.parametrize("interval", [None, 2, 3])
@pytest.mark.parametrize("policy", ["none", "invert", "replay", "reversible"])
def test_with_every_memory_policy(policy, interval):
    if policy == "none" and interval:
        pytest.skip("has no interval")
    model = trained(recompute=policy, recompute_interval=interval)
    expected = count_operations(model.config, TOKENS, Method(recompute=policy, interval=interval))
    assert counted(model) == expected.matrix_products
    plain = count_operations(model.config, TOKENS)
    assert expected.model == plain.model == training_flops_per_token(model.config, TOKENS)


def test_as_torch_counts_without_our_help():
    """torch's own counter, eager attention, ordinary autograd: no policy and none of our mappings."""
    for factorization in ("cross_layer", "cola", "dense"):
        model = trained("eager", factorization=factorization)
        model.model._uses_tape = lambda *_: False
        model.eval()  # a fused product would be counted as well; here each is written out
        expected = count_operations(model.config, TOKENS).matrix_products
        assert counted(model, lambda: FlopCounterMode(display=False)) == expected


def test_the_check_can_fail():
    model = trained()
    assert counted(model) != count_operations(model.config, TOKENS + 1).matrix_products
    assert counted(model) != count_operations(model.config, TOKENS, Method(recompute="invert")).matrix_products


@pytest.mark.parametrize("positions", [("q", "v"), ("o",), ("gate", "down"), POSITIONS])
def test_lora(positions):
    lora = peft.LoraConfig(r=6, target_modules=[f"{p}_proj" for p in positions])
    model = peft.get_peft_model(llama(**WIDE), lora).train()
    method = Method(adapter=Adapter(rank=6, positions=positions))
    assert counted(model) == count_operations(model.config, TOKENS, method).matrix_products


def test_relora():
    """LoRA on every matrix, with everything outside them trained too."""
    model = peft.get_peft_model(llama(**WIDE), peft.LoraConfig(r=6, target_modules="all-linear")).train()
    for name, parameter in model.named_parameters():
        if not name.endswith("base_layer.weight"):
            parameter.requires_grad_(True)
    method = Method(optimizer="relora", optimizer_rank=6)
    assert counted(model) == count_operations(model.config, TOKENS, method).matrix_products


@pytest.mark.parametrize("fused", [0, 1, 2])
def test_lor2c(fused):
    model = llama(**WIDE).train().requires_grad_(False)
    for index in range(5 - fused):
        model.model.layers[index] = Residual(model.model.layers[index], 64, 6)
    method = Method(adapter=Adapter(kind="lor2c", rank=6, fused=fused))
    assert counted(model) == count_operations(model.config, TOKENS, method).matrix_products


def test_sltrain():
    model = sltrain_model(0.03, **WIDE)
    shape = Shape.of(model.config).factorized("sltrain", 16, 0.03)
    assert sum(p.numel() for p in model.parameters()) == sum(count_parameters(shape).values())
    assert counted(model) == count_operations(shape, TOKENS, tokens=ROWS * TOKENS).matrix_products


def test_parts_and_head():
    operations = count_operations(config_of("cross_layer", **WIDE), TOKENS)
    assert operations.forward["head"] == 2 * 101 * 64
    assert operations.forward["attention"] == 4 * TOKENS * 64 * 5
    assert operations.forward["carried"] == 2 * 4 * (5 * 64 + 2 * 176)
    assert all(operations.backward[part] == 2 * operations.forward[part] for part in operations.forward)
    assert operations.total == operations.model


def test_optimizers():
    shape = Shape.of(config_of("dense", **WIDE))
    assert optimizer_operations(shape, Method()) == 0
    galore = optimizer_operations(shape, Method(optimizer="galore", optimizer_rank=4))
    apollo = optimizer_operations(shape, Method(optimizer="apollo", optimizer_rank=4))
    entries = 5 * (4 * 64 * 64 + 3 * 64 * 176)
    assert apollo == 2 * entries * 4
    assert galore > 2 * apollo  # there and back, and the SVD


def test_orthogonalisation_by_count():
    """Against torch's counter on the products themselves; the power method and A's zero gradients aside."""
    for fields in ({}, {"factorization": "dense"}):
        model = CRNetForCausalLM(config_of("cross_layer", **(WIDE | fields)))
        for optim in MATRIX_OPTIMIZERS:
            optimizer = optimizer_of(model, optim)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            with FlopCounterMode(display=False) as counter:
                optimizer.step()
            expected = optimizer_operations(model.config, Method(optimizer=optim))
            assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
