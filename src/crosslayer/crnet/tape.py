"""The live state of one forward and its backward under a memory policy (policies.py), and all that was kept for it.

Every block is an autograd Function of its own, so that gradients become ready layer by layer; only h travels through
autograd, Y and its gradient through the tape.

    forward    live state S_0 ─► S_1 ─► ... ─► S_L      a state that must last is kept before it is overwritten
    backward   live state S_L ─► ... ─► S_1 ─► S_0      kept, replayed from a kept one below, or inverted

Rounding errors grow by 1/|b| with each inversion (arXiv 2509.18993, section on recomputation): `invert` and
`reversible` keep a state before the estimate passes `recompute_error_bound`, and measure the drift wherever they come
down upon a kept one. Training only: evaluation and generation never pass here.
"""

from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils import logging

from .block_gradient import BlockRun, Kept, State, Step, parameters_of, relative_difference
from .cross_layer_linear import GIVES_INCREMENT, b_of, is_watched
from .drift import DriftMeter, ErrorEstimate
from .local_graph import Call, Gradients
from .policies import POLICIES

logger = logging.get_logger(__name__)


class Tape:
    """The live state of one forward and its backward, and all that was kept for it.

    Args:
        policy: a name of `POLICIES`.
        interval: `recompute_interval` of the configuration.
        error_bound: `recompute_error_bound` of the configuration.
        layers: the decoder blocks, bottom first.
        arguments: keyword arguments of each of them.
        b: of every position of each of them, by name (`read_b`).
        call: what the blocks have in common.
        meter: where the drift goes.
    """

    def __init__(
        self,
        policy: str,
        interval: int | None,
        error_bound: float,
        layers: list[Any],
        arguments: list[dict],
        b: list[dict[str, float]],
        call: Call,
        meter: DriftMeter | None = None,
    ) -> None:
        self.policy = POLICIES[policy]
        self.interval = self.policy.interval(interval, len(layers))
        self.error_bound = error_bound
        self.layers = layers
        self.arguments = arguments
        self.b = b
        self.call = call
        self.meter = meter or DriftMeter()
        self.has_below: list[set[str]] = []
        self.can_invert: list[bool] = []
        self.can_replay: list[bool] = []
        self.live: State | None = None
        self.live_index = -1  # S_index is the state after layer `index`
        self.states: dict[int, State] = {}  # the states kept
        self.inputs: dict[int, torch.Tensor] = {}  # a layer's h where it is not the h of the layer before
        self.kept: dict[int, Kept] = {}
        # (graph task, index, (G, b) of each position) of the layer above
        self.gradient_above: tuple[int, int, dict] | None = None
        self.estimate: ErrorEstimate | None = None

    # Forward

    def run(self, layer: nn.Module, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The layer, within its own forward: [B, T, D] -> [B, T, D], and what its positions return beside Y."""
        parameters = parameters_of(layer)
        return _LayerFunction.apply(self, len(self.has_below), h, tuple(parameters), *parameters.values())

    def forward(self, index: int, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One layer, the next one upwards: h [B, T, D] -> (h after it [B, T, D], what positions return beside Y).

        Called by `run`'s Function, so without autograd. Raises RuntimeError where somebody wrote over the live hidden
        states.
        """
        self.has_below.append(set(self.live.Y) if self.live is not None else set())
        run = self._run_of(index)
        self.can_invert.append(run.can_invert)
        self.can_replay.append(run.can_replay)
        h = self._enter(index, h)
        below = self.live.Y if self.live is not None else {}
        # What the block below only handed on may belong to a state further down, which may be kept.
        in_place = () if index == 0 or index - 1 in self.states else tuple(self.layers[index - 1].places)
        state, kept, beside = run.forward(h, below, in_place)
        if index == len(self.layers) - 1:
            self.call.scratch.clear()  # what comes next, the logits, is where memory peaks
        # Autograd's output and ours are two tensors over one storage: one that knew its own graph would keep it alive.
        h, state = state.h, State(state.h.detach(), state.Y)
        if self.policy.name == "none":
            self.states[index] = state
        self.kept[index] = kept
        self.live, self.live_index = state, index
        return h, *beside

    def _run_of(self, index: int) -> BlockRun:
        """The layer with the weights that it has now. b counts only for what some layer below has, too."""
        has_below = self.has_below[index]
        b = {name: value for name, value in self.b[index].items() if name in has_below}
        return BlockRun(self.layers[index], self.call, self.arguments[index], b, has_below, self.policy)

    def _enter(self, index: int, h: torch.Tensor) -> torch.Tensor:
        """Decides about the state before the layer, S_{index - 1}; returns the h that the layer reads."""
        if index == 0:
            self.inputs[0] = h = h.detach().to(torch.promote_types(h.dtype, torch.float32))
            self.estimate = ErrorEstimate(self.error_bound, h.dtype)
            return h
        assert self.live is not None
        if not self.live.is_intact() and self.policy.name != "none":
            raise RuntimeError(
                f"The hidden states between layers {index - 1} and {index} were modified in place; return new ones, or "
                "use recompute='none'."
            )
        # A hook stepped in between: from here on its h counts.
        if not (self._gave(index - 1, h) or _same_values(h, self.live.h)):
            self.inputs[index] = h = h.detach().to(self.live.h.dtype)
            self.states[index - 1] = self.live
        if self._has_to_be_kept(index):
            self.states[index - 1] = self.live
        return self.inputs.get(index, self.live.h)

    def _gave(self, index: int, h: torch.Tensor) -> bool:
        """Whether autograd knows h as what the layer gave, rounded: FSDP2's mixed precision does that, and to compare
        values would wait for the device in every layer."""
        node: Any = h.grad_fn if h.dtype != self.live.h.dtype else None  # type: ignore[union-attr]
        while node is not None and node.name() in _HANDS_ON:
            node = next((below for below, _ in node.next_functions if below is not None), None)
        return getattr(node, "tape", None) is self and node.index == index

    def _has_to_be_kept(self, index: int) -> bool:
        """Whether S_{index - 1} must outlive layer `index`."""
        below, b, estimate = index - 1, self.b[index], self.estimate
        assert estimate is not None
        if not self.can_invert[index]:
            estimate.restart()
            return True
        if not self.policy.inverts:
            assert self.interval is not None
            return below % self.interval == 0 or not self.can_replay[below]
        if self.interval is not None and below > 0 and below % self.interval == 0:
            estimate.restart()
            return True
        if not estimate.add(b):
            return False
        self._tell_about_small_b(index, b)
        return True

    def _tell_about_small_b(self, index: int, b: dict[str, float]) -> None:
        assert self.estimate is not None
        if not b:
            return
        position = min(b, key=lambda name: abs(b[name]))
        known = (index, position) in self.meter.small_b
        if known or 1 / abs(b[position]) <= self.estimate.allowed:
            return
        self.meter.small_b.add((index, position))
        logger.warning(
            f"b={b[position]:.3g} of layers.{index}.{position} is too small to divide by: recompute="
            f"{self.policy.name!r} keeps the state below this layer instead of rebuilding it (recompute_error_bound="
            f"{self.error_bound}). Gradients stay right; memory grows by that state."
        )

    # Backward

    def backward(self, index: int, d_h: torch.Tensor, d_beside: list, wanted: set[str], passes_on: bool):
        """d h_l, and d of what the layer returned beside it -> (d h_{l-1}, gradients of wanted parameters by name)."""
        task = torch._C._current_graph_task_id()
        keep_graph = self.policy.name == "none" and torch._C._autograd._get_current_graph_task_keep_graph()
        self._bring_to_life(index)
        run, step = self._step(index, d_h.to(self.live.h.dtype))  # type: ignore[union-attr]
        above, self.gradient_above = self.gradient_above, None
        if above is not None and above[:2] == (task, index):
            step.above = above[2]
        step.gradients, step.d_beside = Gradients(wanted, keep_graph=keep_graph), d_beside
        d_below = run.backward(step, self.kept[index])
        if index > 0 and passes_on:
            self.gradient_above = (task, index - 1, step.below)
        self._descend(index, step, keep_graph)
        return d_below, step.gradients.found

    def _bring_to_life(self, index: int) -> None:
        """Makes S_index the live state, should the gradient not start at the top."""
        if self.policy.name == "none" and index in self.states:
            self.live, self.live_index = self.states[index], index
        while self.live_index > index:
            at = self.live_index
            assert self.live is not None
            with self._gathered(at):
                run, step = self._step(at, torch.zeros_like(self.live.h))
                if at > 0 and self.policy.inverts:
                    run.backward(step, self.kept[at])  # of nothing: only the state below counts
            self._descend(at, step, keep_graph=False)
        if self.live is None or self.live_index != index or index not in self.kept:
            raise RuntimeError(
                f"Backward through layer {index} a second time: recompute={self.policy.name!r} has freed or moved on "
                "from its state. Run the forward again for every backward (retain_graph=True works with "
                "recompute='none')."
            )

    def _step(self, index: int, d_h: torch.Tensor) -> tuple[BlockRun, Step]:
        """What the backward of a layer starts from; decides how the state below comes about."""
        live, kept, run = self.live, self.kept[index], self._run_of(index)
        assert live is not None
        below = self._state_below(index)
        for state in (live if self.policy.inverts else None, below):
            if state is not None and not state.is_intact():
                raise RuntimeError(f"Hidden states near layer {index} were modified in place; its backward needs them.")
        Y = run.complete(dict(live.Y), kept)
        h_below = self.inputs.get(index, below.h if below is not None else None)
        if h_below is None or (self.policy.inverts and (index == 0 or index not in self.inputs)):
            buffer = self.call.scratch.get(("tape", f"h below {index % 2}"), live.h.shape, live.h)
            rebuilt = run.hidden_states_below(live.h, Y, kept, buffer)
            if h_below is None:
                h_below = rebuilt
            else:
                self.meter.record(relative_difference(rebuilt, h_below))
        return run, Step(h_below, Y, d_h, kept_below=below, inverts=self.policy.inverts)

    def _state_below(self, index: int) -> State | None:
        """S_{index - 1} where it is kept, or replayed from a kept one; None where it has to be inverted."""
        if index == 0:
            return None
        if index - 1 not in self.states and not self.policy.inverts:
            self._replay(index - 1)
        return self.states.get(index - 1)

    def _replay(self, top: int) -> None:
        """Y_l = b Y_{l-1} + T B upwards, from the kept state next below up to S_top."""
        bottom = max(at for at in self.states if at < top)
        for at in range(bottom + 1, top + 1):
            with self._gathered(at):
                below = self.states[at - 1]
                below = State(self.inputs.get(at, below.h), below.Y)
                self.states[at] = self._run_of(at).replay(below, self.kept[at], f"replayed {at - bottom}")

    @contextmanager
    def _gathered(self, index: int):
        """FSDP2 holds the whole weights of one layer at a time, the one whose backward runs."""
        layer = self.layers[index]
        if hasattr(layer, "unshard"):
            layer.unshard()
        yield
        if hasattr(layer, "reshard"):
            layer.reshard()

    def _descend(self, index: int, step: Step, keep_graph: bool) -> None:
        """S_{index - 1} becomes the live state, and what belongs to layer `index` is freed."""
        for drift in step.drifts:
            self.meter.record(drift)
        self.live = None if index == 0 else step.kept_below or State(step.h_below, step.Y_below)
        self.live_index = index - 1
        if not keep_graph:
            self.states.pop(index, None)
            if self.policy.name != "none":
                self.states.pop(index - 1, None)
            self.inputs.pop(index, None)
            self.kept.pop(index, None)

    # Counting

    def tensors(self) -> dict[int, list[torch.Tensor]]:
        """Everything the tape holds, by layer; the live state counts as its layer's."""
        held: dict[int, list[torch.Tensor]] = {index: kept.tensors() for index, kept in self.kept.items()}
        for index, state in self.states.items():
            held.setdefault(index, []).extend(state.tensors())
        for index, h in self.inputs.items():
            held.setdefault(index, []).append(h)
        if self.live is not None:
            held.setdefault(self.live_index, []).extend(self.live.tensors())
        return held


class _LayerFunction(torch.autograd.Function):
    """One layer for autograd: h_{l-1} and its parameters -> h_l, and what lies beside. The rest is the tape's."""

    @staticmethod
    def forward(ctx, tape: Tape, index: int, h: torch.Tensor, names: tuple[str, ...], *parameters: torch.Tensor):
        ctx.tape, ctx.index, ctx.names = tape, index, names
        ctx.save_for_backward(*parameters)
        return tape.forward(index, h)

    @staticmethod
    def backward(ctx, d_h, *d_beside):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Second derivatives (create_graph=True) do not pass a hand-written backward. Take them in evaluation "
                "mode, model.eval(), where CR-Net runs on plain autograd."
            )
        _ = ctx.saved_tensors  # complains about parameters that were changed since the forward
        _, _, needs_h, _, *needs = ctx.needs_input_grad
        wanted = {name for name, needed in zip(ctx.names, needs, strict=True) if needed}
        d_below, gradients = ctx.tape.backward(ctx.index, d_h, list(d_beside), wanted, needs_h)
        return None, None, d_below if needs_h else None, None, *(gradients.get(name) for name in ctx.names)


