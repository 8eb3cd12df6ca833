"""Every family beside transformers' own, and under everything that Llama's CR-Net is held to."""

import pytest

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
