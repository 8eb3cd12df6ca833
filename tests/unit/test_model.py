"""CRNet models within transformers: outputs, dtypes, losses, packing, checkpointing, PEFT, Auto classes."""

import subprocess
import sys
import warnings
from itertools import pairwise

import peft
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.distributed import DistributedConfig

from crosslayer.crnet import (
    CRNetConfig,
    CRNetForCausalLM,
    CRNetForSequenceClassification,
    CRNetModel,
    CrossLayerLinear,
)
from crosslayer.crnet.functions import CarriedRMSNorm
from crosslayer.crnet.loss import fused_cross_entropy
from model_cases import CASES, FACTORIZATION_CASES, PAD, SEQUENCE, config_of, gradients, model_of, tokens
from tolerances import TOLERANCES, assert_all_close, assert_close, assert_far

FACTORIZATIONS = list(FACTORIZATION_CASES)


# Inputs and outputs


@pytest.mark.parametrize("case", [*FACTORIZATIONS, "gqa", "head_dim"])
def test_hidden_states_and_attentions(case):
    model = model_of(case, attention="eager")
    ids = tokens()
    plain = model(ids)
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert torch.equal(output.logits, plain.logits)
    assert plain.hidden_states is None
    assert plain.attentions is None

    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, SEQUENCE, width)] * (layers + 1)
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    # Each one is the input of the next layer.
    seen = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(ids)
    assert all(torch.equal(one, other) for one, other in zip(seen, output.hidden_states, strict=False))

    heads = model.config.num_attention_heads
    assert [tuple(a.shape) for a in output.attentions] == [(2, heads, SEQUENCE, SEQUENCE)] * layers
    for attention in output.attentions:
        assert_close(attention.sum(-1), torch.ones(2, heads, SEQUENCE))
        assert (attention.triu(1) == 0).all()


@pytest.mark.parametrize("case", FACTORIZATIONS)
def test_inputs_embeds(case):
    model = model_of(case)
    embeds = model.model.embed_tokens(tokens())
    assert torch.equal(model(inputs_embeds=embeds).logits, model(tokens()).logits)
    tuple_output = model(tokens(), return_dict=False)
    assert torch.equal(tuple_output[0], model(tokens()).logits)


def test_exactly_one_kind_of_input():
    model = model_of("cross_layer")
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(tokens(), inputs_embeds=model.model.embed_tokens(tokens()))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


def test_logits_to_keep():
    model = model_of("cross_layer")
    logits = model(tokens()).logits
    assert_close(model(tokens(), logits_to_keep=3).logits, logits[:, -3:])


@pytest.mark.parametrize("case", ["cross_layer", "tied"])
def test_resize_token_embeddings(case, tmp_path):
    model = model_of(case)
    logits = model(tokens()).logits
    model.resize_token_embeddings(120)
    assert model.config.vocab_size == model.vocab_size == 120
    assert model(tokens()).logits.shape == (2, SEQUENCE, 120)
    assert_close(model(tokens()).logits[..., :101], logits)
    model.save_pretrained(tmp_path)
    again = CRNetForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("case", FACTORIZATIONS)
def test_right_padding_changes_nothing(case, use_cache):
    model = model_of(case)
    ids = tokens()
    padded = torch.cat([ids, torch.full((2, 4), PAD)], 1)
    mask = (padded != PAD).long()
    logits = model(padded, attention_mask=mask, use_cache=use_cache).logits[:, :SEQUENCE]
    assert_close(logits, model(ids).logits)


# Dtypes


def carried_dtypes(model, *args, **kwargs):
    """Runs the model and returns its output with the dtypes of what travels between the layers."""
    seen = set()
    hooks = [
        layer.register_forward_hook(lambda module, inputs, outputs: seen.update(t.dtype for t in outputs))
        for layer in model.model.layers
    ]
    output = model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return output, seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*FACTORIZATIONS, "silu_increment"])
def test_half_precision_loading(case, dtype, tmp_path):
    model = model_of(case)
    model.save_pretrained(tmp_path)
    half = CRNetForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert half.dtype == half.config.dtype == dtype
    parameters = dict(model.named_parameters())
    for name, parameter in half.named_parameters():
        if name.endswith("beta"):
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, parameters[name])
        else:
            assert parameter.dtype == dtype, name
    output, carried = carried_dtypes(half, tokens(), labels=tokens())
    assert output.logits.dtype == dtype
    assert output.loss.dtype == torch.float32
    assert carried == ({dtype} if model.config.factorization == "dense" else {torch.float32})
    assert_close(output.logits, model(tokens()).logits, dtype)
    output.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(half).values())
    # and back again: beta is still float32 in the file
    half.save_pretrained(tmp_path / "half")
    again = CRNetForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), half.parameters(), strict=True))
    assert [p.dtype for p in again.parameters()] == [p.dtype for p in half.parameters()]


