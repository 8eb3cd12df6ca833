"""Operations of what really runs, by torch's own counter."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..private import attention_operations, fused_attention_on_cpu, grouped_product

aten = torch.ops.aten


class _NoModules:
    """Stands in for torch's module tracker: everything is counted as "Global"."""

    parents = frozenset({"Global"})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class OperationCounter(FlopCounterMode):
    """torch's `FlopCounterMode` without its breakdown by module; with `addmm_`, grouped products and attention on CPUs.

    The counter itself is a dispatch mode and sees everything. What fails in a backward that runs small backwards inside
    is the tracker beside it: it hangs a multi-gradient hook on the inputs of every module, and that hook asks the
    autograd engine about a leaf, which the engine refuses within `autograd.grad`.
    """

    def __init__(self) -> None:
        forward, backward = fused_attention_on_cpu()
        fused = {
            forward: _attention_forward,
            backward: _attention_backward,
            grouped_product(): _grouped_product,
        }
        super().__init__(display=False, custom_mapping=fused)
        self.flop_registry[aten.addmm_] = self.flop_registry[aten.addmm]  # not known in place
        self.mod_tracker = _NoModules()  # type: ignore[assignment]


def _attention_forward(query_shape, key_shape, value_shape, *_, **__) -> int:
    return attention_operations(query_shape, _heads(key_shape, query_shape), _heads(value_shape, query_shape))


def _attention_backward(gradient_shape, query_shape, key_shape, value_shape, *_, **__) -> int:
    """Twice the forward: without the scores that the kernel computes again, half a forward more."""
    del gradient_shape
    return 2 * _attention_forward(query_shape, key_shape, value_shape)


def _grouped_product(first_shape, second_shape, *_, **__) -> int:
    """Rows [S, in] with the matrix [E, in, out] of their group, or outer products by group, [in, S] with [S, out]."""
    rows_and_inner = (
        first_shape[-2] * first_shape[-1] * (first_shape[0] if len(first_shape) == len(second_shape) == 3 else 1)
    )
    return 2 * rows_and_inner * second_shape[-1]


def _heads(shape, query_shape):
    return (shape[0], query_shape[1], *shape[2:])  # grouped queries read each key several times


__all__ = ["OperationCounter"]
