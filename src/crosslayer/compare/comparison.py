"""Several methods on the same data, tokens and shape, with the same tuning effort, and what came of it.

output_dir/
  recipe.yaml, run.json      as in pre-training
  runs/HASH.json             one file a run, written when it ends: what `resume` goes on from
  compare.json, compare.md, compare.png
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from ..data import prepare_data
from ..errors import ConfigError, RunInterruptedError
from ..provenance import describe_run
from ..train.recipe import Recipe, build_recipe
from ..train.resume import check_fingerprints, check_same_run
from ..train.run import build_model_config, earlier_recipe, fingerprints_of
from ..train.run_folder import RUN_FILE, check_output_dir, prepare_output_dir, read_json
from .options import Options
from .pool import Pool
from .recipes import recipe_of
from .report import Comparison, summarize, write_comparison
from .runs import Job, RunResult, run_once, shown
from .tuning import Tuning, tune

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TUNING_SEED_OFFSET = 100


def compare(
    recipe: Recipe,
    options: Options,
    output_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    start: Mapping[str, dict[str, float]] = MappingProxyType({}),
    tell: Callable[[str], None] = lambda line: None,
    initialize_worker: Callable[[], None] | None = None,
) -> Comparison:
    """Tunes, trains and reports; returns what compare.json holds.

    Args:
        recipe: of a CR-Net; the other methods take its shape, data, steps and schedule.
        output_dir: a new or empty folder; one that holds a comparison needs `resume` (goes on; methods and seeds may be
            added) or `overwrite`.
        start: method -> the rates where its search starts; the recipe's for those that are not there.
        tell: called with a line for people whenever a method has come further.
        initialize_worker: called first in every process that makes runs.

    Raises ConfigError, DataError, CheckpointError before anything is written, TrainingError when interrupted.
    """
    output_dir = Path(output_dir)
    check_output_dir(output_dir, resume=resume, overwrite=overwrite)
    if resume:
        check_kind(output_dir, is_ladder=False)
        check_same_run(recipe.to_dict(), earlier_recipe(output_dir).to_dict(), ("model", "data"), output_dir)
    steps = recipe.training.get("max_steps", -1)
    if steps < 1:
        raise ConfigError("training.max_steps is missing: methods are compared after the same number of steps")
    check_no_time_limit(recipe)
    recipes = recipes_of(options.methods, recipe)
    use_cuda = torch.cuda.is_available() and not recipe.training.get("use_cpu", False)
    threads = torch.get_num_threads()
    workers = options.workers or (1 if use_cuda else threads)
    prepared = prepare_data(recipe.data)  # the runs find it in the cache
    fingerprints = fingerprints_of(prepared)
    if resume:
        check_fingerprints(fingerprints, output_dir)
    recipes_of(options.methods, recipe, prepared.tokenizer)
    if not resume:
        prepare_output_dir(output_dir, recipe, options, fingerprints, overwrite=overwrite)

    make = partial(Job, validation_blocks=options.validation_blocks, threads=max(1, threads // workers))
    seed = int(recipe.training.get("seed", 0))
    tuning = {"seed": seed + TUNING_SEED_OFFSET, "steps": tuning_steps(options, steps)}
    folder = output_dir / "runs"
    folder.mkdir(exist_ok=True)
    searching = {
        name: partial(make, method=name, recipe=of_method, whole_validation=False, **tuning)
        for name, of_method in recipes.items()
    }
    finishing = {
        name: partial(make, method=name, recipe=of_method, whole_validation=True, steps=steps)
        for name, of_method in recipes.items()
    }
    seeds = [seed + number for number in range(options.seeds)]
    pool = Pool(workers, initialize_worker)
    try:
        found, results = _carry_out(pool, searching, finishing, seeds, folder, options, start, tell)
    except KeyboardInterrupt:
        done = len(list(folder.glob("*.json")))
        pool.kill()
        raise RunInterruptedError(f"interrupted after {done} runs; --resume goes on from there") from None
    finally:
        pool.stop()  # what failed in one run must not wait for the others
    content: Comparison = {
        "what": "validation loss (nats per token) of methods at equal data, tokens, shape and tuning effort",
        "recipe": recipe.to_dict(),
        "options": asdict(options),
        "run": describe_run(),
        "tuning": tuning,
        "data": prepared.statistics.describe(),
        "methods": {name: summarize(name, recipes[name], found[name], results[name]) for name in options.methods},
    }
    write_comparison(output_dir, content)
    return content


def check_kind(output_dir: Path, *, is_ladder: bool) -> None:
    """Raises ConfigError for a comparison that would go on as a ladder, and the other way round."""
    earlier = read_json(output_dir / RUN_FILE) or {}
    if is_ladder != ("sizes" in earlier.get("plan", {})):
        what = "a comparison without sizes; leave --sizes out" if is_ladder else "a ladder; give its --sizes"
        raise ConfigError(f"{output_dir} holds {what}, or another --output_dir")


def check_no_time_limit(recipe: Recipe) -> None:
    """Raises ConfigError for a recipe that would end a run by the clock."""
    if recipe.monitor.max_hours is not None:
        raise ConfigError(
            f"monitor.max_hours={recipe.monitor.max_hours:g} would end runs of a comparison early; leave it out (a "
            "comparison that is ended goes on with --resume)"
        )


def recipes_of(
    methods: Iterable[str], recipe: Recipe, tokenizer: "PreTrainedTokenizerFast | None" = None
) -> dict[str, dict[str, Any]]:
    """The recipe of each method. Raises ConfigError: a rank that does not fit shows here, not after an hour."""
    recipes = {name: recipe_of(name, recipe) for name in methods}
    for of_method in recipes.values():
        build_model_config(build_recipe(of_method, ran=True), tokenizer)
    return recipes


def tuning_steps(options: Options, steps: int) -> int:
    """Steps of a run of the search: a number, or a share of the final runs'."""
    asked = 0.25 if options.tuning_steps is None else options.tuning_steps
    return int(asked) if asked >= 1 else max(1, int(steps * asked))


def _carry_out(
    pool: Pool,
    searching: Mapping[str, Callable[..., Job]],
    finishing: Mapping[str, Callable[..., Job]],
    seeds: list[int],
    folder: Path,
    options: Options,
    start: Mapping[str, dict[str, float]],
    tell: Callable[[str], None],
) -> tuple[dict[str, Tuning], dict[str, list[RunResult]]]:
    """What the search found for every method, and its runs with that, one for each seed."""
    searches = {name: pool.submit(tune, make, folder, options, start.get(name)) for name, make in searching.items()}
    found: dict[str, Tuning] = {}
    finals: dict[str, list[Future[RunResult]]] = {}
    for name, search in searches.items():
        found[name] = search.result()
        rates = found[name]["rates"]
        tell(f"{name}: learning rates {shown(rates)} after {len(found[name]['tried'])} runs")
        finals[name] = [pool.submit(run_once, finishing[name](rates=rates, seed=seed), folder) for seed in seeds]
    results: dict[str, list[RunResult]] = {}
    for name, runs in finals.items():
        results[name] = [run.result() for run in runs]
        losses = ", ".join("diverged" if run["loss"] is None else f"{run['loss']:.4f}" for run in results[name])
        tell(f"{name}: validation loss {losses}")
    return found, results
