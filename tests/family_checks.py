"""Checks that hold for every family, written once; `tests/parity/test_families.py` runs them over the table.

Gradients are compared with plain autograd, which is what a model runs on in evaluation mode or without a tape.
"""

import contextlib

import peft
import torch

from crosslayer.analysis import measure_saved_activations
from crosslayer.crnet.cross_layer_linear import LowRankLinear
from crosslayer.crnet.mixture import CrossLayerMixture, LowRankExperts
from crosslayer.crnet.model import CrossLayerModel
from family_cases import FamilyCase, tokens
from model_cases import gradients
from tolerances import assert_all_close, assert_close

REBUILDING = ("invert", "replay", "reversible")


@contextlib.contextmanager
def plain_autograd():
    """The same model in training mode, without a tape."""
    uses_tape = CrossLayerModel._uses_tape
    CrossLayerModel._uses_tape = lambda *_: False
    try:
        yield
    finally:
        CrossLayerModel._uses_tape = uses_tape


def step(model, policy=None, interval=None, **call):
    """Gradients under a memory policy, chosen anew; without one, of plain autograd in training mode."""
    if policy is None:
        with plain_autograd():
            return gradients_of(model, **call)
    model.set_recompute(policy, interval)
    return gradients_of(model, **call)


def gradients_of(model, ids=None, **call):
    """Of one training step, with the loss in float64."""
    model.train()
    model.zero_grad()
    ids = tokens() if ids is None else ids
    torch.manual_seed(3)  # of dropout
    logits = model(ids, **call, use_cache=False).logits.double()
    (-logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])).mean().backward()
    return gradients(model)


def worst_error(actual, expected):
    """|actual - expected| / |expected| of the worst parameter; below 1e-4 of the largest one's norm, per that.

    Some gradients are zero in theory, and only rounding is left of them: those of keys' biases.
    """
    assert actual.keys() == expected.keys()
    floor = 1e-4 * max(float(g.norm()) for g in expected.values())
    return max(float((actual[n] - expected[n]).norm()) / max(float(expected[n].norm()), floor) for n in expected)


# Parity with transformers


def check_dense_is_theirs(case: FamilyCase, **inputs):
    """Logits and all gradients."""
    theirs = case.theirs()
    ours = case.causal_class._from_config(case.config(factorization="dense"), attn_implementation="sdpa").eval()
    ours.load_state_dict(case.to_ours(theirs.state_dict()), strict=True)
    ids = tokens()
    outputs = [model(ids, labels=ids, use_cache=False, **inputs) for model in (ours, theirs)]
    assert_close(outputs[0].logits, outputs[1].logits, what="logits")
    for output in outputs:
        output.loss.backward()
    assert_all_close(gradients(ours), case.to_ours(gradients(theirs)))


# The recurrence, written out


def reference_route(mixture, x):
    """Weights [tokens, experts] of a mixture in float64, zero for those not chosen."""
    gate, weight = mixture.gate, mixture.gate.weight
    rows = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for row, token in zip(rows, x, strict=True):
        logits = weight @ token
        if not hasattr(gate, "e_score_correction_bias"):
            probabilities = logits.softmax(-1)
            chosen = probabilities.sort(descending=True).indices[: gate.top_k]
        else:
            probabilities = logits.sigmoid()
            scores = (probabilities + gate.e_score_correction_bias).view(gate.num_group, -1)
            groups = scores.sort(descending=True).values[:, :2].sum(-1).sort(descending=True).indices[: gate.topk_group]
            scores[[group for group in range(gate.num_group) if group not in groups.tolist()]] = -torch.inf
            chosen = scores.flatten().sort(descending=True).indices[: gate.top_k]
        row[chosen] = probabilities[chosen]
        if gate.norm_topk_prob:
            row /= row.sum()
        row *= getattr(gate, "routed_scaling_factor", 1.0)
    return rows


def routed(mixture, x):
    """The router's own weights [tokens, experts], after a look at them: it takes them in float32."""
    _, weights, chosen = mixture.gate(x)
    rows = torch.zeros(len(x), len(mixture.gate.weight), dtype=torch.float64)
    rows = rows.scatter(1, chosen, weights.double())
    assert torch.equal(rows > 0, reference_route(mixture, x) > 0)
    assert_close(rows, reference_route(mixture, x), torch.float32, "routing weights")
    return rows


