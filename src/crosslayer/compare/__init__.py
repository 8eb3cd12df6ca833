"""Several methods at equal data, tokens, shape and tuning effort, and what came of it; the same at several sizes."""

from .comparison import compare
from .ladder import compare_sizes
from .ladder_report import markdown_ladder
from .options import CONTENDERS, Options, contender_of
from .recipes import recipe_of
from .report import Comparison, MethodResult, markdown_table
from .runs import Job
from .sizes import LadderOptions, Size, for_each, parse_sizes, recipe_of_size, with_budget
from .tuning import has_worse_neighbours, search_rates

__all__ = [
    "CONTENDERS",
    "Comparison",
    "Job",
    "LadderOptions",
    "MethodResult",
    "Options",
    "Size",
    "compare",
    "compare_sizes",
    "contender_of",
    "for_each",
    "has_worse_neighbours",
    "markdown_ladder",
    "markdown_table",
    "parse_sizes",
    "recipe_of",
    "recipe_of_size",
    "search_rates",
    "with_budget",
]
