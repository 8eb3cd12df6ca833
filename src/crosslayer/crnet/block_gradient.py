"""One block on the tape: forward, gradients and the recurrence backwards, all by the block's table of stages.

    forward     the stages in order, sums in place
    gradient    the stages in reverse:  G_p = its own + what h passes on where it adds + b G of the block above
                                        dx, dA, dB, db from the product, d_h or dY of earlier stages from the function
    inversion   Y_{l-1} = (Y_l - T B) / b over Y_l, as soon as a position is done; h_{l-1} = h_l - Y, last first
    replay      Y_l = b Y_{l-1} + T B from the kept T; h by the forward's own additions

Inversion in place is safe in every block: a stage reads only positions of earlier stages, and the sweep goes from the
last to the first. Letters: [B, T, D] batch, tokens, hidden size; F the output width of a position; h hidden states, Y
outputs of the linears.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .block import CrossLayerBlock, Stage
from .kernels import compiled, gradient_sums
from .local_functions import draws_random_numbers, run_function
from .local_graph import Call, Gradients, LocalGraph
from .policies import Policy
from .product import OpaqueProduct, Product, product_of
from .random_state import get_random_state, restored_random_state

Outputs = dict[str, torch.Tensor]
"""Y of positions by name, [B, T, F]."""


@dataclass
class State:
    """All that one block hands to the next: hidden states [B, T, D] and the Y that carry, in float32 at least."""

    h: torch.Tensor
    Y: Outputs

    def __post_init__(self) -> None:
        self.version = self.h._version

    def is_intact(self) -> bool:
        """Whether nobody has written over h, which others see too."""
        return self.h._version == self.version

    def tensors(self) -> list[torch.Tensor]:
        """h and every Y."""
        return [self.h, *self.Y.values()]


@dataclass
class Kept:
    """What a block's forward leaves for its backward, beside states."""

    first: Outputs = field(default_factory=dict)  # U = X A of a position, or the increment of an opaque one
    outputs: Outputs = field(default_factory=dict)  # Y of positions that do not carry
    choices: Outputs = field(default_factory=dict)  # the experts of each token
    graphs: dict[str, LocalGraph] = field(default_factory=dict)  # by path, of functions and linears that wait
    random_states: dict[str, list[torch.Tensor]] = field(default_factory=dict)  # by path, ahead of what drops
    dtype: torch.dtype | None = None  # in which functions read Y

    def tensors(self) -> list[torch.Tensor]:
        """Everything it holds, random states and waiting graphs included."""
        random_states = [tensor for state in self.random_states.values() for tensor in state]
        graphs = [tensor for graph in self.graphs.values() for tensor in graph.tensors()]
        return [*self.first.values(), *self.outputs.values(), *self.choices.values(), *graphs, *random_states]


@dataclass
class Step:
    """What goes in and out of the backward of one block.

    Goes in: the state after the block, the hidden states before it, the gradient of its hidden states, and (G, factor)
    of each position of the block above. Comes out: gradients by name, (G, b) of this block, Y of the one below.
    """

    h_below: torch.Tensor
    Y: Outputs
    d_h: torch.Tensor
    kept_below: State | None = None
    inverts: bool = True
    above: dict[str, tuple[torch.Tensor, float]] = field(default_factory=dict)
    d_beside: list[torch.Tensor | None] = field(default_factory=list)
    gradients: Gradients = field(default_factory=Gradients)
    below: dict[str, tuple[torch.Tensor, float]] = field(default_factory=dict)
    Y_below: Outputs = field(default_factory=dict)
    drifts: list[torch.Tensor] = field(default_factory=list)

    def total_gradient(self, position: str, local: torch.Tensor, previous: torch.Tensor | None, compiles: bool) -> Any:
        """(G_l = dY_l + b_{l+1} G_{l+1}, written over G_{l+1}; <G_l, Y_{l-1}> [1], None without Y_{l-1})."""
        above, factor = self.above.pop(position, (None, 1.0))
        if above is None:
            G = local.to(self.h_below.dtype, memory_format=torch.contiguous_format, copy=True)
        elif compiles and previous is not None:
            return compiled(gradient_sums)(local, above, torch.tensor(factor, dtype=torch.float64), previous)
        else:
            G = torch.add(local, above, alpha=factor, out=above)
        return G, None if previous is None else torch.dot(G.view(-1), previous.reshape(-1)).view(1)

    def output_below(self, position: str, product: Any, first: torch.Tensor) -> torch.Tensor:
        """Y_{l-1}: as it was kept, else rebuilt in place of Y_l. Where both are at hand they are compared."""
        kept = self.kept_below.Y[position] if self.kept_below is not None else None
        if self.inverts:
            rebuilt = product.retreat(self.Y[position], first)
            if kept is not None:  # in units of the lowest state that is used, Y_l: before this division by b
                self.drifts.append(relative_difference(rebuilt, kept) * min(1.0, abs(product.b)))
        self.Y_below[position] = kept if kept is not None else rebuilt
        return self.Y_below[position]