def reference_mixture(mixture, x, config):
    """sum_k w_k E_k(x), token by token and expert by expert: x [tokens, D] -> [tokens, D]."""
    experts, outputs = mixture.experts, torch.zeros_like(x)
    bends = config.factorization == "cola" or config.increment_activation == "silu"

    def bent(u):
        return u * u.sigmoid() if bends else u

    for token, weights in enumerate(routed(mixture, x)):
        for e in weights.nonzero().flatten():
            row, w = x[token], weights[e]
            if isinstance(experts, LowRankExperts):
                r, width = experts.rank, experts.gate_up_B.shape[1] // 2
                gate = experts.gate_up_B[e, :width] @ bent(experts.gate_up_A[e, :r] @ row)
                up = experts.gate_up_B[e, width:] @ bent(experts.gate_up_A[e, r:] @ row)
                inner = gate * gate.sigmoid() * up
                outputs[token] += w * (experts.down_B[e] @ bent(experts.down_A[e] @ inner))
            else:
                width = experts.down_proj.shape[-1]
                gate, up = experts.gate_up_proj[e, :width] @ row, experts.gate_up_proj[e, width:] @ row
                outputs[token] += w * (experts.down_proj[e] @ (gate * gate.sigmoid() * up))
    return outputs


@torch.no_grad()
def check_recurrence(case: FamilyCase, **fields):
    """Every linear output of every block, from its input alone and the reference's own output below: 1e-10."""
    model = case.model(torch.float64, **fields)
    config, seen = model.config, {}

    def remember(key):
        return lambda module, inputs, output: seen.update({key: (inputs[0], output)})

    for index, block in enumerate(model.base_model.blocks):
        for name in block.places:
            block.linear(name).register_forward_hook(remember((index, name)))
    model(tokens(), use_cache=False)

    below, carried = {}, set()
    for index, block in enumerate(model.base_model.blocks):
        for name, place in block.places.items():
            linear, (x, output) = block.linear(name), seen[index, name]
            flat = x.reshape(-1, x.shape[-1])
            if isinstance(linear, CrossLayerMixture):
                output = output[0]
                y = reference_mixture(linear, flat, config)
            elif isinstance(linear, LowRankLinear):
                u = flat @ linear.A.weight.T
                bends = linear.activation == "silu"
                y = (u * u.sigmoid() if bends else u) @ linear.B.weight.T
                y += 0 if linear.B.bias is None else linear.B.bias
            else:
                y = flat @ linear.weight.T + (0 if linear.bias is None else linear.bias)
            if hasattr(linear, "beta"):
                beta = linear.beta.item()
                b = (1 if beta >= 0 else -1) * (abs(beta) + config.beta_epsilon)
                y = y + b * below[name]
                carried.add(name)
            if place.carries:
                below[name] = y
            assert_close(output.reshape(y.shape), y, torch.float64, f"layers.{index}.{name}")
    names = [name for block in model.base_model.blocks for name, place in block.places.items() if place.carries]
    assert carried == {name for name in names if names.count(name) > 1}


# Memory policies


def check_policies(case: FamilyCase, bound=1e-12, **fields):
    """Every policy's gradients in float64, with states kept at several distances."""
    model = case.model(torch.float64, **({"num_hidden_layers": 5} | fields))
    expected = step(model)
    policies = ("none", *REBUILDING) if model.config.factorization == "cross_layer" else ("none", *REBUILDING[:2])
    for policy in policies:
        for interval in (None,) if policy == "none" else (None, 2, 3):
            error = worst_error(step(model, policy, interval), expected)
            assert error <= bound, f"{policy}, interval {interval}: {error:.2g}"


def check_replay_is_none(case: FamilyCase):
    """Bit for bit in float32."""
    model = case.model()
    expected = step(model, "none")
    for interval in (None, 3):
        actual = step(model, "replay", interval)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def check_saved_bytes(case: FamilyCase):
    """By count, under `invert`: X A of every linear; of a mixture its output and the chosen experts' numbers.

    Between the ends: the first layer also holds the embeddings, the last one the live state.
    """
    model = case.causal_class._from_config(case.config(num_hidden_layers=5), attn_implementation="sdpa").train()
    model.set_recompute("invert")
    found = measure_saved_activations(model, tokens())
    config = model.config
    for index in range(1, 4):
        a_token = 0
        for name, place in config.places(index).items():
            rank = config.linear_rank(index, name)
            if place.mixture is not None:
                a_token += 4 * place.out_features + 8 * place.mixture.active
            elif rank is not None:
                a_token += 4 * rank
        expected = a_token * found.tokens
        if getattr(config, "resid_pdrop", 0):  # the generator's state ahead of attention and of what each stage adds
            expected += 3 * torch.get_rng_state().numel()
        assert found.layer_bytes[index] == expected, f"layer {index}"


# Checkpoints


def check_save_and_load(case: FamilyCase, folder, auto):
    """Through an Auto class, with equal logits and an equal configuration."""
    model = case.model(eos_token_id=None)
    model.save_pretrained(folder)
    again = auto.from_pretrained(folder).eval()
    assert type(again) is type(model)
    fields, fields_again = model.config.to_dict(), again.config.to_dict()
    differing = {name for name in fields | fields_again if fields.get(name) != fields_again.get(name)}
    assert differing <= {"auto_map", "_name_or_path", "dtype"}
    assert again.state_dict().keys() == model.state_dict().keys()
    assert_close(again(tokens()).logits, model(tokens()).logits)  # a grouped product depends on where weights lie
    check_bodies(case, folder, model)
    return again


