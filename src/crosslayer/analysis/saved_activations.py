"""Bytes of activations that a forward leaves behind for its backward, by layer.

Counted, not estimated: what autograd saves is seen by its own hooks, what a memory policy keeps is asked of its tape.
A storage counts once, whole, at the lowest layer that holds it; parameters do not count.
"""

import weakref
from dataclasses import dataclass, field

import torch
from torch import nn

from .positions import block_list

ELSEWHERE = -1  # embeddings, final norm, head, loss


@dataclass
class SavedActivations:
    """What `measure_saved_activations` found."""

    tokens: int
    layer_bytes: list[int] = field(default_factory=list)
    elsewhere_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Of all layers, and elsewhere."""
        return sum(self.layer_bytes) + self.elsewhere_bytes

    def growth_per_layer(self, deeper: "SavedActivations") -> float:
        """Bytes per token that each further layer of the same shape adds: the slope between two depths."""
        assert self.tokens == deeper.tokens
        layers = len(deeper.layer_bytes) - len(self.layer_bytes)
        return (deeper.total_bytes - self.total_bytes) / (layers * self.tokens)


class _Saved:
    """Stands in the graph for a saved tensor: it is alive exactly as long as the tensor is kept."""

    def __init__(self, tensor: torch.Tensor, layer: int) -> None:
        self.tensor = tensor
        self.layer = layer


def measure_saved_activations(model: nn.Module, input_ids: torch.Tensor, **arguments) -> SavedActivations:
    """One forward with a loss, in the model's current mode, policy and autocast; the backward is not run.

    Args:
        model: a causal language model with its blocks in a list `layers` or `h`; call `.train()` on it, since policies
            are for training only.
        input_ids: [B, T], labels as well.
        arguments: further arguments of the model. `use_cache` is off.
    """
    layers = block_list(model)
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()
    running = [ELSEWHERE]

    def pack(tensor):
        saved = _Saved(tensor.detach(), running[-1])  # an output would hold the graph that holds it
        alive.add(saved)
        return saved

    def enter(index):
        return lambda *_: running.append(index)

    def leave(*_):
        running.pop()

    hooks = [layer.register_forward_pre_hook(enter(index)) for index, layer in enumerate(layers)]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            loss = model(input_ids, labels=input_ids, use_cache=False, **arguments).loss
    finally:
        for hook in hooks:
            hook.remove()

    found = [(saved.layer, saved.tensor) for saved in alive]
    found += [(layer, tensor) for tape in _tapes_of(loss) for layer, kept in tape.tensors().items() for tensor in kept]
    return _count(found, model, len(layers), input_ids.numel())


def _count(found: list, model: nn.Module, layers: int, tokens: int) -> SavedActivations:
    weights = {storage_of(tensor).data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen: set[int] = set(weights)
    result = SavedActivations(tokens, [0] * layers)
    for layer, tensor in sorted(found, key=lambda pair: pair[0] % (layers + 1)):  # elsewhere comes last
        storage = storage_of(tensor)
        if storage.data_ptr() in seen:
            continue
        seen.add(storage.data_ptr())
        if layer == ELSEWHERE:
            result.elsewhere_bytes += storage.nbytes()
        else:
            result.layer_bytes[layer] += storage.nbytes()
    return result


@torch.no_grad()
def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    """Where a tensor lies; of one that is spread over processes, the part of this one."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage()


def _tapes_of(output: torch.Tensor) -> list:
    """The tapes in the graph below an output: each of a policy's layers knows its own."""
    tapes: dict[int, object] = {}
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "tape"):
            tapes[id(node.tape)] = node.tape
        waiting.extend(function for function, _ in node.next_functions)
    return list(tapes.values())


__all__ = ["SavedActivations", "measure_saved_activations"]
