"""Every family beside transformers' own, and under everything that Llama's CR-Net is held to."""

import pytest

from crosslayer.crnet.block_gradient import BlockRun, Kept, Step
from crosslayer.crnet.configuration_cross_layer import CrossLayerFields
from crosslayer.crnet.functions import Attention, HeadNormAttention
from crosslayer.crnet.mixture import CrossLayerMixture
from family_cases import FAMILY_CASES
from family_checks import (
    check_dense_is_theirs,
    check_policies,
    check_recurrence,
    check_replay_is_none,
    check_saved_bytes,
)

every_family = pytest.mark.parametrize("case", FAMILY_CASES.values(), ids=FAMILY_CASES)


@every_family
def test_dense_is_transformers(case):
    check_dense_is_theirs(case)


@every_family
@pytest.mark.parametrize("factorization", ["cross_layer", "cola", "dense"])
def test_recurrence(case, factorization):
    check_recurrence(case, factorization=factorization)


@every_family
def test_recurrence_with_an_activation(case):
    check_recurrence(case, increment_activation="silu")


@every_family
@pytest.mark.parametrize("factorization", ["cross_layer", "cola"])
def test_policies(case, factorization):
    check_policies(case, factorization=factorization)


@every_family
def test_replay_is_none(case):
    check_replay_is_none(case)


@every_family
def test_saved_bytes(case):
    check_saved_bytes(case)


# Shown able to fail


def other_scaling(patch):
    patch.setattr(Attention, "scaling", property(lambda attention: 0.3, lambda attention, value: None), raising=False)


def no_window(patch):
    patch.setattr(CrossLayerFields, "layer_kind", lambda config, layer_idx: "full_attention")


def no_norm_of_heads(patch):
    patch.setattr(HeadNormAttention, "normalise", Attention.normalise)


def more_of_the_mixture(patch):
    increment = CrossLayerMixture.increment
    patch.setattr(
        CrossLayerMixture,
        "increment",
        lambda mixture, x, choice=None: (lambda y, logits: (y * 1.0001, logits))(*increment(mixture, x, choice)),
    )


def forget_b(patch):
    total_gradient = Step.total_gradient

    def without_b(step, *given):
        step.above = {name: (G, 1.0) for name, (G, _) in step.above.items()}
        return total_gradient(step, *given)

    patch.setattr(Step, "total_gradient", without_b)


def keep_twice(patch):
    tensors = Kept.tensors
    patch.setattr(Kept, "tensors", lambda kept: [*tensors(kept), *(t.clone() for t in kept.first.values())])


def write_over_kept_states(patch):
    """What the block below only handed on may belong to a state that is kept."""
    forward = BlockRun.forward
    patch.setattr(BlockRun, "forward", lambda run, h, Y, in_place: forward(run, h, Y, tuple(Y) if in_place else ()))


@pytest.mark.parametrize(
    ("check", "name", "damage"),
    [
        (check_dense_is_theirs, "mistral", other_scaling),
        (check_dense_is_theirs, "gemma3", no_window),
        (check_dense_is_theirs, "qwen3", no_norm_of_heads),
        (check_dense_is_theirs, "deepseek_v3", more_of_the_mixture),
        (check_recurrence, "qwen3_moe_interleaved", more_of_the_mixture),
        (check_policies, "cohere", forget_b),
        (check_policies, "qwen3_moe_interleaved", write_over_kept_states),
        (check_replay_is_none, "qwen3_moe_interleaved", write_over_kept_states),
        (check_saved_bytes, "gpt2", keep_twice),
    ],
)
def test_checks_can_fail(check, name, damage, monkeypatch):
    damage(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check(FAMILY_CASES[name])
