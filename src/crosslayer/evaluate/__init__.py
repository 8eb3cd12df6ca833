"""How good a language model is: perplexity and bits per byte, by one definition."""

from .perplexity import Perplexity, measure_perplexity

__all__ = ["Perplexity", "measure_perplexity"]
