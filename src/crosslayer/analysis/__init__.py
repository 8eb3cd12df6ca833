"""Looking into models: memory of activations, operations, cross-layer spectra, ranks, the health of a run."""

from .operations import OperationCounter
from .peak_memory import PeakMemory, measure_peak_memory
from .positions import Position, find_positions
from .ranks import SuggestedRanks, suggest_ranks
from .saved_activations import SavedActivations, measure_saved_activations
from .spectra import LinearSpectra, Spectra, measure_spectra

__all__ = [
    "LinearSpectra",
    "OperationCounter",
    "PeakMemory",
    "Position",
    "SavedActivations",
    "Spectra",
    "SuggestedRanks",
    "find_positions",
    "measure_peak_memory",
    "measure_saved_activations",
    "measure_spectra",
    "suggest_ranks",
]