def gathered(grads):
    """Named gradients with those of all beta, one number each, as a single vector."""
    betas = [gradient for name, gradient in grads.items() if name.endswith("beta")]
    rest = {name: gradient for name, gradient in grads.items() if not name.endswith("beta")}
    return rest | ({"beta": torch.cat(betas)} if betas else {})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", FACTORIZATIONS)
def test_bf16_autocast_step(case, attention):
    model = model_of(case, attention=attention).train()
    model(tokens(), labels=tokens()).loss.backward()
    exact, loss = gradients(model), model(tokens(), labels=tokens()).loss
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output, carried = carried_dtypes(model, tokens(), labels=tokens())
    assert carried == {torch.float32}
    assert_close(output.loss, loss, torch.bfloat16)
    output.loss.backward()
    # Norm-wise, since single entries differ more after three layers in bf16; and all beta as one vector.
    for name, gradient in gathered(gradients(model)).items():
        assert gradient.dtype == torch.float32
        error = (gradient - gathered(exact)[name]).norm() / gradient.norm()
        assert error < 0.1, name
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.step()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens(), labels=tokens()).loss < loss


def test_float64_all_the_way(tmp_path):
    model = model_of("cross_layer", dtype=torch.float64)
    output, carried = carried_dtypes(model, tokens())
    assert output.logits.dtype == torch.float64
    assert carried == {torch.float64}
    single = model_of("cross_layer")
    single.load_state_dict(model.state_dict())
    error = (single(tokens()).logits - output.logits).abs().max()
    assert 0 < error < 1e-4  # the float64 model is not a float32 one in disguise
    model.save_pretrained(tmp_path)
    again = CRNetForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_norm(dtype):
    """Computed in float32, or in float64 for float64; the result has the weight's dtype."""
    norm = CarriedRMSNorm(48, eps=1e-6)
    nn.init.normal_(norm.weight, 1, 0.2)
    norm = norm.to(dtype)
    x = (3 * torch.randn(4, 48)).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert norm(x).dtype == dtype
    one_rounding = {
        torch.bfloat16: 2**-8,
        torch.float16: 2**-11,
        torch.float32: 2**-21,
        torch.float64: 2**-50,
    }
    assert ((norm(x).double() - exact).abs() <= one_rounding[dtype] * exact.abs()).all()
    # the carried state is float32 while the products are in half precision
    assert norm(x.float()).dtype == dtype


# Tied embeddings


def test_tied_embeddings(tmp_path):
    model = model_of("tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        assert "model.embed_tokens.weight" in stored.keys()  # noqa: SIM118
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118
    again = CRNetForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_untied_embeddings_stay_apart(tmp_path):
    model = model_of("cross_layer")
    model.save_pretrained(tmp_path)
    again = CRNetForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)


# Loss over the vocabulary


def some_labels():
    labels = tokens()
    labels[0, :6] = -100
    labels[1, 9] = -100
    return labels


LOSS_ARGUMENTS = {
    "plain": lambda: {"labels": tokens()},
    "ignored": lambda: {"labels": some_labels()},
    "num_items": lambda: {"labels": some_labels(), "num_items_in_batch": torch.tensor(61)},
    "num_items_int": lambda: {"labels": some_labels(), "num_items_in_batch": 61},
    "ignore_index": lambda: {"labels": tokens(), "ignore_index": int(tokens()[0, 3])},
    "shift_labels": lambda: {"labels": tokens(), "shift_labels": tokens().roll(3, 1)},
}


