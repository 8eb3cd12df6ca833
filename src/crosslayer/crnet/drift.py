"""How far rebuilt states may be off: estimated on the way up, measured on the way down."""

import torch


class ErrorEstimate:
    """How far states rebuilt from above would be off, known on the way up.

    Rebuilding S_m from S_n divides by b_n, ..., b_{m+1}; with one rounding error of size eps at each step,

        error_m = eps sum_{j = m+1..n} prod_{i = m+1..j} 1 / |b_i|       the largest over the positions

    and over the hidden states, which are rebuilt without a division.
    """

    def __init__(self, bound: float, dtype: torch.dtype) -> None:
        self.allowed = bound / (torch.finfo(dtype).eps / 2)
        self.restart()

    def restart(self) -> None:
        """The state before the next layer is kept: nothing below it is rebuilt from above it."""
        self.states: list[dict[str, list[float]]] = []  # each state that would be rebuilt: [product, sum] by position

    def add(self, b: dict[str, float]) -> bool:
        """One more layer. True: the state below it has to be kept."""
        self.states.append({})
        for state in self.states:
            for position, factor in {**b, "h": 1.0}.items():
                errors = state.setdefault(position, [1.0, 0.0])
                errors[0] /= abs(factor)
                errors[1] += errors[0]
        if all(total <= self.allowed for state in self.states for _, total in state.values()):
            return False
        self.restart()
        return True


class DriftMeter:
    """The largest drift seen in the latest backward, and what was said about b; outlives the tapes that write to it."""

    def __init__(self) -> None:
        self.latest: torch.Tensor | None = None
        self.small_b: set[tuple[int, str]] = set()

    def restart(self) -> None:
        """Forgets the drift of the backward before; `small_b` stays."""
        self.latest = None

    def record(self, drift: torch.Tensor) -> None:
        """One more drift, a 0-dim tensor; kept where it is the largest. The device is not waited for."""
        self.latest = drift if self.latest is None else torch.maximum(self.latest, drift)

    def value(self) -> float | None:
        """The largest as a number, which waits for the device; None where none was recorded."""
        return None if self.latest is None else float(self.latest)
