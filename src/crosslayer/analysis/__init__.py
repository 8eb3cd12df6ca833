"""Looking into models: what their activations cost in memory."""

from .peak_memory import PeakMemory, measure_peak_memory
from .saved_activations import SavedActivations, measure_saved_activations

__all__ = ["PeakMemory", "SavedActivations", "measure_peak_memory", "measure_saved_activations"]
