"""Memory policies with everything the plain model works with, and what they refuse.

How exact their gradients are is tested in tests/parity/test_memory_policies.py.
"""

import contextlib
import gc
import logging
import warnings
import weakref

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Trainer, TrainingArguments

from crosslayer.crnet import POSITIONS, CRNetConfig, CRNetForCausalLM, CRNetModel, CrossLayerLinear
from crosslayer.crnet import model as model_file
from crosslayer.crnet import tape as tape_file
from crosslayer.crnet.block_gradient import BlockRun
from crosslayer.crnet.functions import Attention, CarriedRMSNorm, GatedMLP
from crosslayer.crnet.product import OpaqueProduct
from crosslayer.crnet.tape import Tape
from model_cases import PAD, gradients, model_of, tokens
from tolerances import assert_all_close, assert_close

POLICIES = ["none", "invert", "replay", "reversible"]
REBUILDING = POLICIES[1:]


def training_model(case="cross_layer", layers=4, **arguments):
    """With every b at least 0.5 from zero, so that inversion loses next to nothing."""
    model = model_of(case, num_hidden_layers=layers, **arguments).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("beta") and abs(parameter.item()) < 0.5:
                parameter.fill_(0.7)
    return model


@contextlib.contextmanager
def plain_autograd():
    """The same model in training mode, without a tape."""
    uses_tape = CRNetModel._uses_tape
    CRNetModel._uses_tape = lambda *_: False
    try:
        yield
    finally:
        CRNetModel._uses_tape = uses_tape


def step(model, policy=None, seed=5, **call):
    """(output, gradients) of one forward and backward; without a policy, of plain autograd."""
    if policy is not None:
        model.set_recompute(policy)
    model.zero_grad()
    torch.manual_seed(seed)
    call = call or {"input_ids": tokens()}
    with plain_autograd() if policy is None else contextlib.nullcontext():
        output = model(**call, labels=tokens(), use_cache=False)
    output.loss.backward()
    return output, gradients(model)


def assert_same_step(model, policy, dtype=None, **call):
    expected, expected_gradients = step(model, **call)
    output, actual_gradients = step(model, policy, **call)
    assert_close(output.loss, expected.loss, dtype)
    assert_all_close(actual_gradients, expected_gradients, dtype)


@pytest.fixture(params=POLICIES)
def policy(request):
    return request.param


@pytest.fixture
def tapes(monkeypatch):
    """Every tape made during a test."""
    made = []
    init = Tape.__init__

    def recording(tape, *arguments, **keywords):
        init(tape, *arguments, **keywords)
        made.append(tape)

    monkeypatch.setattr(Tape, "__init__", recording)
    return made


@pytest.fixture
def asked(monkeypatch):
    """Paths of the linears that ran under a graph of their own."""
    names = []
    run = OpaqueProduct.run
    monkeypatch.setattr(
        OpaqueProduct, "run", lambda product, *a, **k: names.append(product.name) or run(product, *a, **k)
    )
    return names


# What the plain model works with


def padding():
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, 11:] = 0
    return {"input_ids": tokens().masked_fill(mask == 0, PAD), "attention_mask": mask}


CALLS = {
    "plain": lambda: {"input_ids": tokens()},
    "packed": lambda: {
        "input_ids": tokens(),
        "position_ids": torch.cat([torch.arange(6), torch.arange(11)]).expand(2, -1),
    },
    "padding": padding,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["cross_layer", "gqa", "bias", "tied", "silu_increment"])
def test_calls(case, attention, call, policy, tapes, asked):
    model = training_model(case, attention=attention, dtype=torch.float64)
    # float32: in which transformers' loss and eager softmax work
    assert_same_step(model, policy, torch.float32, **CALLS[call]())
    assert len(tapes) == 1
    assert not asked


