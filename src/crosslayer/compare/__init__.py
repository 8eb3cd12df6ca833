"""Several methods at equal data, tokens, shape and tuning effort, and what came of it."""

from .comparison import compare
from .options import CONTENDERS, Options, contender_of
from .recipes import recipe_of
from .report import Comparison, MethodResult, markdown_table
from .runs import Job
from .tuning import has_worse_neighbours, search_rates

__all__ = [
    "CONTENDERS",
    "Comparison",
    "Job",
    "MethodResult",
    "Options",
    "compare",
    "contender_of",
    "has_worse_neighbours",
    "markdown_table",
    "recipe_of",
    "search_rates",
]