@pytest.fixture(params=["this torch", "older torch"])
def any_torch(request, monkeypatch):
    """With torch.nn.functional.linear_cross_entropy and without."""
    if request.param == "older torch":
        monkeypatch.delattr(nn, "LinearCrossEntropyOptions", raising=False)
        monkeypatch.delattr(nn.functional, "linear_cross_entropy", raising=False)
    elif not hasattr(nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no linear_cross_entropy")


@pytest.mark.usefixtures("any_torch")
@pytest.mark.parametrize("arguments", LOSS_ARGUMENTS)
@pytest.mark.parametrize("case", ["cross_layer", "tied"])
def test_fused_loss_is_the_plain_loss(case, arguments):
    model = model_of(case)
    arguments = LOSS_ARGUMENTS[arguments]()
    plain = model(tokens(), **arguments)
    plain.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.fused_loss = True
    fused = model(tokens(), **arguments)
    fused.loss.backward()
    assert fused.logits is None
    assert fused.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert_all_close(gradients(model), expected)


def test_fused_loss_check_can_fail():
    model = model_of("cross_layer")
    losses = {name: model(tokens(), **make()).loss.item() for name, make in LOSS_ARGUMENTS.items()}
    assert losses.pop("num_items") == losses["num_items_int"]
    values = sorted(losses.values())
    assert all(larger > smaller * (1 + 1e-5) for smaller, larger in pairwise(values))


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="this torch has no linear_cross_entropy")
def test_fused_loss_never_runs_the_head(monkeypatch):
    model = model_of("cross_layer")
    model.fused_loss = True
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda linear, x: pytest.fail("a linear was called"))
    with pytest.raises(pytest.fail.Exception):
        model.lm_head(torch.zeros(1, 48))
    fused_cross_entropy(torch.zeros(1, 4, 48), model.lm_head, tokens(rows=1, length=4))


def test_fused_loss_asks_a_head_that_is_watched():
    model = model_of("cross_layer")
    model.fused_loss = True
    expected = model(tokens(), labels=tokens()).loss
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(tokens(), labels=tokens()).loss, expected)
    assert calls


@pytest.mark.usefixtures("any_torch")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_loss_in_half_precision(dtype):
    """A float32 number, as close to the exact loss as the plain one is."""
    model = model_of("cross_layer", dtype=dtype)
    exact = model_of("cross_layer")
    exact.load_state_dict(model.state_dict())
    model.fused_loss = True
    loss = model(tokens(), labels=tokens()).loss
    assert loss.dtype == torch.float32
    assert_close(loss, exact(tokens(), labels=tokens()).loss, dtype)
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.usefixtures("any_torch")
def test_fused_loss_under_autocast():
    model = model_of("cross_layer")
    exact = model(tokens(), labels=tokens()).loss
    model.fused_loss = True
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(), labels=tokens()).loss
    assert_close(loss, exact, torch.bfloat16)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="this torch has no linear_cross_entropy")
def test_fused_loss_under_autocast_multiplies_in_its_dtype(monkeypatch):
    """As on accelerators, where float32 products would take as long as all layers together."""
    model, seen, op = model_of("cross_layer"), [], nn.functional.linear_cross_entropy
    exact = model(tokens(), labels=tokens()).loss
    exact.backward()
    expected = gradients(model)["lm_head.weight"]
    model.zero_grad()
    model.fused_loss = True

    def watched(flat, weight, *args, **kwargs):
        seen.append((flat.dtype, weight.dtype))
        return op(flat, weight, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "linear_cross_entropy", watched)
    monkeypatch.setattr("crosslayer.crnet.loss.FLOAT32_CHUNKS", ())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert loss.dtype == gradients(model)["lm_head.weight"].dtype == torch.float32
    assert_close(loss, exact, torch.bfloat16)
    assert_close(gradients(model)["lm_head.weight"], expected, torch.bfloat16)


def test_fused_loss_asks_a_replaced_head():
    """LoRA on the head: its product must be part of the loss."""
    model = model_of("cross_layer")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, lora_dropout=0.0)
    )
    model = adapted.base_model.model
    plain = model(tokens(), labels=tokens()).loss
    model.fused_loss = True
    assert model(tokens(), labels=tokens()).loss.item() == pytest.approx(plain.item(), rel=1e-6)
    with adapted.disable_adapter():
        assert abs(model(tokens(), labels=tokens()).loss.item() - plain.item()) > 1e-3


