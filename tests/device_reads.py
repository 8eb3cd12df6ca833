"""Counts what waits for a device: on a CPU these operations cost nothing, on an accelerator each empties its queue."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}


class Reads(TorchDispatchMode):
    """Operations that wait for their device; `tolist` and `numpy` copy from it, and are counted where they start."""

    def __init__(self, patch):
        super().__init__()
        self.found = Counter()
        for name in ("tolist", "numpy"):
            patch.setattr(torch.Tensor, name, self._counting(getattr(torch.Tensor, name)))

    def _counting(self, method):
        def counted(tensor, *args, **kwargs):
            self.found[method.__name__] += 1
            return method(tensor, *args, **kwargs)

        return counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def reads_of(model, ids, steps=2):
    """(reads of a forward, reads of a backward), of the last of some steps: a drift is there to be read by then."""
    for _ in range(steps):
        with pytest.MonkeyPatch.context() as inner, Reads(inner) as forward:
            loss = model(ids, labels=ids, use_cache=False).loss
        with pytest.MonkeyPatch.context() as inner, Reads(inner) as backward:
            loss.backward()
    return forward.found, backward.found