class BlockRun:
    """One block and one call.

    Args:
        block: the decoder block.
        call: what it has in common with the other blocks of this forward.
        arguments: keyword arguments of the block: masks, rotations.
        b: {position: b} of those that build on the block below and can be run backwards.
        has_below: set of the carried positions that some block below has.
        policy: the memory policy.
    """

    def __init__(self, block: CrossLayerBlock, call: Call, arguments: dict, b, has_below, policy: Policy) -> None:
        self.block, self.call, self.arguments, self.policy = block, call, arguments, policy
        self.parameters = parameters_of(block)  # in the end those of functions
        known = [*(place.module for place in block.places.values()), *(stage.function for stage in block.stages)]
        known += [stage.through for stage in block.stages if stage.through is not None]
        prefixes = tuple(f"{path}." for path in known)
        # What hangs on the block besides, such as an adapter: only hooks know who uses it.
        self.strays = {key: p for key, p in self.parameters.items() if not key.startswith(prefixes)}
        products: dict[str, Product | OpaqueProduct] = {}
        for name, place in sorted(block.places.items(), key=lambda item: -len(item[1].module)):  # inner ones first
            prefix, factor = f"{place.module}.", b.get(name)
            mine = {key: self.parameters.pop(key) for key in list(self.parameters) if key.startswith(prefix)}
            if factor is not None:
                del mine[f"{prefix}beta"]
            builds = place.carries and name in has_below
            products[name] = product_of(place.module, block.linear(name), factor, builds, mine, self.strays, call)
        self.products = {name: products[name] for name in block.places}
        self.through: dict[str, Any] = {}  # what stands between Y and h, run once per pass

    @property
    def can_replay(self) -> bool:
        """Whether the state after the block follows from the one before it and what is kept."""
        return all(self.products[name].b is not None for name, place in self.block.places.items() if place.carries)

    @property
    def can_invert(self) -> bool:
        """Whether the state before the block follows from the one after it."""
        return not any(product.needs_previous for product in self.products.values())

    # Forward

    def forward(self, h: torch.Tensor, Y_below: Outputs, in_place: tuple[str, ...]) -> tuple[State, Kept, list]:
        """(h_{l-1}, Y_{l-1}) -> (h_l, Y_l), what is kept of the way, and what positions returned beside Y.

        `in_place`: positions whose Y_l may be written over Y_{l-1}.
        """
        # First of all, where the h of two layers below was.
        h_next = torch.empty_like(h, memory_format=torch.contiguous_format)
        Y, kept, now = dict(Y_below), Kept(), h
        beside: list[torch.Tensor] = []
        for stage in self.block.stages:
            x = self._function(stage.function, stage, now, Y, kept, fresh=True).output
            kept.dtype = x.dtype if stage.reads_h else kept.dtype
            for name in stage.positions:
                Y[name], more = self._advance(name, x, Y_below.get(name), h.dtype, in_place, kept)
                beside += more
                if name in stage.adds:
                    now = torch.add(now, self._added(stage, Y[name], kept, fresh=True), out=h_next)
        self.through.clear()
        outputs = {name: Y.pop(name) for name, place in self.block.places.items() if not place.carries}
        if self.policy.name == "none":
            kept.outputs = outputs
        return State(now, Y), kept, beside

    def _advance(self, name, x, previous, dtype, in_place, kept: Kept) -> tuple[torch.Tensor, list]:
        """Y of one position, and what its module returned beside it."""
        product, carries, beside = self.products[name], self.block.places[name].carries, list[torch.Tensor]()
        keeps = self.policy.keeps_low_rank or not carries
        out = previous if name in in_place and product.b is not None else None
        if isinstance(product, Product):
            first = product.first(x)
            if keeps and product.A is not None:
                kept.first[name] = first
            if keeps and product.A is None and not carries:
                kept.first[name] = first = product.output(first)
                return first, []
        else:
            self._note_random_state(product.name, product.linear, x, kept)
            choice = product.choose(x)
            if choice is not None:
                kept.choices[name] = choice
            waits = self.policy.keeps_attention
            graph = product.run(x, previous, choice, waits)
            first, beside = graph.output, graph.beside
            if waits:
                kept.graphs[product.name] = graph
            elif keeps and not product.needs_previous:
                kept.first[name] = first
        if previous is not None and product.b is not None:
            return product.advance(previous, first, out), beside
        y = product.output(first)
        return y.to(dtype) if carries else y, beside

    def _function(self, path: str, stage: Stage, h, Y: Outputs, kept: Kept, fresh: bool) -> Any:
        """A stage's function: as it waited, else run, with the random numbers that it had."""
        if path in kept.graphs:
            return kept.graphs[path]
        module = self.block.find(path)
        waits = fresh and self.policy.keeps_attention and stage.takes_arguments
        inputs = [h] if stage.reads_h else [Y[name].to(kept.dtype) for name in stage.reads]
        arguments = self.arguments if stage.takes_arguments else {}
        found = self._run(path, module, inputs, arguments, kept, fresh and not waits, waits)
        if waits:
            kept.graphs[path] = found
        return found

    def _added(self, stage: Stage, y: torch.Tensor, kept: Kept, fresh: bool = False) -> torch.Tensor:
        """What a stage adds to h: Y, or what the module between them makes of it."""
        if stage.through is None:
            return y
        if stage.through not in self.through:
            module = self.block.find(stage.through)
            self.through[stage.through] = self._run(stage.through, module, [y], {}, kept, fresh)
        return self.through[stage.through].output

    def _run(self, path, module, inputs, arguments, kept: Kept, notes: bool, waits: bool = False) -> Any:
        if notes:
            self._note_random_state(path, module, inputs[0], kept)
        mine = {key: p for key, p in self.parameters.items() if key.startswith(f"{path}.")}
        with restored_random_state(None if notes else kept.random_states.get(path), inputs[0]):
            return run_function(path, module, inputs, arguments, mine, self.strays, self.call, waits)

    def _note_random_state(self, path: str, module: nn.Module, like: torch.Tensor, kept: Kept) -> None:
        if draws_random_numbers(module):
            kept.random_states[path] = get_random_state(like)

    # Backward

    def hidden_states_below(self, h: torch.Tensor, Y: Outputs, kept: Kept, out: torch.Tensor) -> torch.Tensor:
        """h_{l-1} = h_l - Y, last first, into `out`."""
        for stage in reversed(self.block.stages):
            for name in reversed(stage.adds):
                h = torch.sub(h, self._added(stage, Y[name], kept), out=out)
        return h

    def complete(self, Y: Outputs, kept: Kept) -> Outputs:
        """Y with the outputs of positions that do not carry, from what was kept of them."""
        for name, place in self.block.places.items():
            if not place.carries and name not in Y:
                output = kept.outputs.get(name)
                Y[name] = self._output_from(self.products[name], kept.first[name]) if output is None else output
        return Y

    @staticmethod
    def _output_from(product: Product | OpaqueProduct, first: torch.Tensor) -> torch.Tensor:
        is_output = isinstance(product, Product) and product.A is None
        return first if is_output else product.output(first)

    def backward(self, step: Step, kept: Kept) -> torch.Tensor:
        """d h_l -> d h_{l-1}. Gradients of parameters, G and Y_{l-1} are put into `step`."""
        scratch = self.call.scratch
        # First of all, where that of two layers above was.
        d_below = torch.empty_like(step.d_h, memory_format=torch.contiguous_format)
        stages = self.block.stages
        last_to_read_h = next(stage for stage in stages if stage.reads_h)
        d_h = step.d_h
        d_Y: Outputs = {}
        for stage in reversed(stages):
            h = self._hidden_states_at(stage, step, kept) if stage.reads_h else None
            function = self._function(stage.function, stage, h, step.Y, kept, fresh=False)
            x = function.output
            dx = scratch.get((stage.function, "gradient"), x.shape, x)
            for count, name in enumerate(stage.positions):
                local = self._gradient_of_added(stage, name, d_h, step, kept) if name in stage.adds else None
                read = d_Y.pop(name, None)
                local = read if local is None else local if read is None else local + read
                self._backward_position(name, local, x, dx, count > 0, step, kept)
            if stage.reads_h:
                out = d_below if stage is last_to_read_h else scratch.get((stage.function, "d_h"), d_h.shape, d_h)
                (d_h,) = function.gradients(dx, step.gradients, add_to=d_h, out=out)
                continue
            for name, d in zip(stage.reads, function.gradients(dx, step.gradients), strict=True):
                d_Y[name] = d_Y[name] + d if name in d_Y else d
        self._hand_on(step)
        return d_h

    def _hidden_states_at(self, stage: Stage, step: Step, kept: Kept) -> torch.Tensor:
        """h that a stage reads: h_{l-1} and what earlier stages added."""
        h = step.h_below
        for earlier in self.block.stages[: self.block.stages.index(stage)]:
            for name in earlier.adds:
                out = self.call.scratch.get((stage.function, "h"), h.shape, h)
                h = torch.add(h, self._added(earlier, step.Y[name], kept), out=out)
        return h

    def _gradient_of_added(self, stage: Stage, name: str, d_h, step: Step, kept: Kept) -> torch.Tensor:
        if stage.through is None:
            return d_h
        self._added(stage, step.Y[name], kept)  # unless it has been run
        d = self.call.scratch.get((stage.through, "gradient"), d_h.shape, d_h).copy_(d_h)  # is written over
        return self.through.pop(stage.through).gradients(d, step.gradients)[0]

    def _backward_position(self, name: str, local, x, dx, add: bool, step: Step, kept: Kept) -> None:
        """d Y_l of one position -> d X into, or added to, `dx`; from here on Y_l may have become Y_{l-1}."""
        product, previous, beta, G = self.products[name], None, f"{self.products[name].name}.beta", local
        if isinstance(product, Product):
            first = kept.first[name] if name in kept.first and product.A is not None else product.first(x)
        else:
            graph = self._graph_of(name, product, x, step, kept)
            first = graph.output
        if product.b is not None:
            previous = step.output_below(name, product, first)
        if self.block.places[name].carries:
            previous = previous if beta in step.gradients.wanted else None
            G, along = step.total_gradient(name, local, previous, self.call.compiles)
            if along is not None:
                step.gradients.found[beta] = product.whole_gradient(along)  # db / dbeta = 1
        if product.b is not None:
            step.below[name] = (G, product.b)
        if isinstance(product, Product):
            product.backward(G, x, first, dx, add, step.gradients)
            return
        d_beside = [step.d_beside.pop() for _ in graph.beside][::-1] if step.d_beside else []
        d_x, *d_previous = graph.gradients(G, step.gradients, d_beside=d_beside)
        dx.add_(d_x) if add else dx.copy_(d_x)
        if d_previous:
            step.below[name] = (d_previous[0].to(step.h_below.dtype), 1.0)
            step.Y_below[name] = step.kept_below.Y[name]  # type: ignore[union-attr]

    @staticmethod
    def _graph_of(name, product: OpaqueProduct, x, step: Step, kept: Kept) -> LocalGraph:
        if product.name in kept.graphs:
            return kept.graphs[product.name]
        previous = step.kept_below.Y[name] if product.needs_previous else None  # type: ignore[union-attr]
        with restored_random_state(kept.random_states.get(product.name), x):
            return product.run(x, previous, kept.choices.get(name))

    def _hand_on(self, step: Step) -> None:
        """What the block does not have it hands on: Y downwards, and the gradient of it."""
        for name, Y in step.Y.items():
            if name not in self.block.places:
                step.Y_below[name] = Y
        step.below |= step.above
        step.above.clear()

    def replay(self, state: State, kept: Kept, name: str) -> State:
        """The forward's additions once more, from what was kept: equal to the last bit.

        Written into `Scratch` under this name, good until another replay takes the same one.
        """
        scratch, Y = self.call.scratch, dict(state.Y)
        for position, product in self.products.items():
            if product.b is not None:
                previous = state.Y[position]
                out = scratch.get((name, position), previous.shape, previous)
                Y[position] = product.advance(previous, kept.first[position], out)
            elif not self.block.places[position].carries:
                Y[position] = self._output_from(product, kept.first[position])
        h, out = state.h, scratch.get((name, "h"), state.h.shape, state.h)
        for stage in self.block.stages:
            for position in stage.adds:
                h = torch.add(h, self._added(stage, Y[position], kept), out=out)
        self.through.clear()
        return State(h, {position: y for position, y in Y.items() if position in state.Y})


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """|actual - expected| / |expected|; `actual` is overwritten. A 0-dim tensor, infinite for anything not finite."""
    norm = torch.linalg.vector_norm(expected).clamp_min(torch.finfo(expected.dtype).tiny)
    difference = torch.linalg.vector_norm(actual.sub_(expected)) / norm
    return torch.nan_to_num(difference, nan=torch.inf)


def parameters_of(block: nn.Module) -> dict[str, torch.Tensor]:
    """Its parameters by name, shared ones under each of their names."""
    return {
        prefix + name: parameter
        for prefix, module in _walk(block)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def _walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    # torch's own walk keeps a set of what it met: with it, twice a layer, a fifth of a small model's forward.
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.")