def test_loss_is_counted_as_in_causal_language_models():
    """transformers reads the kind of loss, and Trainer the token count, off the class name and **kwargs."""
    model = model_of("cross_layer")
    assert model.loss_type == "ForCausalLM"
    labels = some_labels()
    logits = model(tokens()).logits[:, :-1].flatten(0, 1)
    total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    counted = (labels[:, 1:] != -100).sum()
    assert model(tokens(), labels=labels).loss.item() == pytest.approx((total / counted).item(), rel=1e-6)
    by_items = model(tokens(), labels=labels, num_items_in_batch=7).loss
    assert by_items.item() == pytest.approx(total.item() / 7, rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", ["cross_layer", "cola"])
def test_gradient_accumulation_equals_one_batch(case, fused):
    model = model_of(case)
    model.fused_loss = fused
    ids, labels = tokens(rows=4), tokens(rows=4)
    labels[1, 3:] = -100
    labels[2, :15] = -100
    items = (labels[:, 1:] != -100).sum()
    model(ids, labels=labels).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        model(ids[rows], labels=labels[rows], num_items_in_batch=items).loss.backward()
    assert_all_close(gradients(model), expected)


# Sequence classification


@pytest.mark.parametrize("case", FACTORIZATIONS)
def test_sequence_classification(case, tmp_path):
    model = model_of(case, CRNetForSequenceClassification, num_labels=5)
    ids = tokens()
    mask = torch.ones_like(ids)
    output = model(ids, attention_mask=mask, labels=torch.tensor([1, 4]))
    assert output.logits.shape == (2, 5)
    # The last token decides.
    hidden = model.model(ids).last_hidden_state
    assert_close(output.logits, model.score(hidden[:, -1]))
    expected = nn.functional.cross_entropy(output.logits, torch.tensor([1, 4]))
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    output.loss.backward()
    assert all(gradient.abs().sum() > 0 for gradient in gradients(model).values())

    pad = torch.full((2, 6), PAD)
    right = torch.cat([ids, pad], 1)
    left = torch.cat([pad, ids], 1)
    for padded in (right, left):
        padded_mask = (padded != PAD).long()
        position_ids = (padded_mask.cumsum(-1) - 1).clamp(min=0)
        assert_close(model(padded, attention_mask=padded_mask, position_ids=position_ids).logits, output.logits)

    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is CRNetForSequenceClassification
    assert again.num_labels == 5
    assert torch.equal(again(ids, attention_mask=mask).logits, output.logits)


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem_type"),
    [
        (torch.tensor([0.5, 2.0]), 1, "regression"),
        (torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), 3, "multi_label_classification"),
    ],
)
def test_other_classification_problems(labels, num_labels, problem_type):
    model = model_of("cross_layer", CRNetForSequenceClassification, num_labels=num_labels)
    loss = model(tokens(), labels=labels).loss
    assert model.config.problem_type == problem_type
    assert loss.isfinite()


# Packed documents

FIRST, SECOND = 9, 8
POSITIONS_OF_TWO = torch.cat([torch.arange(FIRST), torch.arange(SECOND)])[None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("case", ["cross_layer", "dense"])
def test_packed_documents_never_see_one_another(case, use_cache, attention):
    model = model_of(case, attention=attention)
    one, other = tokens(1, seed=1), tokens(1, seed=2)
    changed_first = torch.cat([other[:, :FIRST], one[:, FIRST:]], 1)
    changed_second = torch.cat([one[:, :FIRST], other[:, FIRST:]], 1)

    def logits(ids, position_ids=POSITIONS_OF_TWO):
        return model(ids, position_ids=position_ids, use_cache=use_cache).logits

    both = logits(one)
    assert torch.equal(logits(changed_first)[:, FIRST:], both[:, FIRST:])
    assert torch.equal(logits(changed_second)[:, :FIRST], both[:, :FIRST])
    # and equals each document alone
    assert_close(both[:, :FIRST], model(one[:, :FIRST]).logits)
    assert_close(both[:, FIRST:], model(one[:, FIRST:]).logits)
    # Positions that run on are one document: the check can fail.
    running = torch.arange(SEQUENCE)[None]
    assert_far(logits(changed_first, running)[:, FIRST:], logits(one, running)[:, FIRST:])


def test_packed_documents_in_training():
    """The gradient of one document's loss does not depend on its neighbour."""
    model = model_of("cross_layer").train()

    def document_gradients(ids):
        model.zero_grad()
        labels = ids.clone()
        labels[:, : FIRST + 1] = -100
        model(ids, position_ids=POSITIONS_OF_TWO, labels=labels).loss.backward()
        return gradients(model)

    one, other = tokens(1, seed=1), tokens(1, seed=2)
    one_grads = document_gradients(one)
    other_grads = document_gradients(torch.cat([other[:, :FIRST], one[:, FIRST:]], 1))
    assert_all_close(other_grads, one_grads)


# Activation checkpointing


WHOLE_LAYERS = [name for name in FACTORIZATIONS if name != "cross_layer"]  # cross_layer: test_recompute.py


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("case", WHOLE_LAYERS)
def test_activation_checkpointing_changes_no_gradient(case, use_reentrant):
    model = model_of(case).train()
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    calls = []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert len(calls) == 2  # forward, and again in backward
    assert gradients(model).keys() == expected.keys()
    assert_all_close(gradients(model), expected)


def test_activation_checkpointing_by_its_old_name():
    model = model_of("cola").train()
    model(tokens(), labels=tokens()).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    model(tokens(), labels=tokens()).loss.backward()  # use_cache is on by default and is turned off
    assert all(torch.equal(gradients(model)[name], expected[name]) for name in expected)


def test_activation_checkpointing_every_other_layer():
    model = model_of("cola", num_hidden_layers=4).train()
    model(tokens(), labels=tokens()).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.activation_checkpointing_enable(every_n_layers=2)
    model(tokens(), labels=tokens()).loss.backward()
    assert all(torch.equal(gradients(model)[name], expected[name]) for name in expected)


# PEFT


@pytest.mark.parametrize("case", [*FACTORIZATIONS, "bias"])
def test_lora_on_all_linear(case):
    model = model_of(case)
    base = model(tokens()).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0))
    targets = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.Linear)}
    factors = {
        name for name, module in model_of(case).model.named_modules(prefix="model") if isinstance(module, nn.Linear)
    }
    assert targets == factors  # every linear of the decoder, A and B each; not the head
    assert torch.equal(adapted(tokens()).logits, base)

    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    trained = adapted(tokens()).logits
    assert_far(trained, base)
    with adapted.disable_adapter():
        assert torch.equal(adapted(tokens()).logits, base)
    merged = adapted.merge_and_unload()
    assert_close(merged(tokens()).logits, trained)


