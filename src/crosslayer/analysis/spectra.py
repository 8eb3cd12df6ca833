"""Cross-layer spectra: how close to low rank the outputs of a layer are, alone and after subtracting the layer before.

For Y_l and Y_{l-1} [tokens, F] of one position, the singular values of D(b) = Y_l - b Y_{l-1} for any b follow from
three F x F Gram matrices that are summed over the tokens as they pass:

    G_ll = Y_l^T Y_l      G_pp = Y_{l-1}^T Y_{l-1}      G_d = (Y_l - Y_{l-1})^T (Y_l - Y_{l-1})
    D(b)^T D(b) = (1 - b) G_ll + b G_d + (b^2 - b) G_pp

The third is the Gram of the difference rather than the product of the two: it is symmetric (half the work and memory)
and loses nothing to cancellation at b = 0 and b = 1. The least-squares factor is b0 = <Y_l, Y_{l-1}> / |Y_{l-1}|^2.
The observation behind CR-Net (arXiv 2509.18993, section 3) is about the relative error of
b0 Y_{l-1} + best rank-r approximation of D(b0), against that of the best rank-r approximation of Y_l itself.

Nothing but Gram matrices outlives a batch. Those that do not fit into `gram_bytes` together are summed in several
passes over the text, each stopping the forward after the last block it needs.
"""

import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .gram import SymmetricGram, eigenvalues, gram_size
from .positions import Position, find_positions

KINDS = {
    "output": "Y_l",
    "least_squares": "Y_l - b0 Y_{l-1}",
    "unit": "Y_l - Y_{l-1}",
    "learned": "Y_l - b Y_{l-1}, the model's own b",
}
ENERGIES = (0.9, 0.99)
ROWS = 2048  # tokens in one float32 product

Batch = dict[str, torch.Tensor]


@dataclass
class LinearSpectra:
    """What was found for one linear: block `layer`, position `position`.

    `squares[kind]` are the squared singular values over all tokens, largest first; "output" is there for every linear,
    the other kinds where the block before has an output of the same width, "learned" in a CR-Net.
    """

    layer: int
    position: str
    width: int
    in_features: int
    tokens: int
    squares: dict[str, torch.Tensor]
    rank: int | None = None
    b: float | None = None
    b0: float | None = None
    cosine: float | None = None
    token_cosine: float | None = None

    @property
    def energy(self) -> float:
        """|Y_l|_F^2."""
        return float(self.squares["output"].sum())

    def relative_error(self, kind: str, rank: int) -> float:
        """|D - its best rank-r approximation|_F / |Y_l|_F; 0 from the width on, nan for an output of zeros."""
        if not self.energy:
            return math.nan
        return math.sqrt(float(self.squares[kind][rank:].flip(0).sum()) / self.energy)

    def relative_errors(self, kind: str) -> torch.Tensor:
        """The same for every rank 0 .. width, [width + 1]."""
        tails = torch.cat([self.squares[kind].flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
        return (tails / self.energy).sqrt()

    def ratio(self, kind: str, rank: int) -> float | None:
        """The relative error of a kind over that of Y_l itself; None where either is missing or the latter is 0."""
        own = self.relative_error("output", rank)
        return self.relative_error(kind, rank) / own if kind in self.squares and own > 0 else None

    def stable_rank(self, kind: str) -> float:
        """|D|_F^2 / |D|_2^2."""
        squares = self.squares[kind]
        return float(squares.sum() / squares[0]) if squares[0] > 0 else 0.0

    def effective_rank(self, kind: str) -> float:
        """exp of the entropy of the singular values over their sum (Roy and Vetterli, EUSIPCO 2007)."""
        values = self.squares[kind].sqrt()
        if not values[0] > 0:
            return 0.0
        shares = values / values.sum()
        return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))

    def energy_rank(self, kind: str, share: float) -> int:
        """The smallest rank that holds this share of |D|_F^2."""
        squares = self.squares[kind]
        if not squares[0] > 0:
            return 0
        return int((squares.cumsum(0) / squares.sum() < share).sum()) + 1

    def to_dict(self, ranks: Sequence[int]) -> dict[str, Any]:
        """For JSON."""
        kinds = [kind for kind in KINDS if kind in self.squares]
        return {
            "layer": self.layer,
            "position": self.position,
            "width": self.width,
            "in_features": self.in_features,
            "rank": self.rank,
            "rms": math.sqrt(self.energy / self.tokens / self.width),
            "cosine": self.cosine,
            "token_cosine": self.token_cosine,
            "b0": self.b0,
            "b": self.b,
            "stable_rank": {kind: self.stable_rank(kind) for kind in kinds},
            "effective_rank": {kind: self.effective_rank(kind) for kind in kinds},
            "energy_rank": {kind: {str(s): self.energy_rank(kind, s) for s in ENERGIES} for kind in kinds},
            "relative_error": {kind: [self.relative_error(kind, rank) for rank in ranks] for kind in kinds},
        }