def test_inputs_embeds_get_their_gradient(policy):
    model = training_model()
    embeds = model.model.embed_tokens(tokens()).detach().requires_grad_()
    step(model, inputs_embeds=embeds)
    expected, embeds.grad = embeds.grad, None
    step(model, policy, inputs_embeds=embeds)
    assert_close(embeds.grad, expected)


def test_gradient_accumulation(policy):
    """Two forwards before two backwards, the first of them last."""
    model = training_model()
    first, second = tokens(seed=3), tokens(seed=4)
    with plain_autograd():
        (
            model(first, labels=first, use_cache=False).loss + model(second, labels=second, use_cache=False).loss
        ).backward()
    expected = gradients(model)
    model.zero_grad()
    model.set_recompute(policy)
    losses = [model(ids, labels=ids, use_cache=False).loss for ids in (first, second)]
    for loss in losses:
        loss.backward()
    assert_all_close(gradients(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision(dtype, autocast, attention, policy, tapes):
    """Gradients in the parameters' own dtypes, the carried state in float32."""
    model = training_model(dtype=torch.float32 if autocast else dtype, attention=attention)
    with torch.autocast("cpu", dtype, enabled=autocast):
        output = model(tokens(), labels=tokens(), use_cache=False)
    output.loss.backward()  # the same weights in plain autograd, the same rounding
    assert {p.dtype for p in gradients(model).values()} == {p.dtype for p in model.parameters()}
    model.zero_grad()
    with plain_autograd(), torch.autocast("cpu", dtype, enabled=autocast):
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.set_recompute(policy)
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss = model(tokens(), labels=tokens(), use_cache=False).loss
    assert {tensor.dtype for tensor in tapes[-1].live.tensors()} == {torch.float32}
    loss.backward()
    actual = gradients(model)
    error = sum(float((actual[n].float() - expected[n].float()).square().sum()) for n in expected)
    assert error**0.5 < 5e-2 * sum(float(g.float().square().sum()) for g in expected.values()) ** 0.5


def test_fp16_with_a_scaler(policy):
    """The scaler sees overflow as it does in plain autograd, and unscaled gradients are the same."""
    model = training_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    _, exact = step(model)
    model.zero_grad()
    model.set_recompute(policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.autocast("cpu", torch.float16):
        loss = model(tokens(), labels=tokens(), use_cache=False).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    actual = gradients(model)
    error = sum(float((actual[n] - exact[n]).square().sum()) for n in exact)
    assert error**0.5 < 1e-2 * sum(float(g.square().sum()) for g in exact.values()) ** 0.5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_dropout(policy, attention):
    """The rebuilt attention drops what the first one dropped, and the random state is where it would have been."""
    model = training_model(attention=attention, attention_dropout=0.4)
    expected, expected_gradients = step(model)
    after = torch.get_rng_state()
    output, actual_gradients = step(model, policy)
    assert torch.equal(torch.get_rng_state(), after)
    assert_close(output.loss, expected.loss)
    assert_all_close(actual_gradients, expected_gradients)
    other, _ = step(model, policy, seed=6)
    assert abs(other.loss - expected.loss) > 1e-4, "dropout did nothing: the test could not fail"


FROZEN = {
    "beta": lambda name: name.endswith("beta"),
    "embeddings": lambda name: "embed_tokens" in name,
    "lower half": lambda name: "embed_tokens" in name or "layers.0" in name or "layers.1" in name,
    "upper half": lambda name: "layers.2" in name or "layers.3" in name,
    "all but beta": lambda name: not name.endswith("beta"),
    "all but one A": lambda name: name != "model.layers.2.mlp.up_proj.A.weight",
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters(frozen, policy):
    model = training_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    assert_same_step(model, policy)


def test_beta_that_is_not_trained(policy):
    assert_same_step(training_model(beta_trainable=False), policy)


def test_hidden_states(policy):
    model = training_model()
    model.set_recompute(policy)
    output = model(tokens(), use_cache=False, output_hidden_states=True)
    expected = model.eval()(tokens(), use_cache=False, output_hidden_states=True)
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("chosen", [[1], [2], [1, 3], [2, 4]])
def test_gradients_from_inner_hidden_states(chosen, policy):
    """A loss on some of them: the gradient starts, or joins in, below the top."""
    model = training_model(dtype=torch.float64)

    def backward():
        model.zero_grad()
        hidden = model(tokens(), use_cache=False, output_hidden_states=True).hidden_states
        sum((index + 1) * hidden[index].square().mean() for index in chosen).backward()
        return gradients(model)

    with plain_autograd():
        expected = backward()
    model.set_recompute(policy)
    assert_all_close(backward(), expected)


def test_attention_weights_come_from_plain_autograd(policy, tapes, asked):
    model = training_model(attention="eager")
    model.set_recompute(policy)
    output = model(tokens(), labels=tokens(), use_cache=False, output_attentions=True)
    assert len(output.attentions) == 4
    assert not tapes
    step(model, policy)  # the recorder, which stays on the modules, does not count as somebody watching
    assert tapes
    assert not asked


def test_one_layer(policy):
    assert_same_step(training_model(layers=1), policy)


# What is not hand-written


@pytest.mark.parametrize("targets", [["A"], ["B"], ["q_proj.A", "down_proj.B"]])
def test_lora_on_the_factors(targets, policy, tapes, asked):
    """Linears with a replaced factor are asked, not bypassed; all others stay written out."""
    model = training_model(dtype=torch.float64)
    lora = peft.LoraConfig(
        r=2, target_modules=targets, layers_to_transform=[2], layers_pattern="layers", init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, lora).double()
    inner = adapted.base_model.model
    assert_same_step(inner, policy, torch.float32)
    every = {model.config.positions(2)[position].module for position in POSITIONS}
    expected = every if len(targets) == 1 else {"self_attn.q_proj", "mlp.down_proj"}
    assert set(asked) == expected
    assert all("lora_" in name for name in gradients(inner))


def test_lora_on_the_factors_keeps_increments_and_no_states():
    """Under `invert` an opaque product keeps its increment, as wide as its output, and no state of 11.4 h."""
    model = training_model(layers=6)
    model.set_recompute("invert")

    def kept():
        tape = find_tape(model(tokens(), labels=tokens(), use_cache=False).loss)
        assert not tape.states
        return {name: tuple(tensor.shape) for name, tensor in tape.kept[3].first.items()}

    before = kept()
    assert set(before.values()) == {(2, 17, 7)}
    lora = peft.LoraConfig(r=2, target_modules=["v_proj.A"], layers_to_transform=[3], layers_pattern="layers")
    peft.get_peft_model(model, lora)
    assert kept() == before | {"v": (2, 17, 48)}


def test_lora_with_dropout_and_trained_rest(policy):
    model = training_model(dtype=torch.float64)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.3, init_lora_weights=False)
    inner = peft.get_peft_model(model, lora).base_model.model
    for parameter in inner.parameters():
        parameter.requires_grad_(True)
    assert_same_step(inner.double(), policy, torch.float32)


WATCHED = ["self_attn.q_proj.A", "mlp.down_proj", "mlp.act_fn", "mlp", "self_attn", "input_layernorm"]


@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.parametrize("layer", [0, 1])
def test_watched_modules_are_run(name, layer, policy):
    if layer == 0 and name.endswith(".A"):
        return
    model = training_model()
    calls = []
    model.model.layers[layer].get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    assert_same_step(model, policy)
    assert calls


@pytest.mark.parametrize("name", WATCHED)
def test_forwards_replaced_on_the_instance_are_run(name, policy):
    """What accelerate does to load offloaded weights, and what people do to try something."""
    model = training_model(dtype=torch.float64)
    module = model.model.layers[1].get_submodule(name)
    plain = module.forward

    def doubled(*inputs, **arguments):
        output = plain(*inputs, **arguments)
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    before = step(model, policy)[0].loss
    module.forward = doubled
    assert_same_step(model, policy, torch.float32)
    assert_training_is_evaluation(model, policy)
    assert abs(step(model, policy)[0].loss - before) > 1e-6, "the replaced forward did nothing"


class HalvedNorm(CarriedRMSNorm):
    def forward(self, hidden_states):
        return 0.5 * super().forward(hidden_states)


class SquaredMLP(GatedMLP):
    def forward(self, y_gate, y_up):
        return super().forward(y_gate, y_up) ** 2


class ShiftedAttention(Attention):
    def core(self, query, key, value, **arguments):
        attended, weights = super().core(query, key, value, **arguments)
        return attended + 1, weights


class NegatedAttention(Attention):
    def forward(self, *outputs, **arguments):
        attended, weights = super().forward(*outputs, **arguments)
        return -attended, weights


class TripledLinear(CrossLayerLinear):
    def forward(self, x, previous):
        return 3 * super().forward(x, previous)


REPLACED = {
    "input_layernorm": HalvedNorm,
    "mlp": SquaredMLP,
    "self_attn": ShiftedAttention,
    "self_attn ": NegatedAttention,
    "self_attn.v_proj": TripledLinear,
}


def assert_training_is_evaluation(model, policy):
    model.set_recompute(policy)
    trained = model.train()(tokens(), use_cache=False).logits
    assert_close(trained, model.eval()(tokens(), use_cache=False).logits)
    model.train()


@pytest.mark.parametrize("name", REPLACED)
def test_replaced_parts_are_asked(name, policy):
    """A subclass in the place of a norm, an MLP, attention or a linear is run in training as in evaluation."""
    model = training_model(dtype=torch.float64)
    before = step(model, policy)[0].loss
    model.model.layers[1].get_submodule(name.strip()).__class__ = REPLACED[name]
    assert_same_step(model, policy, torch.float32)
    assert_training_is_evaluation(model, policy)
    assert abs(step(model, policy)[0].loss - before) > 1e-6, "the part that was replaced does nothing"


def test_a_block_with_a_forward_of_its_own_runs_without_a_tape(policy, tapes):
    model = training_model()

    class Doubled(type(model.model.layers[1])):
        def forward(self, hidden_states, *carried, **arguments):
            hidden_states, *carried = super().forward(hidden_states, *carried, **arguments)
            return 2 * hidden_states, *carried

    model.model.layers[1].__class__ = Doubled
    assert_same_step(model, policy)
    assert_training_is_evaluation(model, policy)
    assert not tapes


def test_hooks_that_change_the_hidden_states(policy):
    """Steering: what a layer receives is not what the one before returned."""
    model = training_model(layers=6)
    model.model.layers[2].register_forward_hook(lambda module, inputs, outputs: (2 * outputs[0], *outputs[1:]))
    model.model.layers[4].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1, *inputs[1:]))
    assert_same_step(model, policy)


def test_inputs_cast_on_the_way(policy, tapes):
    """FSDP's mixed precision rounds what a layer is called with: the tape goes on with its own float32 state."""
    model = training_model(dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].bfloat16(), *inputs[1:]))
    model.set_recompute(policy)
    loss = model(tokens(), labels=tokens(), use_cache=False).loss
    assert {tensor.dtype for tensor in tapes[0].live.tensors()} == {torch.float32}
    assert list(tapes[0].inputs) == [0]
    loss.backward()
    drift = model.recompute_drift
    assert drift is None or drift < 1e-2


