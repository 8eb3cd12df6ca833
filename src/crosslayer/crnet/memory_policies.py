"""What CR-Net keeps of its activations while training, and how it gets back the rest.

    policy       keeps, for its backward                                rebuilds
    none         every state, X A, and what the attention saved         nothing
    replay       X A, and the state every N layers                      states upwards: equal to `none` bit for bit
    invert       X A, and states where the inversion would lose digits  states downwards, by inversion
    reversible   the state every N layers                               everything, by inversion

The state is what one layer hands to the next, h and seven Y. A `Tape` owns the live one. Every layer is an autograd
Function of its own, so that gradients become ready layer by layer; only h travels through autograd, Y and its gradient
through the tape.

    forward    live state S_0 ─► S_1 ─► ... ─► S_L      a state that must last is kept before it is overwritten
    backward   live state S_L ─► ... ─► S_1 ─► S_0      kept, replayed from a kept one below, or inverted

Rounding errors grow by 1/|b| with each inversion (arXiv 2509.18993, section on recomputation): `invert` and
`reversible` keep a state before the estimate passes `recompute_error_bound`, and measure the drift wherever they come
down upon a kept one. Training only: evaluation and generation never pass here.

A flat file that imports only torch, transformers and its neighbours, so that a saved checkpoint can carry it.
"""

from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .configuration_crnet import POSITIONS
from .cross_layer_linear import CrossLayerLinear, b_of
from .hand_written_layer import (
    BackwardStep,
    Call,
    HandWrittenLayer,
    Kept,
    State,
    can_be_hand_written,
    linears_of,
    parameters_of,
    relative_difference,
)
from .policies import POLICIES

logger = logging.get_logger(__name__)

class ErrorEstimate:
    """How far states rebuilt from above would be off, known on the way up.

    Rebuilding S_m from S_n divides by b_n, ..., b_{m+1}; with one rounding error of size eps at each step,

        error_m = eps sum_{j = m+1..n} prod_{i = m+1..j} 1 / |b_i|       the largest over the seven positions.
    """

    def __init__(self, bound: float, dtype: torch.dtype) -> None:
        self.allowed = bound / (torch.finfo(dtype).eps / 2)
        self.restart()

    def restart(self) -> None:
        """The state before the next layer is kept: nothing below it is rebuilt from above it."""
        self.states: list[list[list[float]]] = []  # for each state that would be rebuilt: [product, sum] by position

    def add(self, b: list[float]) -> bool:
        """One more layer. True: the state below it has to be kept."""
        self.states.append([[1.0, 0.0] for _ in b])
        for state in self.states:
            for errors, b_of_position in zip(state, b, strict=True):
                errors[0] /= abs(b_of_position)
                errors[1] += errors[0]
        if all(total <= self.allowed for state in self.states for _, total in state):
            return False
        self.restart()
        return True


class DriftMeter:
    """The largest drift seen in the latest backward, and what was said about b; outlives the tapes that write to it."""

    def __init__(self) -> None:
        self.latest: torch.Tensor | None = None
        self.small_b: set[tuple[int, str]] = set()

    def restart(self) -> None:
        self.latest = None

    def record(self, drift: torch.Tensor) -> None:
        self.latest = drift if self.latest is None else torch.maximum(self.latest, drift)

    def value(self) -> float | None:
        return None if self.latest is None else float(self.latest)