def test_lora_by_name_and_frozen_rest():
    adapted = peft.get_peft_model(model_of("cross_layer"), peft.LoraConfig(target_modules=["A"], r=2))
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 14
    assert all(".A.lora_" in name for name in trainable)


# Auto classes


def test_auto_classes_know_the_models(tmp_path):
    fields = config_of("cross_layer").to_diff_dict()
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    assert type(config) is CRNetConfig
    for auto, expected in (
        (AutoModel, CRNetModel),
        (AutoModelForCausalLM, CRNetForCausalLM),
        (AutoModelForSequenceClassification, CRNetForSequenceClassification),
    ):
        assert type(auto.from_config(config)) is expected
    model_of("cross_layer").save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is CRNetConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is CRNetForCausalLM
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is CRNetModel
    assert_close(base(tokens()).last_hidden_state, model_of("cross_layer").model(tokens()).last_hidden_state)


def test_importing_crosslayer_registers_the_auto_classes(tmp_path):
    model_of("cross_layer").save_pretrained(tmp_path)
    script = (
        "import crosslayer, sys; from transformers import AutoModelForCausalLM as A; "
        "print(type(A.from_pretrained(sys.argv[1])).__module__)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "crosslayer.crnet.modeling_crnet"


def test_flags():
    """What transformers and accelerate may rely on."""
    assert CRNetForCausalLM._no_split_modules == ["CRNetDecoderLayer"]
    assert CRNetForCausalLM.supports_gradient_checkpointing
    assert CRNetForCausalLM._supports_sdpa
    assert CRNetForCausalLM._supports_attention_backend
    assert CRNetForCausalLM._can_compile_fullgraph
    model = model_of("cross_layer")
    assert model.model.tp_plan["layers.*"] == "crosslayer_block"
    assert not model.model.pp_plan


def test_pipelines_are_refused():
    """transformers would cut any model whose layers are named so, plan or not."""
    with pytest.raises(ValueError, match="pp_size=2: a stage of a CR-Net would have to pass on every carried Y"):
        CRNetForCausalLM.maybe_distribute_model(model_of("cross_layer"), DistributedConfig(pp_size=2), None)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case):
    model = model_of(case)
    model(tokens(), labels=tokens()).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()} == set()


def test_carried_state_is_passed_by_position():
    """Keyword arguments would lose their gradients under reentrant checkpointing."""
    model = model_of("cross_layer")
    counts = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: counts.append(len(inputs)))
    model(tokens())
    assert counts == [1, 8, 8]
    linears = [module for module in model.modules() if isinstance(module, CrossLayerLinear)]
    assert not any(torch.is_tensor(value) for linear in linears for value in vars(linear).values()), (
        "a linear keeps a tensor between calls"
    )


def test_tolerances_cover_the_dtypes_used():
    assert set(TOLERANCES) == {torch.float64, torch.float32, torch.bfloat16, torch.float16}