@pytest.mark.parametrize("policy", REBUILDING)
def test_hooks_that_write_over_hidden_states_are_refused(policy):
    model = training_model()

    def double(module, inputs, outputs):
        outputs[0].detach().mul_(2)

    model.model.layers[1].register_forward_hook(double)
    with pytest.raises(RuntimeError, match="between layers 1 and 2 were modified in place; return new ones"):
        step(model, policy)


def test_parameters_changed_before_backward_are_refused(policy):
    model = training_model()
    model.set_recompute(policy)
    loss = model(tokens(), labels=tokens(), use_cache=False).loss
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.B.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# When a tape is used


def test_evaluation_and_generation_never_use_a_tape(policy, tapes):
    model = training_model()
    model.set_recompute(policy)
    with torch.no_grad():
        model(tokens())
    model.eval()
    model(tokens(), labels=tokens()).loss.backward()
    model.generate(tokens(), attention_mask=torch.ones_like(tokens()), max_new_tokens=3, do_sample=False)
    assert not tapes


@pytest.mark.parametrize("policy", REBUILDING)
def test_training_turns_the_default_cache_off(policy, tapes):
    model = training_model()
    model.set_recompute(policy)
    output = model(tokens(), labels=tokens())  # use_cache is on by default
    assert output.past_key_values is None
    assert tapes
    output = model(tokens(), labels=tokens(), past_key_values=DynamicCache(config=model.config))
    assert output.past_key_values is not None
    assert len(tapes) == 1


