"""Parity with transformers' Llama: the dense factorization everywhere, CR-Net where the two coincide."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from crosslayer.crnet import CRNetConfig, CRNetForCausalLM, CrossLayerLinear
from model_cases import LLAMA_CASES, ROPE_CASES, SHAPE, gradients, model_of, randomize, tokens
from tolerances import assert_all_close, assert_close, assert_far


def llama_of(fields, dtype=torch.float32, attention="sdpa"):
    config = LlamaConfig(**(SHAPE | fields))
    return randomize(LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=dtype)).eval()


def dense_twin(llama):
    """Our dense model with Llama's weights, loaded strictly: the state-dict keys are the same."""
    fields = {name: value for name, value in llama.config.to_dict().items() if name != "model_type"}
    config = CRNetConfig(**fields, factorization="dense")
    ours = CRNetForCausalLM._from_config(
        config, attn_implementation=llama.config._attn_implementation, dtype=llama.dtype
    )
    assert ours.state_dict().keys() == llama.state_dict().keys()
    ours.load_state_dict(llama.state_dict(), strict=True)
    return ours.eval()


def left_padding(ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return mask


INPUTS = {
    "plain": lambda ids: {},
    "left_padded": lambda ids: {"attention_mask": left_padding(ids)},
    "packed": lambda ids: {"position_ids": torch.cat([torch.arange(9), torch.arange(8)]).expand(ids.shape)},
}


def run(model, **inputs):
    """Logits and, after the loss, all gradients."""
    model.zero_grad()
    ids = tokens()
    output = model(ids, labels=ids, use_cache=False, **inputs)
    output.loss.backward()
    return output.logits, gradients(model)


def check_same(ours, llama, **inputs):
    logits, grads = run(ours, **inputs)
    llama_logits, llama_grads = run(llama, **inputs)
    assert_close(logits, llama_logits, what="logits")
    assert_all_close(grads, llama_grads)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", LLAMA_CASES)
def test_dense_is_llama(case, attention):
    llama = llama_of(LLAMA_CASES[case], attention=attention)
    check_same(dense_twin(llama), llama)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("inputs", ["left_padded", "packed"])
def test_dense_is_llama_with_padding_and_packing(inputs, attention):
    llama = llama_of(LLAMA_CASES["gqa"], attention=attention)
    inputs = INPUTS[inputs](tokens())
    assert_far(run(llama)[0], run(llama, **inputs)[0], what="with and without mask")
    check_same(dense_twin(llama), llama, **inputs)


@pytest.mark.parametrize("rope", ROPE_CASES)
def test_dense_is_llama_with_scaled_rope(rope):
    fields = {"rope_parameters": ROPE_CASES[rope]}
    if rope == "dynamic":
        fields["max_position_embeddings"] = 8
    llama = llama_of(fields)
    unscaled = llama_of({})
    unscaled.load_state_dict(llama.state_dict())
    assert_far(unscaled(tokens()).logits, llama(tokens()).logits, what="scaled and unscaled")
    check_same(dense_twin(llama), llama)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_is_llama_in_half_precision(dtype):
    llama = llama_of(LLAMA_CASES["gqa"], dtype)
    ours = dense_twin(llama)
    check_same(ours, llama)
    exact = llama_of(LLAMA_CASES["gqa"])
    exact.load_state_dict(llama.state_dict())
    logits, llama_logits, exact_logits = (run(model)[0].float() for model in (ours, llama, exact))
    our_error, llama_error = (logits - exact_logits).norm(), (llama_logits - exact_logits).norm()
    assert our_error < 1.2 * llama_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_parity_can_fail(dtype):
    llama = llama_of({}, dtype)
    ours = dense_twin(llama)
    expected, expected_grads = run(llama)
    ours.config.num_hidden_layers = 1
    assert_far(ours(tokens()).logits, expected, what="only the first layer")
    ours.config.num_hidden_layers = 3
    with torch.no_grad():
        ours.model.layers[1].mlp.down_proj.weight.neg_()
    logits, grads = run(ours)
    assert_far(logits, expected, what="one matrix negated")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert_far(grads[name], expected_grads[name], what="its effect on a gradient")


# CR-Net with beta = 0 and full-size ranks

CROSS_LAYER_CASES = ["mha", "gqa", "bias", "tied", "head_dim"]


def full_rank_twin(llama, beta_epsilon):
    """A cross-layer model that computes what `llama` computes: b = eps, and A B = W at full-size rank.

    Such a rank saves nothing, and is taken in configurations of 0.1 only.

    The rank is min(in, out): A = W and B = 1 where the output is the narrower side, else A = 1 and B = W.
    """
    fields = {name: value for name, value in llama.config.to_dict().items() if name != "model_type"}
    sizes = CRNetConfig(**fields, factorization="dense")
    positions = ("q", "k", "v", "o", "gate", "up", "down")
    config = CRNetConfig(
        **fields,
        rank_pattern={position: min(sizes.linear_shape(position)) for position in positions},
        beta_init=0.0,
        beta_epsilon=beta_epsilon,
        crosslayer_format=1,
    )
    ours = CRNetForCausalLM._from_config(config, attn_implementation=llama.config._attn_implementation)
    state = llama.state_dict()
    twins = {}  # Llama's name -> ours
    for name, module in ours.named_modules():
        if isinstance(module, CrossLayerLinear):
            weight = state.pop(f"{name}.weight")
            wide = module.B.out_features > module.A.in_features
            identity = torch.eye(module.A.out_features)
            state[f"{name}.A.weight"] = identity if wide else weight
            state[f"{name}.B.weight"] = weight if wide else identity
            state[f"{name}.beta"] = torch.zeros(1)
            twins[f"{name}.weight"] = f"{name}.{'B' if wide else 'A'}.weight"
            if f"{name}.bias" in state:
                state[f"{name}.B.bias"] = state.pop(f"{name}.bias")
                twins[f"{name}.bias"] = f"{name}.B.bias"
    ours.load_state_dict(state, strict=True)
    return ours.eval(), twins


# With the default eps, b = 1e-6 instead of 0; its effect is below the tolerance. 1e-30 has none at all.
@pytest.mark.parametrize("beta_epsilon", [1e-6, 1e-30])
@pytest.mark.parametrize("case", CROSS_LAYER_CASES)
def test_cross_layer_with_beta_zero_and_full_ranks_is_llama(case, beta_epsilon):
    llama = llama_of(LLAMA_CASES[case])
    ours, twins = full_rank_twin(llama, beta_epsilon)
    assert len([name for name in twins if name.endswith("weight")]) == 14  # seven positions of layers 1 and 2
    logits, grads = run(ours)
    llama_logits, llama_grads = run(llama)
    assert_close(logits, llama_logits, what="logits")
    # B = 1, so the gradient of A is that of W; for gate and up A = 1, and the gradient of B is that of W.
    assert_all_close({name: grads[twins.get(name, name)] for name in llama_grads}, llama_grads)


def scale_a(linear):
    linear.A.weight.mul_(1.01)


def transpose_a(linear):
    linear.A.weight.copy_(linear.A.weight.T.clone())


def set_beta(linear):
    linear.beta.fill_(1e-3)


@pytest.mark.parametrize("damage", [scale_a, transpose_a, set_beta])
def test_cross_layer_parity_can_fail(damage):
    llama = llama_of({})
    ours, _ = full_rank_twin(llama, 1e-6)
    with torch.no_grad():
        damage(ours.model.layers[1].self_attn.q_proj)
    logits, grads = run(ours)
    llama_logits, llama_grads = run(llama)
    assert_far(logits, llama_logits, what="logits")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert_far(grads[name], llama_grads[name], what=name)


@pytest.mark.parametrize("case", ["gqa", "bias"])
def test_one_cross_layer_layer_is_llama(case):
    """Bit for bit the dense model, which is Llama up to the rounding inside the norm."""
    ours = model_of("cross_layer", num_hidden_layers=1, **LLAMA_CASES[case])
    dense = model_of("dense", num_hidden_layers=1, **LLAMA_CASES[case])
    llama = llama_of({"num_hidden_layers": 1, **LLAMA_CASES[case]})
    assert ours.state_dict().keys() == llama.state_dict().keys()
    llama.load_state_dict(ours.state_dict(), strict=True)
    dense.load_state_dict(ours.state_dict(), strict=True)
    check_same(ours, llama)
    logits, grads = run(ours)
    dense_logits, dense_grads = run(dense)
    assert torch.equal(logits, dense_logits)
    assert all(torch.equal(grads[name], gradient) for name, gradient in dense_grads.items())


def test_low_rank_at_full_size_is_llama():
    """The other factorization that contains Llama: B A = W in every layer."""
    llama = llama_of({"num_hidden_layers": 1})
    ours = model_of("low_rank", num_hidden_layers=1, rank=48, crosslayer_format=1)
    state = llama.state_dict()
    for name in [name for name in ours.state_dict() if name.endswith(".A.weight")]:
        weight = state.pop(name.replace(".A.weight", ".weight"))
        U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        state[name] = Vh.float()
        state[name.replace(".A.", ".B.")] = (U * S).float()
    ours.load_state_dict(state, strict=True)
    assert_close(run(ours)[0], run(llama)[0], what="logits")
