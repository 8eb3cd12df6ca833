"""The blocks that an adapter goes around: its structure, spectra and parameters, and the operations that change it.

Works on any model that carries a LoR2C adapter, whoever put it there: `get_peft_model`, `model.add_adapter`, PEFT's
`inject_adapter_in_model`. No operation makes, moves or removes a parameter. Each one only writes the integer states
(layer.py), so optimizers, checkpoints and gradient buckets stay valid, and moments belong to the weights they were
gathered for.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .layer import LoR2CLayer
from .structure import (
    SURVIVORS,
    Criterion,
    Span,
    Structure,
    Survivor,
    alignment,
    choose_owner,
    module_score,
    singular_values,
)


class AdaptedBlocks:
    """One adapter on one model. Blocks are counted 0, 1, ... in the model's order, whatever lists they stand in.

    Raises ConfigError where the model has no such adapter.
    """

    def __init__(self, model: nn.Module, adapter_name: str | None = None) -> None:
        layers = [module for module in model.modules() if isinstance(module, LoR2CLayer)]
        if adapter_name is None:
            active = layers[0].active_adapters if layers else []
            adapter_name = active[0] if active else "default"
        self.adapter_name = adapter_name
        self.layers = [layer for layer in layers if adapter_name in layer.lor2c_state]
        if not self.layers:
            known = sorted({name for layer in layers for name in layer.lor2c_state})
            raise ConfigError(f"The model has no LoR2C adapter {adapter_name!r}; it has {known or 'none at all'}.")
        self._position = {(id(layer.stack), layer.number): index for index, layer in enumerate(self.layers)}

    @property
    def names(self) -> list[str]:
        """Names of the blocks in the model."""
        return [layer.name for layer in self.layers]

    @property
    def structure(self) -> Structure:
        """As it is now."""
        for layer in self.layers:
            if not layer.is_up_to_date():
                layer.stack.read()
        places = tuple((layer.name.rpartition(".")[0], layer.number) for layer in self.layers)
        spans, injected = [], []
        for index, layer in enumerate(self.layers):
            span = layer.spans[self.adapter_name]
            if span is None:
                injected.append(index)
            elif span.owner == layer.number:
                at = {number: self._position[id(layer.stack), number] for number in (span.first, span.last)}
                spans.append(Span(at[span.first], at[span.last], index))
        return Structure(places, tuple(sorted(spans)), tuple(injected))

    @structure.setter
    def structure(self, structure: Structure) -> None:
        wanted: dict[int, tuple] = {}
        for index, layer in enumerate(self.layers):
            _, spans = wanted.setdefault(id(layer.stack), (layer.stack, {}))
            spans[layer.number] = None
            if index not in structure.injected:
                span = structure.span_of(index)
                spans[layer.number] = Span(*(self.layers[at].number for at in (span.first, span.last, span.owner)))
        for stack, spans in wanted.values():
            stack.write(self.adapter_name, spans)
        in_use = {id(parameter) for parameter in self.parameters_in_use()}
        for parameter in self.parameters():
            if id(parameter) not in in_use:
                parameter.grad = None  # optimizers skip it: no step, no decay

    @property
    def can_be_injected(self) -> bool:
        """Whether the adapter was made to be injected (`injectable`)."""
        return all(self.adapter_name in layer.lor2c_inject_A for layer in self.layers)

    # Operations

    def fuse(self, lower: int, upper: int, survivor: Survivor = "first", criterion: Criterion = "sfs") -> Structure:
        """Joins the modules that cover two neighbouring blocks: reads at the first block, adds at the last one.

        Whose weights live on: those of the lower module, or (`survivor="higher_score"`) of the one that `criterion`
        scores higher. The other's stay where they are, without a part in the forward.
        """
        if survivor not in SURVIVORS:
            raise ConfigError(f"survivor={survivor!r} is none of {', '.join(SURVIVORS)}.")
        before = self.structure
        first, second = sorted((before.span_of(lower), before.span_of(upper)))
        scores = self.scores(criterion) if survivor == "higher_score" else {}
        self.structure = before.fuse(first, second, choose_owner(first, second, scores, survivor))
        return self.structure

    def inject(self, block: int) -> Structure:
        """Replaces a block's module by the low-rank pairs on its query and value."""
        if not self.can_be_injected:
            raise ConfigError(
                f"Adapter {self.adapter_name!r} was made without the pairs that injection needs: create it with "
                "LoR2CConfig(injectable=True)."
            )
        self.structure = self.structure.inject(block)
        return self.structure

    # Spectra

    def factors(self, span: Span) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(A [r, d], B [d, r], scaling) of a module."""
        layer, name = self.layers[span.owner], self.adapter_name
        return _whole(layer.lor2c_A[name]), _whole(layer.lor2c_B[name]), layer.scaling[name]

    def spectrum(self, span: Span) -> torch.Tensor:
        """Singular values of the module's update, [r], descending."""
        return singular_values(*self.factors(span))

    def scores(self, criterion: Criterion) -> dict[Span, float]:
        """The score of every module."""
        return {
            span: module_score(self.spectrum(span), criterion, self.layers[span.owner].in_features)
            for span in self.structure.spans
        }

    def alignments(self, pairs: list[tuple[Span, Span]]) -> list[float]:
        """Cosine of the two updates of each pair."""
        return [alignment(*self.factors(lower)[:2], *self.factors(upper)[:2]) for lower, upper in pairs]

    # Parameters

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of the adapter's, in use or not, each once."""
        seen: set[int] = set()
        for layer in self.layers:
            for container in layer.adapter_layer_names:
                adapters = getattr(layer, container)
                if self.adapter_name not in adapters:
                    continue
                for parameter in adapters[self.adapter_name].parameters():
                    if id(parameter) not in seen:
                        seen.add(id(parameter))
                        yield parameter

    def parameters_in_use(self) -> list[nn.Parameter]:
        """Those that the forward reads under the present structure, each once."""
        _ = self.structure
        used = {id(p): p for layer in self.layers for p in layer.parameters_in_use(self.adapter_name)}
        return list(used.values())

    def num_parameters(self) -> int:
        """Size of the adapter: parameters in use."""
        return sum(parameter.numel() for parameter in self.parameters_in_use())

    def describe(self) -> dict:
        """The structure by names, for people and JSON."""
        structure, names = self.structure, self.names
        modules = [
            {"reads": names[span.first], "adds_to": names[span.last], "weights": names[span.owner]}
            for span in structure.spans
        ]
        return {"modules": modules, "injected": [names[block] for block in structure.injected]}


def _whole(linear: nn.Module) -> torch.Tensor:
    weight: Any = linear.weight
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