def test_dense_has_no_tape(tapes):
    model = model_of("dense").train()
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert not tapes


@pytest.mark.parametrize("case", ["cola", "low_rank", "cola_gqa_bias"])
def test_other_factorizations(case, tapes):
    """Nothing is carried but h: X A is kept under every policy, and h inverted from it."""
    model = model_of(case, dtype=torch.float64, num_hidden_layers=5).train()
    for policy in ("none", "invert", "replay"):
        assert_same_step(model, policy, torch.float32)
        assert tapes[-1].policy.name == policy
    model.set_recompute("invert")
    tape = find_tape(model(tokens(), labels=tokens(), use_cache=False).loss)
    assert not tape.states
    assert set(tape.kept[2].first) == set(POSITIONS)
    with pytest.raises(ValueError, match="recompute='reversible' belongs to factorization='cross_layer'"):
        model.set_recompute("reversible")


@pytest.mark.parametrize("configured", POLICIES)
def test_activation_checkpointing_selects_invert(configured, tapes):
    """Unless the config names another policy; and the config stays as it was."""
    model = training_model()
    expected = step(model)[1]
    model.set_recompute(configured)
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    assert model.config.recompute == configured
    model.zero_grad()
    model(tokens(), labels=tokens()).loss.backward()
    assert tapes[-1].policy.name == ("invert" if configured == "none" else configured)
    assert_all_close(gradients(model), expected)
    model.activation_checkpointing_disable()
    model(tokens(), labels=tokens(), use_cache=False)
    assert tapes[-1].policy.name == configured