class Tape:
    """The live state of one forward and its backward, and all that was kept for it.

    Args:
        policy: a name of `POLICIES`.
        interval: `recompute_interval` of the configuration.
        error_bound: `recompute_error_bound` of the configuration.
        layers: the decoder layers, bottom first.
        call: what they have in common.
        meter: where the drift goes.
    """

    def __init__(
        self,
        policy: str,
        interval: int | None,
        error_bound: float,
        layers: list[Any],
        call: Call,
        meter: DriftMeter | None = None,
    ) -> None:
        self.policy = POLICIES[policy]
        self.interval = self.policy.interval(interval, len(layers))
        self.error_bound = error_bound
        self.layers = layers
        self.call = call
        self.meter = meter or DriftMeter()
        self.hand_written: list[bool] = []
        self.b: list[dict[str, float] | None] = []
        self.live: State | None = None
        self.live_index = -1  # S_index is the state after layer `index`
        self.states: dict[int, State] = {}  # the states kept
        self.inputs: dict[int, torch.Tensor] = {}  # a layer's h where it is not the h of the layer before
        self.kept: dict[int, Kept] = {}
        self.gradient_above: tuple[int, int, dict, dict] | None = None  # (graph task, index, G, b)
        self.estimate: ErrorEstimate | None = None

    # Forward

    def run(self, layer: nn.Module, h: torch.Tensor) -> torch.Tensor:
        """The layer, within its own forward: [B, T, D] -> [B, T, D]."""
        parameters = parameters_of(layer)
        return _LayerFunction.apply(self, len(self.hand_written), h, tuple(parameters), *parameters.values())

    def forward(self, index: int, h: torch.Tensor) -> torch.Tensor:
        layer = self.layers[index]
        self.hand_written.append(can_be_hand_written(layer))
        self.b.append(read_b(layer) if index > 0 else None)
        h = self._enter(index, h.detach())
        forward = self._forward_by_hand if self.hand_written[index] else self._forward_by_autograd
        state = forward(index, h)
        # Autograd's output and ours are two tensors over one storage: one that knew its own graph would keep it alive.
        h, state = state.h, State(state.h.detach(), state.Y)
        if self.policy.name == "none":
            self.states[index] = state
        self.live, self.live_index = state, index
        return h

    def _enter(self, index: int, h: torch.Tensor) -> torch.Tensor:
        """Decides about the state before the layer, S_{index - 1}; returns the h that the layer reads."""
        if index == 0:
            self.inputs[0] = h = h.to(torch.promote_types(h.dtype, torch.float32))
            self.estimate = ErrorEstimate(self.error_bound, h.dtype)
            return h
        assert self.live is not None
        if not self.live.is_intact() and self.policy.name != "none":
            raise RuntimeError(
                f"The hidden states between layers {index - 1} and {index} were modified in place; return new ones, or "
                "use recompute='none'."
            )
        if not _same_values(h, self.live.h):  # a hook stepped in between: from here on its h counts
            self.inputs[index] = h = h.to(self.live.h.dtype)
            self._keep(index - 1)
        if self._has_to_be_kept(index):
            self._keep(index - 1)
        return self.inputs.get(index, self.live.h)

    def _keep(self, index: int) -> None:
        assert self.live is not None
        self.states[index] = self.live

    def _has_to_be_kept(self, index: int) -> bool:
        """Whether S_{index - 1} must outlive layer `index`."""
        below, b, estimate = index - 1, self.b[index], self.estimate
        assert b is not None
        assert estimate is not None
        if not self.hand_written[index]:  # nothing inverts or replays a layer that autograd runs
            estimate.restart()
            return True
        if not self.policy.inverts:
            assert self.interval is not None
            return below % self.interval == 0 or not self.hand_written[below]
        if self.interval is not None and below > 0 and below % self.interval == 0:
            estimate.restart()
            return True
        if not estimate.add(list(b.values())):
            return False
        self._tell_about_small_b(index, b)
        return True

    def _tell_about_small_b(self, index: int, b: dict[str, float]) -> None:
        assert self.estimate is not None
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

    def _forward_by_hand(self, index: int, h: torch.Tensor) -> State:
        layer = HandWrittenLayer(self.layers[index], self.call, self.b[index])
        random_state = get_random_state(h) if self._draws_random_numbers(index) else None
        previous = self.live.Y if self.live is not None else None
        in_place = (index - 1) not in self.states
        state, attention = layer.forward(h, previous, in_place, waits=self.policy.keeps_attention)
        if index == len(self.layers) - 1:
            self.call.scratch.clear()  # what comes next, the logits, is where memory peaks
        self.kept[index] = Kept(
            layer.U if self.policy.keeps_low_rank else None,
            attention,
            random_state if not self.policy.keeps_attention else None,
        )
        return state

    def _draws_random_numbers(self, index: int) -> bool:
        attention = self.layers[index].self_attn
        return attention.training and attention.attention_dropout > 0

    def _forward_by_autograd(self, index: int, h: torch.Tensor) -> State:
        previous = list(self.live.Y.values()) if self.live is not None else []
        self.kept[index] = Kept(random_state=get_random_state(h))
        h, *Y = self.layers[index].forward(h, *previous, **self.call.arguments)
        return State(h, dict(zip(POSITIONS, Y, strict=True)))

    # Backward

    def backward(self, index: int, d_h: torch.Tensor, wanted: set[str], passes_on: bool):
        """d h_l -> (d h_{l-1}, gradients of the wanted parameters by name)."""
        task = torch._C._current_graph_task_id()
        keep_graph = self.policy.name == "none" and torch._C._autograd._get_current_graph_task_keep_graph()
        self._bring_to_life(index)
        G, b_above = self._take_gradient(task, index)
        step = self._step(index, d_h.to(self.live.h.dtype))  # type: ignore[union-attr]
        step.wanted, step.keep_graph, step.G_above, step.b_above = wanted, keep_graph, G, b_above
        if self.hand_written[index]:
            layer = HandWrittenLayer(self.layers[index], self.call, self.b[index])
            d_below = layer.backward(step)
        else:
            d_below = self._backward_by_autograd(index, step)
        if index > 0 and passes_on:
            self.gradient_above = (task, index - 1, step.G, self._factors(index))
        self._descend(index, step, keep_graph)
        return d_below, step.gradients

    def _bring_to_life(self, index: int) -> None:
        """Makes S_index the live state, should the gradient not start at the top."""
        if self.policy.name == "none" and index in self.states:
            self.live, self.live_index = self.states[index], index
        while self.live_index > index:
            at = self.live_index
            assert self.live is not None
            with self._gathered(at):
                step = self._step(at, torch.zeros_like(self.live.h))
                if self.hand_written[at] and at > 0:
                    HandWrittenLayer(self.layers[at], self.call, self.b[at]).rebuild_below(step)
            self._descend(at, step, keep_graph=False)
        if self.live is None or self.live_index != index or index not in self.kept:
            raise RuntimeError(
                f"Backward through layer {index} a second time: recompute={self.policy.name!r} has freed or moved on "
                "from its state. Run the forward again for every backward (retain_graph=True works with "
                "recompute='none')."
            )

    def _step(self, index: int, d_h: torch.Tensor) -> BackwardStep:
        """What the backward of a layer starts from; decides how the state below comes about."""
        live, kept = self.live, self.kept[index]
        assert live is not None
        below = self._state_below(index)
        for state in (live if self.policy.inverts else None, below):
            if state is not None and not state.is_intact():
                raise RuntimeError(f"Hidden states near layer {index} were modified in place; its backward needs them.")
        inverts = self.policy.inverts and self.hand_written[index]
        h_below = self.inputs.get(index, below.h if below is not None else None)
        if h_below is None or (inverts and (index == 0 or index not in self.inputs)):
            buffer = self.call.scratch.get(f"h rebuilt {index % 2}", live.h.shape, live.h)
            rebuilt = torch.sub(live.h, live.Y["down"], out=buffer).sub_(live.Y["o"])  # h_{l-1} = h_l - Y_down - Y_o
            if h_below is None:
                h_below = rebuilt
            else:
                self.meter.record(relative_difference(rebuilt, h_below))
        step = BackwardStep(h_below, live.Y, d_h, kept.low_rank or {}, kept.attention, kept_below=below)
        step.inverts = inverts
        step.attend_again = partial(self._attend_again, live.Y, kept)
        return step

    def _attend_again(self, Y: dict, kept: Kept, layer: HandWrittenLayer, dtype: torch.dtype):
        with restored_random_state(kept.random_state, next(iter(Y.values()))):
            return layer.attend(Y, dtype, waits=False)

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
                low_rank = self.kept[at].low_rank
                assert low_rank is not None
                layer = HandWrittenLayer(self.layers[at], self.call, self.b[at])
                self.states[at] = layer.replay(below, low_rank, f"replayed {at - bottom}")

    @contextmanager
    def _gathered(self, index: int):
        """FSDP2 holds the whole weights of one layer at a time, the one whose backward runs."""
        layer = self.layers[index]
        if hasattr(layer, "unshard"):
            layer.unshard()
        yield
        if hasattr(layer, "reshard"):
            layer.reshard()

    def _take_gradient(self, task: int, index: int) -> tuple[dict, dict]:
        """(G, b) of the layer above, if the gradient comes from there."""
        above, self.gradient_above = self.gradient_above, None
        if above is None or above[:2] != (task, index):
            return {}, {}
        return above[2], above[3]

    def _factors(self, index: int) -> dict[str, float]:
        """What G of a layer counts in the layer below: b, and 1 where autograd has multiplied already."""
        b = self.b[index]
        return b if b is not None and self.hand_written[index] else dict.fromkeys(POSITIONS, 1.0)

    def _descend(self, index: int, step: BackwardStep, keep_graph: bool) -> None:
        """S_{index - 1} becomes the live state, and what belongs to layer `index` is freed."""
        for drift in step.drifts:
            self.meter.record(drift)
        below = step.kept_below
        if index == 0:
            self.live = None
        elif below is not None:
            self.live = below
        else:
            self.live = State(step.h_below, step.Y_below)
        self.live_index = index - 1
        if not keep_graph:
            self.states.pop(index, None)
            if self.policy.name != "none":
                self.states.pop(index - 1, None)
            self.inputs.pop(index, None)
            self.kept.pop(index, None)

    def _backward_by_autograd(self, index: int, step: BackwardStep) -> torch.Tensor:
        """The layer once more, this time with autograd watching."""
        layer, below = self.layers[index], step.kept_below
        previous = list(below.Y.values()) if below is not None else []
        parameters = {name: p for name, p in parameters_of(layer).items() if name in step.wanted}
        leaves = [tensor.detach().requires_grad_() for tensor in (step.h_below, *previous)]
        with (
            torch.enable_grad(),
            self.call.autocast(),
            restored_random_state(self.kept[index].random_state, step.h_below),
        ):
            outputs = layer.forward(*leaves, **self.call.arguments)
        d_Y = [step.G_above[p].mul_(step.b_above[p]) if step.G_above else None for p in POSITIONS]
        used = [(y, d) for y, d in zip(outputs, (step.d_h, *d_Y), strict=True) if d is not None and y.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in used], [*leaves, *parameters.values()], [d for _, d in used], allow_unused=True
        )
        step.gradients = dict(zip(parameters, found[len(leaves) :], strict=True))
        zeros = [torch.zeros_like(leaf) if d is None else d for leaf, d in zip(leaves, found, strict=False)]
        step.G = dict(zip(POSITIONS, zeros[1:], strict=False))
        return zeros[0]

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
    """One layer for autograd: h_{l-1} and the layer's parameters -> h_l. The rest is the tape's."""

    @staticmethod
    def forward(ctx, tape: Tape, index: int, h: torch.Tensor, names: tuple[str, ...], *parameters: torch.Tensor):
        ctx.tape, ctx.index, ctx.names = tape, index, names
        ctx.save_for_backward(*parameters)
        return tape.forward(index, h)

    @staticmethod
    def backward(ctx, d_h):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Second derivatives (create_graph=True) do not pass a hand-written backward. Take them in evaluation "
                "mode, model.eval(), where CR-Net runs on plain autograd."
            )
        _ = ctx.saved_tensors  # complains about parameters that were changed since the forward
        _, _, needs_h, _, *needs = ctx.needs_input_grad
        wanted = {name for name, needed in zip(ctx.names, needs, strict=True) if needed}
        d_below, gradients = ctx.tape.backward(ctx.index, d_h, wanted, needs_h)
        return None, None, d_below if needs_h else None, None, *(gradients.get(name) for name in ctx.names)


