"""Several methods at equal data, tokens, shape and tuning effort, and what came of it."""

from .comparison import CONTENDERS, Job, Options, compare, has_worse_neighbours, markdown_table, recipe_of, search_rates

__all__ = [
    "CONTENDERS",
    "Job",
    "Options",
    "compare",
    "has_worse_neighbours",
    "markdown_table",
    "recipe_of",
    "search_rates",
]