def test_activation_checkpointing_by_its_old_name(tapes):
    model = training_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": True})
    model(tokens(), labels=tokens()).loss.backward()
    assert tapes[-1].policy.name == "invert"
    model.set_recompute("none")  # the explicit word wins
    model(tokens(), labels=tokens(), use_cache=False)
    assert tapes[-1].policy.name == "none"


def test_set_recompute_refuses_and_keeps_what_was():
    model = training_model()
    model.set_recompute("reversible", 2)
    with pytest.raises(ValueError, match="'sometimes' does not exist; allowed: none, invert, replay, reversible"):
        model.set_recompute("sometimes")
    with pytest.raises(ValueError, match=r"recompute_interval=5 is outside 1\.\.4"):
        model.set_recompute("replay", 5)
    assert (model.config.recompute, model.config.recompute_interval) == ("reversible", 2)
    with pytest.raises(ValueError, match="belongs to factorization='cross_layer'; with 'cola'"):
        model_of("cola").set_recompute("reversible")


def test_the_policy_is_saved_and_loaded(tmp_path, tapes):
    model = training_model(recompute="reversible", recompute_interval=3)
    model.save_pretrained(tmp_path)
    again = CRNetForCausalLM.from_pretrained(tmp_path).train()
    assert isinstance(again.config, CRNetConfig)
    again(tokens(), labels=tokens()).loss.backward()
    assert (tapes[-1].policy.name, tapes[-1].interval) == ("reversible", 3)


