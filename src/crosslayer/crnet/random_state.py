"""Random numbers as they were: what dropped something in the forward drops the same when it is run again."""

from contextlib import contextmanager

import torch


def get_random_state(tensor: torch.Tensor) -> list[torch.Tensor]:
    """State of the generators that an operation on this tensor may draw from."""
    states = [torch.get_rng_state()]
    if tensor.device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(tensor.device).get_rng_state(tensor.device))
    return states


def set_random_state(states: list[torch.Tensor], tensor: torch.Tensor) -> None:
    """Puts back what `get_random_state` gave for this tensor, or for one on the same device."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(tensor.device).set_rng_state(state, tensor.device)


@contextmanager
def restored_random_state(states: list[torch.Tensor] | None, tensor: torch.Tensor):
    """Random numbers as they were, for the time of the block; afterwards as if nothing had been drawn."""
    if states is None:
        yield
        return
    now = get_random_state(tensor)
    set_random_state(states, tensor)
    try:
        yield
    finally:
        set_random_state(now, tensor)