@dataclass
class Spectra:
    """What `measure_spectra` found."""

    positions: list[Position]
    layers: int
    tokens: int
    ranks: list[int]
    quarter: int
    passes: int
    gram_bytes: int
    linears: list[LinearSpectra] = field(default_factory=list)

    def at(self, layer: int, position: str) -> LinearSpectra | None:
        """The spectra of one layer and position; None where there are none."""
        return next((x for x in self.linears if (x.layer, x.position) == (layer, position)), None)

    def of(self, position: str, kind: str = "output") -> list[LinearSpectra]:
        """The linears of one position that have this kind, by layer."""
        return [x for x in self.linears if x.position == position and kind in x.squares]

    @property
    def kinds(self) -> list[str]:
        """Kinds of matrices that there are, in the order of `KINDS`."""
        return [kind for kind in KINDS if any(kind in x.squares for x in self.linears)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "layers": self.layers,
            "tokens": self.tokens,
            "ranks": self.ranks,
            "quarter_rank": self.quarter,
            "passes": self.passes,
            "gram_bytes": self.gram_bytes,
            "positions": {p.name: {"module": p.module_name, "width": p.width} for p in self.positions},
            "kinds": {kind: KINDS[kind] for kind in self.kinds},
            "linears": [linear.to_dict(self.ranks) for linear in self.linears],
        }


