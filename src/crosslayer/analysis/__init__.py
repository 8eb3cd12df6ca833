"""Looking into models: what their activations cost in memory."""

from .saved_activations import SavedActivations, measure_saved_activations

__all__ = ["SavedActivations", "measure_saved_activations"]
