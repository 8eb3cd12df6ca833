"""How far two computations of the same number may lie apart, per dtype, and why.

Errors are measured against the largest entry of the reference tensor: the rounding error of a sum scales with
its largest terms, not with the entry in which they happen to cancel.
"""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    rtol: float  # times the largest entry of the reference
    atol: float  # for references that are zero


TOLERANCES = {
    # 2^-53 = 1e-16 per operation, some thousand operations deep, through norms that may amplify.
    torch.float64: Tolerance(1e-10, 1e-10),
    # 2^-24 = 6e-8 per operation; sums of 48 to 130 products in another order, three layers deep.
    torch.float32: Tolerance(1e-5, 1e-6),
    # 2^-9 = 2e-3 per operation, dozens in a row: transformers' Llama is 4e-2 away from its float32 self.
    torch.bfloat16: Tolerance(5e-2, 1e-3),
    # 2^-12 = 2e-4 per operation: an eighth of the above.
    torch.float16: Tolerance(6e-3, 1e-3),
}


def error_in_tolerances(actual, expected, dtype=None) -> float:
    """Largest |actual - expected| in units of the tolerance of `dtype` (default: the reference's own)."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    rtol, atol = TOLERANCES[dtype or expected.dtype]
    actual, expected = actual.detach().double(), expected.detach().double()
    if not actual.isfinite().all():
        return float("inf")
    return float((actual - expected).abs().max() / (rtol * expected.abs().max() + atol))


def assert_close(actual, expected, dtype=None, what=""):
    error = error_in_tolerances(actual, expected, dtype)
    assert error <= 1, f"{what} {error:.3g} tolerances apart"


def assert_far(actual, expected, dtype=None, what=""):
    """The counterpart of `assert_close`: shows that a check can fail, and by a margin."""
    error = error_in_tolerances(actual, expected, dtype)
    assert error > 10, f"{what} only {error:.3g} tolerances apart: the check could not fail"


def assert_all_close(actual: dict, expected: dict, dtype=None):
    """Named tensors, for example gradients; the same names on both sides."""
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        assert_close(actual[name], reference, dtype, name)
