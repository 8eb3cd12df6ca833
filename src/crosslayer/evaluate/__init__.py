"""What a language model does: perplexity and bits per byte by one definition, text, a cache that can be put away."""

from .low_rank_cache import LowRankCache
from .perplexity import Perplexity, measure_perplexity

__all__ = ["LowRankCache", "Perplexity", "measure_perplexity"]