def measure_spectra(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    ranks: Sequence[int] | None = None,
    only: Sequence[str] | None = None,
    gram_bytes: int | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Spectra:
    """Spectra of every position of a model on a text.

    Args:
        model: any transformer; it is run in evaluation mode without gradients, its mode is put back.
        batches: arguments of the model, `input_ids` [B, T] and, where rows are padded, `attention_mask` [B, T]; read
            once per pass. Padded tokens do not count.
        ranks: at which errors are reported. None: powers of two up to the widest output, and a quarter of the width.
        only: names of positions; None = all.
        gram_bytes: Gram matrices held at a time. None: a quarter of the weights, at least 256 MiB; one position of one
            pair of layers is the least that works.
        on_batch: called with (batches done, batches in all passes).

    Raises ConfigError for a model without positions, unknown positions, ranks outside 1 .. width and too few tokens.
    """
    positions = choose_positions(find_positions(model), only)
    layers = len(positions[0].linears)
    tokens = sum(count_tokens(batch) for batch in batches)
    width = max(position.width for position in positions)
    quarter = max(1, quarter_of(model, positions))
    ranks = check_ranks(ranks, width, quarter, tokens)
    if gram_bytes is None:
        gram_bytes = max(256 * 2**20, sum(p.numel() * p.element_size() for p in model.parameters()) // 4)
    passes = plan_passes(positions, gram_bytes)
    result = Spectra(
        [position.without_modules() for position in positions], layers, tokens, ranks, quarter, len(passes), gram_bytes
    )

    was_training = model.training
    model.eval()
    carried: dict[tuple[str, int], SymmetricGram] = {}
    try:
        for index, items in enumerate(passes):
            running = _Pass(items, carried)
            done = index * len(batches)
            running.run(model, batches, partial(_report, on_batch, done, len(passes) * len(batches)))
            needed = {(p.name, layer - 1) for later in passes[index + 1 :] for p, layer in later if p.is_paired(layer)}
            result.linears += running.finish(tokens)
            carried = {key: gram for key, gram in running.grams.items() if key in needed}
    finally:
        model.train(was_training)
    order = {position.name: index for index, position in enumerate(positions)}
    result.linears.sort(key=lambda linear: (linear.layer, order[linear.position]))
    return result


def _report(on_batch: Callable[[int, int], None], done: int, total: int, batches: int) -> None:
    on_batch(done + batches, total)


def choose_positions(positions: list[Position], only: Sequence[str] | None) -> list[Position]:
    """Those that are asked for. Raises ConfigError for one that the model has not."""
    names = [position.name for position in positions]
    unknown = [name for name in only or () if name not in names]
    if unknown:
        raise ConfigError(f"position {unknown[0]!r} is not one of this model's; it has {', '.join(names)}")
    return [position for position in positions if not only or position.name in only]


def check_ranks(ranks: Sequence[int] | None, width: int, quarter: int, tokens: int) -> list[int]:
    """Sorted ranks. Raises ConfigError where one is outside 1 .. width, or the tokens are fewer."""
    if ranks is None:
        most = min(width, tokens)
        powers = [2**k for k in range(most.bit_length()) if 2**k < width]
        ranks = [rank for rank in {*powers, quarter} if rank <= most]
    bad = [rank for rank in ranks if not 1 <= rank <= width]
    if bad or not ranks:
        raise ConfigError(f"rank {bad[0] if bad else None} is outside 1..{width}, the widest output of this model")
    if tokens <= max(ranks):
        raise ConfigError(
            f"{tokens} tokens span at most rank {tokens}, and rank {max(ranks)} is asked for; give more text, raise "
            "max_tokens, or lower ranks"
        )
    return sorted(set(ranks))


def quarter_of(model: nn.Module, positions: list[Position]) -> int:
    """A quarter of the hidden size, CR-Net's default rank."""
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    return (hidden or min(position.width for position in positions)) // 4


def count_tokens(batch: Batch) -> int:
    """Tokens of all batches, padding aside."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


Item = tuple[Position, int]


def plan_passes(positions: list[Position], gram_bytes: int) -> list[list[Item]]:
    """(position, layer) items, position by position, so many a pass as fit; at least one a pass.

    An item costs its own Gram, that of its difference, and that of the layer below where it starts a pass.
    """
    passes: list[list[Item]] = [[]]
    used = 0
    for position in positions:
        for layer, linear in enumerate(position.linears):
            if linear is None:
                continue
            size = gram_size(linear.out_features)
            paired = position.is_paired(layer)
            if passes[-1] and used + size * (1 + paired) > gram_bytes:
                passes.append([])
                used = size * paired
            passes[-1].append((position, layer))
            used += size * (1 + paired)
    return passes


def row_cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine of each row of a [tokens, F] with that of b, [tokens], without a product of their size."""
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return torch.einsum("tf,tf->t", a, b) / norms.clamp_min(torch.finfo(a.dtype).tiny)


class _Buffers:
    """Memory that is used again from batch to batch: allocated anew between a model's own tensors, it would scatter."""

    def __init__(self) -> None:
        self.kept: dict[tuple, torch.Tensor] = {}

    def empty_like(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        key = (name, rows.shape[1], rows.dtype, rows.device)
        if key not in self.kept or len(self.kept[key]) < len(rows):
            self.kept[key] = torch.empty_like(rows, memory_format=torch.contiguous_format)
        return self.kept[key][: len(rows)]

    def copy_of(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        """A copy that stays as it is when the model writes into its output."""
        return self.empty_like(rows, name).copy_(rows)


def give_back_memory() -> None:
    """Returns what the model's forward has freed to the system; glibc would keep it, and eigenvalues come on top."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class _EnoughError(Exception):
    """Ends a forward after the last block that a pass needs."""


class _Pass:
    """One reading of the text: the Gram matrices of some linears."""

    def __init__(self, items: list[Item], carried: dict[tuple[str, int], SymmetricGram]) -> None:
        self.items = items
        self.grams = dict(carried)
        self.differences: dict[tuple[str, int], SymmetricGram] = {}
        self.cosines: dict[tuple[str, int], float | torch.Tensor] = {}
        self.live: dict[str, torch.Tensor] = {}  # Y of the latest block, by position
        self.buffers = _Buffers()
        self.mask: torch.Tensor | None = None
        self.tokens = 0
        self.last_layer = max(layer for _, layer in items)

    def run(self, model: nn.Module, batches: Sequence[Batch], on_batch: Callable[[int], None]) -> None:
        hooks = [module.register_forward_hook(hook) for module, hook in self._hooks()]
        device = next(model.parameters()).device
        try:
            with torch.no_grad():
                for index, batch in enumerate(batches):
                    batch = {name: tensor.to(device) for name, tensor in batch.items()}
                    self._start(batch)
                    with suppress(_EnoughError):
                        model(**batch)
                    self.live.clear()
                    on_batch(index + 1)
        finally:
            for handle in hooks:
                handle.remove()
            self.buffers = _Buffers()  # lets them go before the eigenvalues
            give_back_memory()

    def _start(self, batch: Batch) -> None:
        mask = batch.get("attention_mask")
        self.mask = None if mask is None or bool(mask.all()) else mask.flatten().bool()
        self.tokens = batch["input_ids"].numel()
        self.waiting = {(position.name, layer) for position, layer in self.items if layer == self.last_layer}

    def _hooks(self) -> Iterator[tuple[nn.Module, Callable]]:
        summed = {(position.name, layer) for position, layer in self.items}
        for position, layer in self.items:
            linear, below = position.linears[layer], position.linears[layer - 1]
            if position.is_paired(layer) and (position.name, layer - 1) not in summed:
                assert below is not None
                assert below.module is not None
                yield below.module, self._hook(position, layer - 1, sums=False)
            assert linear is not None
            assert linear.module is not None
            yield linear.module, self._hook(position, layer, sums=True)

    def _hook(self, position: Position, layer: int, *, sums: bool) -> Callable:
        key = (position.name, layer)
        keeps = layer + 1 < len(position.linears) and any(
            other.name == position.name and at == layer + 1 and position.is_paired(at) for other, at in self.items
        )

        def hook(module, arguments, output):
            Y = self._rows(output, position)
            if sums:
                previous = self.live.pop(position.name, None) if position.is_paired(layer) else None
                self._add(key, Y, previous)
            if keeps:
                self.live[position.name] = self.buffers.copy_of(Y, position.name)
            self.waiting.discard(key)
            if layer == self.last_layer and not self.waiting:
                raise _EnoughError

        return hook

    def _rows(self, output: torch.Tensor, position: Position) -> torch.Tensor:
        """Y [tokens, F] of the tokens that count, in float32 or float64."""
        rows = output.detach().reshape(-1, output.shape[-1])
        if rows.shape[0] != self.tokens:
            raise ConfigError(
                f"position {position.name!r} ({position.module_name}) sees {rows.shape[0]} of {self.tokens} tokens, so "
                "its layers cannot be compared; leave it out with positions"
            )
        if self.mask is not None:
            rows = rows[self.mask]
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    def _add(self, key: tuple[str, int], Y: torch.Tensor, previous: torch.Tensor | None) -> None:
        if key not in self.grams:
            self.grams[key] = SymmetricGram(Y.shape[-1], Y.device)
        for rows in Y.split(ROWS):
            self.grams[key].add(rows)
        if previous is None:
            return
        if key not in self.differences:
            self.differences[key] = SymmetricGram(Y.shape[-1], Y.device)
        for rows, below in zip(Y.split(ROWS), previous.to(Y.device).split(ROWS), strict=True):
            self.cosines[key] = self.cosines.get(key, 0.0) + row_cosines(rows, below).double().sum()
            difference = self.buffers.empty_like(rows, "difference")
            self.differences[key].add(torch.sub(rows, below, out=difference))

    def finish(self, tokens: int) -> Iterator[LinearSpectra]:
        for position, layer in self.items:
            key, linear = (position.name, layer), position.linears[layer]
            assert linear is not None
            own = self.grams[key]
            squares = {"output": eigenvalues([(1.0, own)])}
            found = LinearSpectra(
                layer, position.name, linear.out_features, linear.in_features, tokens, squares, linear.rank
            )
            if position.is_paired(layer):
                below = self.grams[position.name, layer - 1]
                _compare(found, own, below, self.differences.pop(key), linear.b)
                found.token_cosine = float(self.cosines[key]) / tokens
            yield found


def _compare(
    found: LinearSpectra, own: SymmetricGram, below: SymmetricGram, difference: SymmetricGram, b: float | None
) -> None:
    """The kinds that need two layers: D(b)^T D(b) = (1 - b) G_ll + b G_d + (b^2 - b) G_pp."""
    energy, energy_below = own.trace(), below.trace()
    inner = (energy + energy_below - difference.trace()) / 2
    found.b, found.b0 = b, inner / energy_below if energy_below else 0.0
    found.cosine = inner / math.sqrt(energy * energy_below) if energy * energy_below else 0.0
    factors = {"least_squares": found.b0, "unit": 1.0, "learned": b}
    for kind, factor in factors.items():
        if factor is not None:
            terms = [(1 - factor, own), (factor, difference), (factor**2 - factor, below)]
            found.squares[kind] = eigenvalues(terms)


__all__ = ["KINDS", "LinearSpectra", "Spectra", "SymmetricGram", "measure_spectra", "plan_passes"]
