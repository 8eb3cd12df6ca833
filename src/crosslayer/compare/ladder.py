"""A ladder: the same comparison at several sizes, each at so many tokens a parameter, and what is fitted to it.

output_dir/
  recipe.yaml, run.json            as in pre-training; the recipe is the one that the sizes are made of
  64x6/, 96x9/, ...                a comparison each (comparison.py)
  ladder.json, ladder.md, ladder.png   of the sizes that are done, written again whenever one is

The shape of a size is in sizes.py, what is fitted in ladder_findings.py. The search for the rates of a size starts at
those found for the size before it.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data import prepare_data
from ..errors import ConfigError
from ..provenance import describe_run
from ..train.recipe import Recipe
from ..train.resume import check_fingerprints, check_same_run
from ..train.run import earlier_recipe, fingerprints_of
from ..train.run_folder import RUN_FILE, check_output_dir, prepare_output_dir, read_json
from .comparison import check_kind, check_no_time_limit, compare, recipes_of
from .ladder_findings import Ladder, Rung, findings_of
from .ladder_report import write_ladder
from .report import Comparison
from .sizes import LadderOptions, dense_parameters, recipe_of_size, tokens_per_step, with_budget

WHAT = "validation loss (nats per token) of methods at several sizes, tokens a multiple of the dense parameters"


def compare_sizes(
    recipe: Recipe,
    options: LadderOptions,
    output_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    initialize_worker: Callable[[], None] | None = None,
) -> Ladder:
    """Makes the comparisons, smallest size first, and reports; returns what ladder.json holds.

    Args:
        recipe: of a CR-Net of the Llama family; its shape is that of no size, but all have its proportions.
        output_dir: a new or empty folder; one that holds a ladder needs `resume` (goes on; sizes, methods and seeds may
            be added) or `overwrite`.
        tell, initialize_worker: as in `compare`.

    Raises ConfigError, DataError, CheckpointError before anything is written, TrainingError when interrupted.
    """
    output_dir = Path(output_dir)
    check_output_dir(output_dir, resume=resume, overwrite=overwrite)
    if resume:
        check_kind(output_dir, is_ladder=True)
        check_same_run(recipe.to_dict(), earlier_recipe(output_dir).to_dict(), ("model", "data"), output_dir)
    check_no_time_limit(recipe)
    recipes = {
        str(size): with_budget(recipe_of_size(recipe, size), options.tokens_per_parameter) for size in options.sizes
    }
    parameters = [dense_parameters(of_size) for of_size in recipes.values()]
    if parameters != sorted(set(parameters)):
        shown = ", ".join(f"{name} {count:,}" for name, count in zip(recipes, parameters, strict=True))
        raise ConfigError(f"sizes must grow in dense parameters ({shown}); give them in that order")
    methods = options.comparisons[0].methods
    for of_size in recipes.values():
        recipes_of(methods, of_size)
    prepared = prepare_data(recipe.data)
    for of_size in recipes.values():
        recipes_of(methods, of_size, prepared.tokenizer)
    fingerprints = fingerprints_of(prepared)
    if resume:
        check_fingerprints(fingerprints, output_dir)
    else:
        prepare_output_dir(output_dir, recipe, options, fingerprints, overwrite=overwrite)

    content: Ladder | None = None
    start: dict[str, dict[str, float]] = {}
    for (name, of_size), of_comparison in zip(recipes.items(), options.comparisons, strict=True):
        folder = output_dir / name
        found = compare(
            of_size,
            of_comparison,
            folder,
            resume=(folder / RUN_FILE).is_file(),
            start=start,
            tell=lambda line, name=name: tell(f"{name}: {line}"),  # type: ignore[misc]
            initialize_worker=initialize_worker,
        )
        start = {method: row["rates"] for method, row in found["methods"].items()}
        content = _gather(recipe, options, recipes, output_dir)
        write_ladder(output_dir, content)
    assert content is not None  # there are sizes
    return content


def _gather(recipe: Recipe, options: LadderOptions, recipes: dict[str, Recipe], output_dir: Path) -> Ladder:
    """What ladder.json holds, from the compare.json of every size that has one of this budget."""
    rungs: dict[str, Rung] = {}
    for name, of_size in recipes.items():
        comparison: Comparison | None = read_json(output_dir / name / "compare.json")
        if comparison is not None and comparison["recipe"]["training"]["max_steps"] == of_size.training["max_steps"]:
            rungs[name] = _rung(of_size, comparison)
    return {
        "what": WHAT,
        "recipe": recipe.to_dict(),
        "options": asdict(options),
        "run": describe_run(),
        "sizes": rungs,
        "findings": findings_of(rungs),
    }


def _rung(of_size: Recipe, comparison: Comparison) -> Rung:
    tokens = of_size.training["max_steps"] * tokens_per_step(of_size)
    statistics: dict[str, Any] = comparison["data"].get("train") or {}
    return {
        "model": of_size.model,
        "dense_parameters": dense_parameters(of_size),
        "steps": of_size.training["max_steps"],
        "tokens": tokens,
        "epochs": tokens / statistics["tokens"] if statistics.get("tokens") else None,
        "tuning": comparison["tuning"],
        "data": comparison["data"],
        "run": comparison["run"],
        "methods": comparison["methods"],
    }