def test_training_arguments_select_invert(tmp_path, tapes):
    """The plain Trainer, with the cache left as the config has it."""
    model = training_model()
    arguments = TrainingArguments(
        tmp_path, activation_checkpointing=True, max_steps=1, report_to="none", use_cpu=True, save_strategy="no"
    )
    data = [{"input_ids": ids, "labels": ids} for ids in tokens(rows=8)]
    Trainer(model=model, args=arguments, train_dataset=data).train()
    assert {tape.policy.name for tape in tapes} == {"invert"}
    assert model.recompute_drift is not None


@pytest.mark.parametrize("autocast", [False, True])
def test_forty_steps_end_where_plain_autograd_ends(autocast):
    """One seed, one batch after the other; loss on rows that were not trained on."""

    def final_loss(policy):
        model = model_of("cross_layer", num_hidden_layers=6)
        for name, parameter in model.named_parameters():
            if name.endswith("beta"):
                parameter.data.fill_(1.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if policy is not None:
            model.set_recompute(policy)
        with plain_autograd() if policy is None else contextlib.nullcontext():
            for seed in range(40):
                model.train()
                ids = tokens(rows=4, seed=seed) % 17 + 3
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = model(ids, labels=ids, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        validation = tokens(rows=16, seed=99) % 17 + 3
        with torch.no_grad():
            return model.eval()(validation, labels=validation).loss.item()

    expected = final_loss(None)
    assert expected < 4
    for policy in POLICIES:
        assert final_loss(policy) == pytest.approx(expected, abs=0.002), policy


# What is refused


def test_double_backward_is_refused(policy):
    model = training_model()
    model.set_recompute(policy)
    loss = model(tokens(), labels=tokens(), use_cache=False).loss
    with pytest.raises(RuntimeError, match=r"Second derivatives .* evaluation mode"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_second_backward_without_retained_graph_is_refused(policy):
    model = training_model()
    model.set_recompute(policy)
    loss = model(tokens(), labels=tokens(), use_cache=False).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("policy", REBUILDING)
def test_second_backward_is_refused(policy):
    model = training_model()
    model.set_recompute(policy)
    loss = model(tokens(), labels=tokens(), use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=f"layer 3 a second time: recompute='{policy}' has freed"):
        loss.backward()


def test_retained_graph_with_none():
    model = training_model(dtype=torch.float64)
    expected = step(model)[1]
    model.zero_grad()
    model.set_recompute("none")
    loss = model(tokens(), labels=tokens(), use_cache=False).loss
    top = [p for name, p in model.named_parameters() if "layers.3" in name]
    for _ in range(2):  # once more after stopping half-way: what was handed down then does not count
        torch.autograd.grad(loss, top, retain_graph=True)
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert_all_close(gradients(model), expected)
    inner = model(tokens(), use_cache=False, output_hidden_states=True).hidden_states
    torch.autograd.grad(inner[4].sum(), top, retain_graph=True)
    model.zero_grad()
    inner[3].square().sum().backward()
    found = gradients(model)
    model.zero_grad()
    with plain_autograd():
        model(tokens(), use_cache=False, output_hidden_states=True).hidden_states[3].square().sum().backward()
    assert_all_close(found, gradients(model))


# Numerics: small b, drift


@pytest.fixture
def logged():
    """Messages of the model's own loggers."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(module.__name__) for module in (tape_file, model_file)]
    for logger in loggers:
        logger.addHandler(handler)
    yield messages
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.mark.parametrize("policy", ["invert", "reversible"])
def test_small_b_keeps_the_state_instead(policy, logged, tapes):
    model = training_model(layers=6)
    with torch.no_grad():
        model.model.layers[3].mlp.gate_proj.beta.fill_(0.0)
    assert_same_step(model, policy)
    step(model, policy)
    told = [message for message in logged if "too small" in message]
    assert len(told) == 2  # once each time the policy is chosen
    assert "b=1e-06 of layers.3.gate is too small to divide by: recompute=" in told[0]
    tapes.clear()
    model(tokens(), labels=tokens(), use_cache=False)
    assert list(tapes[0].states) == [2]


def test_states_are_kept_by_the_product_of_b(tapes):
    model = training_model(layers=24)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("beta"):
                parameter.fill_(0.5)
    model.set_recompute("invert")
    # sum of 2^j for j = 1..n stays below bound / 2^-24 up to n = 23, 6, 3: that many inversions between kept states
    for bound, kept in ((2.0, []), (1e-5, [6, 13, 20]), (1e-6, [3, 7, 11, 15, 19])):
        model.config.recompute_error_bound = bound
        model(tokens(), use_cache=False)
        assert list(tapes[-1].states) == kept, bound


def test_drift_is_measured_and_bounded(logged, tapes):
    model = training_model(layers=8)
    step(model, "invert")
    assert 0 < model.recompute_drift < 1e-4
    assert not logged
    model.config.recompute_drift_bound = 1e-9
    step(model, "invert")
    assert tapes[-1].policy.name == "invert"
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert tapes[-1].policy.name == "replay"
    assert len(logged) == 1
    assert "away from the kept ones, more than 1e-09" in logged[0]
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert model.recompute_drift is None
    assert len(logged) == 1
    model.set_recompute("invert")
    model(tokens(), use_cache=False)
    assert tapes[-1].policy.name == "invert"


def test_wrong_states_are_noticed(monkeypatch, logged):
    """A state that went wrong on the way is found where a kept one is met."""
    model = training_model(layers=8)
    backward = BlockRun.backward

    def spoiled(run, work, kept):
        result = backward(run, work, kept)
        for y in work.Y_below.values():
            y.mul_(1.01)
        return result

    monkeypatch.setattr(BlockRun, "backward", spoiled)
    step(model, "reversible")
    assert model.recompute_drift > 1e-3
    model(tokens(), use_cache=False)
    assert any("Going on with recompute='replay'" in message for message in logged)


# Memory


def test_nothing_outlives_the_graph(policy):
    """Neither after a backward nor when there is none."""
    model = training_model()
    model.set_recompute(policy)
    for backward in (True, False):
        output = model(tokens(), labels=tokens(), use_cache=False)
        function = output.loss.grad_fn
        del function
        tape = weakref.ref(find_tape(output.loss))
        live = weakref.ref(tape().live.Y["gate"])
        if backward:
            output.loss.backward()
        del output
        assert tape() is None
        assert live() is None
    gc.collect()


def find_tape(loss):
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if hasattr(node, "tape"):
            return node.tape
        waiting.extend(function for function, _ in node.next_functions if function is not None)
    return None


def test_flop_counter_sees_every_product():
    """Of `none` as many as of plain autograd; rebuilding adds one product T B per CR-Net layer and position.

    torch's attention kernel for the CPU has no count.
    """
    model = training_model()

    def count(policy):
        model.zero_grad()
        if policy is not None:
            model.set_recompute(policy)
        with (
            plain_autograd() if policy is None else contextlib.nullcontext(),
            FlopCounterMode(display=False) as counter,
        ):
            model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        return counter.get_total_flops()

    config = model.config
    rebuilt = 0
    for layer_idx in range(1, config.num_hidden_layers):
        for position in POSITIONS:
            rank = config.linear_rank(layer_idx, position)
            rebuilt += 2 * tokens().numel() * rank * config.linear_shape(position)[1]
    assert count("none") == count(None)
    assert count("invert") == count(None) + rebuilt