_HANDS_ON = ("ToCopyBackward0", "RegisterPostBackwardFunctionBackward")
"""Autograd's names of a change of dtype, and of FSDP2's hook on what goes into a layer."""


def read_b(
    layers: list[Any], device: torch.device, drift: torch.Tensor | None = None
) -> tuple[list[dict[str, float]], float | None]:
    """(b of every position by layer, the drift) as numbers: one read for all, since on an accelerator each one waits.

    Where weights are sharded (FSDP2) a process has beta of some positions: one collective brings the others, and the
    largest drift of all processes, which have to gather the same layers.
    """
    linears = [cross_layer_linears(layer) for layer in layers]
    every = [linear for of_layer in linears for linear in of_layer.values()]
    is_sharded = dist.is_available() and dist.is_initialized() and hasattr(layers[0], "unshard")
    if not (every or is_sharded or drift is not None):
        return [{} for _ in layers], None
    with torch.no_grad():
        found = []
        for linear in every:
            beta = linear.beta.to_local() if hasattr(linear.beta, "to_local") else linear.beta
            found.append(beta if beta.numel() else beta.new_full((1,), -torch.inf))
        dtype = max((beta.dtype for beta in found), key=lambda dtype: dtype.itemsize, default=torch.float32)
        found.insert(0, torch.full((1,), -1.0, device=device) if drift is None else drift.view(1))
        values = torch.cat([value.to(device, dtype) for value in found])
        if is_sharded:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        epsilon = values.new_tensor([linear.beta_epsilon for linear in every])
        largest, *numbers = torch.cat((values[:1], b_of(values[1:], epsilon))).tolist()
    b = iter(numbers)
    return [{name: next(b) for name in of_layer} for of_layer in linears], None if largest < 0 else largest


def cross_layer_linears(layer: Any) -> dict[str, Any]:
    """The linears of a block that give b and increment apart; not those that somebody watches as a whole."""
    linears = {name: layer.linear(name) for name, place in layer.places.items() if place.carries}
    return {
        name: linear
        for name, linear in linears.items()
        if type(linear) in GIVES_INCREMENT and hasattr(linear, "beta") and not is_watched(linear)
    }


def _same_values(h: torch.Tensor, ours: torch.Tensor) -> bool:
    """Whether h is the h that we handed out, as it was or rounded to another dtype. Waits for the device, unless h lies
    where ours does."""
    same_place = h.dtype == ours.dtype and h.data_ptr() == ours.data_ptr()
    return h.shape == ours.shape and (same_place or torch.equal(h, ours.to(h.dtype)))