def check_bodies(case: FamilyCase, folder, model):
    """A classifier, and the decoder alone, start from the weights of a language model, and the other way round."""
    body = case.cls("Model").from_pretrained(folder, output_loading_info=True)
    head, of_head = case.cls("ForSequenceClassification").from_pretrained(folder, output_loading_info=True)
    assert not body[1]["missing_keys"]
    assert of_head["missing_keys"] == {"score.weight"}
    assert head.base_model_prefix == model.base_model_prefix
    ours = model.base_model.state_dict()
    for other in (body[0], head.base_model):
        assert all(torch.equal(tensor, ours[name]) for name, tensor in other.state_dict().items())
    head.save_pretrained(folder / "head")
    _, of_body = case.cls("Model").from_pretrained(folder / "head", output_loading_info=True)
    assert not of_body["missing_keys"]


# Generation


def greedy(model, ids, new=8, **arguments):
    arguments = {"do_sample": False, "max_new_tokens": new, "attention_mask": torch.ones_like(ids), **arguments}
    return model.generate(ids, **arguments)


@torch.no_grad()
def check_caches(case: FamilyCase):
    """Greedy tokens by every cache as without one, from a prompt longer than a sliding window."""
    model = case.model(eos_token_id=None, tie_word_embeddings=False)  # tied, tiny models say the same token again
    ids = tokens(4, length=9)
    expected = ids
    for _ in range(8):  # the whole sequence anew for every token
        logits = model(expected, use_cache=False).logits
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert expected[:, 9:].unique().numel() > 3  # not one token over and over
    assert torch.equal(greedy(model, ids), expected)
    assert torch.equal(greedy(model, ids, cache_implementation="static"), expected)
    output = model(ids, use_cache=True)
    longer = torch.cat([ids, ids[:, :2]], 1)
    following = model(ids[:, :2], past_key_values=output.past_key_values).logits  # two tokens at once
    assert_close(following, model(longer, use_cache=False).logits[:, -2:])


@torch.no_grad()
def check_left_padding(case: FamilyCase, attention="sdpa"):
    model = case.model(eos_token_id=None, attention=attention)
    short, long = tokens(1, length=5, seed=1), tokens(1, length=9, seed=2)
    batch = torch.cat([torch.cat([torch.zeros_like(long)[:, :4], short], 1), long])
    mask = (batch != 0).long()
    for arguments in ({}, {"use_cache": False}):
        together = greedy(model, batch, attention_mask=mask, **arguments)
        assert torch.equal(together[:1, 4:], greedy(model, short))
        assert torch.equal(together[1:], greedy(model, long))


def check_packing(case: FamilyCase):
    """Documents in one row, told apart by positions that restart: logits as of each alone, in training too."""
    model = case.model()
    first, second = tokens(2, length=8, seed=1), tokens(2, length=9, seed=2)
    packed = torch.cat([first, second], 1)
    position_ids = torch.cat([torch.arange(8), torch.arange(9)]).expand(2, -1)
    apart = torch.cat([model(ids, use_cache=False).logits for ids in (first, second)], 1)
    assert_close(model(packed, position_ids=position_ids, use_cache=False).logits, apart)
    model = case.model(torch.float64)
    expected = step(model, ids=packed, position_ids=position_ids)
    assert worst_error(step(model, "invert", ids=packed, position_ids=position_ids), expected) <= 1e-12


# Heads and adapters


def check_classifier(case: FamilyCase):
    """The last token that is not padding decides; gradients under `invert` are those of plain autograd."""
    model = case.model(torch.float64, suffix="ForSequenceClassification", num_labels=3)
    ids = tokens()
    ids[0, 11:] = 0
    mask = (ids != 0).long()
    hidden = model.base_model(ids, attention_mask=mask).last_hidden_state
    last = torch.stack([hidden[0, 10], hidden[1, 16]])
    assert_close(model(ids, attention_mask=mask).logits, model.score(last))

    def classify(policy):
        model.set_recompute(policy or "none")
        model.zero_grad()
        torch.manual_seed(3)
        with plain_autograd() if policy is None else contextlib.nullcontext():
            model(ids, attention_mask=mask, labels=torch.tensor([2, 0])).loss.backward()
        return gradients(model)

    model.train()
    assert worst_error(classify("invert"), classify(None)) <= 1e-10


def check_adapter(case: FamilyCase, config):
    """A training step of an adapter on top, under every policy, and what it may change."""
    model = peft.get_peft_model(case.model(torch.float64), config)
    inner = model.get_base_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    expected = step(inner)
    assert expected.keys() == {name for name, p in inner.named_parameters() if p.requires_grad}
    for policy in ("none", *REBUILDING):
        error = worst_error(step(inner, policy), expected)
        assert error <= 1e-11, f"{policy}: {error:.2g}"
