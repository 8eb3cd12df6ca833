"""Gram matrices that are summed over tokens as they pass, and singular values of their combinations."""

from collections.abc import Sequence

import torch

PANELS = 8
SMALLEST_PANEL = 128


class SymmetricGram:
    """sum of Y^T Y [F, F] in float64, upper part only, as row panels.

    Each product is made in Y's own dtype (float32 or float64) over a few rows and added in float64: the rounding of a
    sum over all tokens is that of those rows, about 1e-7 of the largest entry in float32. With 8 panels it takes 9/16
    of the operations and 4.5 bytes per entry of the full matrix.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.width = width
        self.starts = list(range(0, width, panel_height(width)))
        self.panels = [
            torch.zeros(min(panel_height(width), width - start), width - start, dtype=torch.float64, device=device)
            for start in self.starts
        ]

    def add(self, Y: torch.Tensor) -> None:
        """Y [tokens, F]."""
        for start, panel in zip(self.starts, self.panels, strict=True):
            panel += Y[:, start : start + panel.shape[0]].t() @ Y[:, start:]

    def trace(self) -> float:
        """Sum of the diagonal."""
        return float(sum(panel.diagonal().sum() for panel in self.panels))

    def add_to(self, full: torch.Tensor, factor: float) -> None:
        """full [F, F], lower part: += factor times this."""
        for start, panel in zip(self.starts, self.panels, strict=True):
            full[start:, start : start + panel.shape[0]].add_(panel.t(), alpha=factor)


def panel_height(width: int) -> int:
    """Rows of each panel but the last."""
    return max(SMALLEST_PANEL, -(-width // PANELS))


def gram_size(width: int) -> int:
    """Bytes of a SymmetricGram of this width."""
    height = panel_height(width)
    return sum(8 * min(height, width - start) * (width - start) for start in range(0, width, height))


def eigenvalues(terms: Sequence[tuple[float, SymmetricGram]]) -> torch.Tensor:
    """Squared singular values, largest first, float64 on the CPU, of a combination of Gram matrices."""
    first = terms[0][1]
    full = torch.zeros(first.width, first.width, dtype=torch.float64, device=first.panels[0].device)
    for factor, gram in terms:
        gram.add_to(full, factor)
    return torch.linalg.eigvalsh(full, UPLO="L").flip(0).clamp_min(0).cpu()