def read_b(layer: nn.Module) -> dict[str, float]:
    """b of every position as numbers: one read for the seven of them, since on an accelerator each one waits."""
    linears = {p: linear for p, linear in linears_of(layer).items() if isinstance(linear, CrossLayerLinear)}
    if not linears:
        return {}
    epsilons = {linear.beta_epsilon for linear in linears.values()}
    if len(epsilons) > 1:
        return {position: linear.b().item() for position, linear in linears.items()}
    betas = torch.cat([linear.beta.detach() for linear in linears.values()])
    return dict(zip(linears, b_of(betas, epsilons.pop()).tolist(), strict=True))


def _same_values(h: torch.Tensor, ours: torch.Tensor) -> bool:
    """Whether h is the h that we handed out, as it was or rounded to another dtype (FSDP's mixed precision)."""
    if h.shape != ours.shape:
        return False
    if h.dtype == ours.dtype:
        return h.data_ptr() == ours.data_ptr() or torch.equal(h, ours)
    return torch.equal(h, ours.to(h.dtype))


def get_random_state(tensor: torch.Tensor) -> list[torch.Tensor]:
    """State of the generators that an operation on this tensor may draw from."""
    states = [torch.get_rng_state()]
    if tensor.device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(tensor.device).get_rng_state(tensor.device))
    return states


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


def set_random_state(states: list[torch.Tensor], tensor: torch.Tensor) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(tensor.device).set_rng_state(states[1], tensor.device)


__all__ = ["POLICIES", "DriftMeter", "Tape"]
