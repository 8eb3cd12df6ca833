"""Several methods on the same data, tokens and shape, with the same tuning effort, and what came of it.

output_dir/
  recipe.yaml, run.json      as in pre-training
  runs/HASH.json             one file a run, written when it ends: what `resume` goes on from
  compare.json, compare.md, compare.png

Learning rates are tuned by kind of parameter: one rate for all handicaps each method by another amount (docs/crnet.md).
"""

import hashlib
import importlib.util
import json
import logging
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, default_data_collator

from ..accounting import count_parameters, estimate_memory, training_flops_per_token
from ..data import DataStatistics, prepare_data
from ..errors import ConfigError, RunInterruptedError, TrainingError
from ..methods import METHODS, method_problem
from ..ranges import COUNT, COUNT_OR_0, out_of_range
from ..train.memory import training_method, training_step
from ..train.progress import LogLines
from ..train.recipe import Recipe, build_recipe
from ..train.resume import check_fingerprints, check_same_run
from ..train.run import build_arguments, build_model, build_model_config, earlier_recipe, fingerprints_of
from ..train.run_folder import check_output_dir, describe_run, prepare_output_dir, read_json, write_json
from ..train.trainer import PretrainTrainer
from ..workers import initialize_worker, without_interrupts

_log = logging.getLogger(__name__)

TUNING_SEED_OFFSET = 100
CURVE_POINTS = 10

# Which factor of ParameterGroups a tuned rate stands for.
FACTORS = {"embedding": "embedding_lr_factor", "low_rank": "low_rank_lr_factor", "full_rank": "full_rank_lr_factor"}


@dataclass(frozen=True)
class Contender:
    """A method: its changes to the recipe, and the learning rates that are tuned, the most important first.

    `equal_parameters`: its rank is chosen so that it has as many parameters, embeddings and head aside, as CR-Net.
    """

    model: dict[str, Any]
    rates: tuple[str, ...]
    equal_parameters: bool = False
    optim: str | None = None
    package: tuple[str, str] | None = None  # (module, what to install)


CONTENDERS = {
    "dense": Contender({"factorization": "dense"}, ("embedding", "full_rank")),
    "crnet": Contender({"factorization": "cross_layer"}, ("embedding", "low_rank", "full_rank")),
    "crnet_silu": Contender(
        {"factorization": "cross_layer", "increment_activation": "silu"},
        ("embedding", "low_rank", "full_rank"),
    ),
    "cola": Contender({"factorization": "cola"}, ("embedding", "low_rank"), True),
    "low_rank": Contender({"factorization": "low_rank"}, ("embedding", "low_rank"), True),
    "galore": Contender(
        {"factorization": "dense"},
        ("embedding", "full_rank"),
        optim="galore_adamw",
        package=("galore_torch", "galore-torch"),
    ),
    "apollo": Contender(
        {"factorization": "dense"},
        ("embedding", "full_rank"),
        optim="apollo_adamw",
        package=("apollo_torch", "apollo-torch"),
    ),
}
DEFAULT_METHODS = ("dense", "crnet", "cola", "low_rank")


RANGES = {
    **dict.fromkeys(("seeds", "tuning_steps", "validation_blocks", "workers"), COUNT),
    "tuning_runs": COUNT_OR_0,
}
"""Field of `Options` -> what it may be."""


@dataclass(kw_only=True)
class Options:
    """How a comparison is made. Raises ConfigError, naming every field that is wrong."""

    methods: tuple[str, ...] = DEFAULT_METHODS
    """Names of `CONTENDERS`."""

    seeds: int = 3
    """Runs of each method with its best rates: the recipe's seed and the numbers after it, for weights and order."""

    tuning_runs: int = 9
    """Most runs that the search for the learning rates of one method may take; 0 keeps the recipe's rates."""

    tuning_steps: int | None = None
    """Steps of such a run; None = a quarter of the recipe's."""

    validation_blocks: int = 128
    """Blocks behind the curves and the search; the final loss is of the whole validation split."""

    workers: int | None = None
    """Runs beside one another; None = as many as torch has threads on a CPU, one on CUDA."""

    def __post_init__(self) -> None:
        problems = []
        for name in self.methods:
            if problem := method_problem(name, CONTENDERS):
                problems.append(problem)
        if not self.methods:
            problems.append(f"methods is empty; choose from {', '.join(CONTENDERS)}")
        problems += out_of_range(vars(self), RANGES)
        if problems:
            raise ConfigError("; ".join(problems))
        for name in self.methods:
            package = CONTENDERS[name].package
            if package is not None and importlib.util.find_spec(package[0]) is None:
                raise ConfigError(f"method {name} needs a package that is missing: pip install {package[1]}")


@dataclass(kw_only=True)
class Job:
    """One run: everything that decides its result, and how it is carried out."""

    method: str
    recipe: dict[str, Any]
    rates: dict[str, float]
    seed: int
    steps: int
    validation_blocks: int
    whole_validation: bool
    threads: int = field(default=1)

    @property
    def key(self) -> str:
        """Name of the file of the run."""
        content = asdict(self)
        del content["threads"]
        content["recipe"]["data"] = {k: v for k, v in content["recipe"]["data"].items() if k != "cache_dir"}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def compare(
    recipe: Recipe,
    options: Options,
    output_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    initialize_worker: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Tunes, trains and reports; returns what compare.json holds.

    Args:
        recipe: of a CR-Net; the other methods take its shape, data, steps and schedule.
        output_dir: a new or empty folder; one that holds a comparison needs `resume` (goes on; methods and seeds may be
            added) or `overwrite`.
        tell: called with a line for people whenever a method has come further.
        initialize_worker: called first in every process that makes runs.

    Raises ConfigError, DataError, CheckpointError before anything is written, TrainingError when interrupted.
    """
    output_dir = Path(output_dir)
    check_output_dir(output_dir, resume=resume, overwrite=overwrite)
    if resume:
        check_same_run(recipe.to_dict(), earlier_recipe(output_dir), ("model", "data"), output_dir)
    steps = recipe.training.get("max_steps", -1)
    if steps < 1:
        raise ConfigError("training.max_steps is missing: methods are compared after the same number of steps")
    recipes = {name: recipe_of(name, recipe) for name in options.methods}
    use_cuda = torch.cuda.is_available() and not recipe.training.get("use_cpu", False)
    threads = torch.get_num_threads()
    workers = options.workers or (1 if use_cuda else threads)
    prepared = prepare_data(recipe.data)  # the runs find it in the cache
    fingerprints = fingerprints_of(prepared)
    if resume:
        check_fingerprints(fingerprints, output_dir)
    for content in recipes.values():  # a rank that does not fit shows here, not after an hour
        build_model_config(build_recipe(content), prepared.tokenizer)
    if not resume:
        prepare_output_dir(output_dir, recipe, options, fingerprints, overwrite=overwrite)

    make = partial(Job, validation_blocks=options.validation_blocks, threads=max(1, threads // workers))
    seed = int(recipe.training.get("seed", 0))
    tuning = {"seed": seed + TUNING_SEED_OFFSET, "steps": options.tuning_steps or max(1, steps // 4)}
    folder = output_dir / "runs"
    folder.mkdir(exist_ok=True)
    pool = _Pool(workers, initialize_worker)
    try:
        searches = {
            name: pool.submit(
                tune, partial(make, method=name, recipe=content, whole_validation=False, **tuning), folder, options
            )
            for name, content in recipes.items()
        }
        found, finals = {}, {}
        for name, search in searches.items():
            found[name] = search.result()
            tell(f"{name}: learning rates {_shown(found[name]['rates'])} after {len(found[name]['tried'])} runs")
            finals[name] = [
                pool.submit(
                    run_once,
                    make(
                        method=name,
                        recipe=recipes[name],
                        rates=found[name]["rates"],
                        seed=seed + number,
                        steps=steps,
                        whole_validation=True,
                    ),
                    folder,
                )
                for number in range(options.seeds)
            ]
        results = {}
        for name, runs in finals.items():
            results[name] = [run.result() for run in runs]
            losses = ", ".join("diverged" if run["loss"] is None else f"{run['loss']:.4f}" for run in results[name])
            tell(f"{name}: validation loss {losses}")
    except KeyboardInterrupt:
        done = len(list(folder.glob("*.json")))
        pool.kill()
        raise RunInterruptedError(f"interrupted after {done} runs; --resume goes on from there") from None
    finally:
        pool.stop()  # what failed in one run must not wait for the others
    content = {
        "what": "validation loss (nats per token) of methods at equal data, tokens, shape and tuning effort",
        "recipe": recipe.to_dict(),
        "options": asdict(options),
        "run": describe_run(),
        "tuning": tuning,
        "data": _described(prepared.statistics),
        "methods": {name: summarize(name, recipes[name], found[name], results[name]) for name in options.methods},
    }
    write_json(output_dir / "compare.json", content)
    (output_dir / "compare.md").write_text(f"# {recipe.name}\n\n{markdown_table(content)}\n", encoding="utf-8")
    draw(content, output_dir / "compare.png")
    return content


# ------------------------------------------------------------------------------------------------------- one run


def recipe_of(method: str, base: Recipe) -> dict[str, Any]:
    """The base recipe as a mapping, changed to this method. Raises ConfigError."""
    contender = CONTENDERS[method]
    content = base.to_dict()
    content["model"] = {**content["model"], **contender.model}
    if contender.equal_parameters:
        content["model"].pop("rank_pattern", None)
        content["model"]["rank"] = equal_rank(base, contender.model["factorization"])
    if contender.optim is not None:
        rank = content["model"].get("rank") or build_model_config(base).hidden_size // 4
        content["training"] |= {
            "optim": contender.optim,
            "optim_args": f"rank={rank}, update_proj_gap=200, scale={0.25 if method == 'galore' else 1.0}",
            "optim_target_modules": rf".*\.({'|'.join(map(re.escape, _modules(base)))})",
        }
    return content


def _modules(base: Recipe) -> list[str]:
    """Where the positions of the base's blocks lie, "self_attn.q_proj" and so on."""
    config = build_model_config(base)
    places = (place for layer in range(config.num_hidden_layers) for place in config.positions(layer).values())
    return list(dict.fromkeys(place.module for place in places))


def equal_rank(base: Recipe, factorization: str) -> int:
    """The rank with which this factorization comes closest to CR-Net's parameters, embeddings and head aside."""

    def body(**changes: Any) -> int:
        content = base.to_dict()
        content["model"] = {**content["model"], **changes}
        counts = count_parameters(build_model_config(build_recipe(content)))
        return sum(counts.values()) - counts["embeddings"] - counts["head"]

    wanted = body(factorization="cross_layer")
    at = {rank: body(factorization=factorization, rank=rank, rank_pattern={}) for rank in (1, 2)}
    slope = at[2] - at[1]  # parameters are linear in the rank
    return max(1, round(1 + (wanted - at[1]) / slope))


def start_rates(method: str, recipe: dict[str, Any]) -> dict[str, float]:
    """Where the search starts: the recipe's own rates."""
    rate = float(recipe["training"].get("learning_rate", 5e-5))
    return {kind: rate * recipe["parameter_groups"][FACTORS[kind]] for kind in CONTENDERS[method].rates}


def content_of(job: Job) -> dict[str, Any]:
    """The recipe of one run."""
    content = {**job.recipe, "parameter_groups": dict(job.recipe["parameter_groups"])}
    training = dict(content["training"])
    learning_rate = float(training.get("learning_rate", 5e-5))
    content["parameter_groups"] |= {FACTORS[kind]: rate / learning_rate for kind, rate in job.rates.items()}
    if "low_rank" in job.rates:  # beta follows A and B, as in the recipe
        factors = job.recipe["parameter_groups"]
        ratio = factors["beta_lr_factor"] / (factors["low_rank_lr_factor"] or 1.0)
        content["parameter_groups"]["beta_lr_factor"] = job.rates["low_rank"] / learning_rate * ratio
    warmup = training.get("warmup_steps", 0)
    if warmup >= 1:
        training["warmup_steps"] = round(warmup * job.steps / training["max_steps"])
    training |= {
        "max_steps": job.steps,
        "seed": job.seed,
        "data_seed": job.seed,
        "eval_strategy": "steps",
        "eval_steps": max(1, job.steps // CURVE_POINTS) if job.whole_validation else job.steps + 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    for name in ("save_steps", "eval_on_start", "load_best_model_at_end"):
        training.pop(name, None)
    return {**content, "training": training}


def run_once(job: Job, folder: Path) -> dict[str, Any]:
    """One run; read from its file if it has been made before. A loss of None: the run diverged."""
    path = folder / f"{job.key}.json"
    before = read_json(path)
    if before is not None:
        return before
    if not torch.cuda.is_available():
        torch.set_num_threads(job.threads)
    recipe = build_recipe(content_of(job))
    prepared = prepare_data(recipe.data)
    config = build_model_config(recipe, prepared.tokenizer)
    clock = _Clock(job.threads)
    with tempfile.TemporaryDirectory() as unused:
        arguments = build_arguments(recipe, Path(unused))
        trainer = PretrainTrainer(
            model=build_model(config, job.seed),
            args=arguments,
            train_dataset=prepared.train,
            eval_dataset=_first(prepared.validation, job.validation_blocks),
            processing_class=prepared.tokenizer,
            data_collator=default_data_collator,
            parameter_groups=recipe.parameter_groups,
            block_size=recipe.data.block_size,
        )
        trainer.add_callback(clock)
        trainer.remove_callback(LogLines)  # a line a run is enough
        try:
            trainer.train()
            if job.whole_validation:
                trainer.eval_dataset = prepared.validation
                trainer.validation_bytes = prepared.statistics.validation.bytes
            metrics = trainer.evaluate()
        except TrainingError as error:
            if "not finite" not in str(error):
                raise
            metrics = {}
    result = {
        "method": job.method,
        "rates": job.rates,
        "seed": job.seed,
        "steps": job.steps,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "loss": metrics.get("eval_loss"),
        "perplexity": metrics.get("eval_perplexity"),
        "bits_per_byte": metrics.get("eval_bits_per_byte"),
        "seconds": round(clock.seconds, 2),
        "curve": clock.curve,
        "parameters": count_parameters(config),
        "flops_per_token": training_flops_per_token(config, recipe.data.block_size),
        "peak_memory_bytes": estimate_memory(
            config, training_step(arguments, recipe.data.block_size), training_method(config, arguments)
        ),
    }
    write_json(path, result)
    loss = "diverged" if result["loss"] is None else f"{result['loss']:.4f}"
    _log.info("%s, %s, seed %d, %d steps: %s", job.method, _shown(job.rates), job.seed, job.steps, loss)
    return result


class _Clock(TrainerCallback):
    """Seconds within training steps, and the curve. On a CPU CPU time over threads: other programs do not count."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []

    def _now(self, args) -> float:
        if args.device.type == "cpu":
            return time.process_time() / self.threads
        torch.get_device_module(args.device).synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.started = self._now(args)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds += self._now(args) - self.started

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        if metrics and (not self.curve or self.curve[-1]["step"] < state.global_step):
            self.curve.append(
                {
                    "step": state.global_step,
                    "tokens": int(state.num_input_tokens_seen),
                    "seconds": round(self.seconds, 2),
                    "loss": metrics["eval_loss"],
                }
            )


def _first(dataset: Any, blocks: int) -> Any:
    return dataset.select(range(min(len(dataset), blocks))) if hasattr(dataset, "select") else dataset.take(blocks)


# -------------------------------------------------------------------------------------------------------- tuning


def tune(make: Callable[..., Job], folder: Path, options: Options) -> dict[str, Any]:
    """{"rates": the best ones, "inside": whether each has a worse neighbour on both sides, "tried": every run}."""
    start = make(rates={})
    start_at = start_rates(start.method, start.recipe)
    if options.tuning_runs == 0:
        return {"rates": start_at, "inside": {}, "tried": []}

    def loss(rates: dict[str, float]) -> float:
        found = run_once(make(rates=rates), folder)["loss"]
        return float("inf") if found is None else found

    rates, tried = search_rates(start_at, loss, options.tuning_runs)
    return {
        "rates": rates,
        "inside": has_worse_neighbours(rates, tried),
        "tried": [
            {"rates": dict(zip(rates, key, strict=True)), "loss": None if value == float("inf") else value}
            for key, value in tried.items()
        ],
    }


def search_rates(
    start: dict[str, float], loss: Callable[[dict[str, float]], float], limit: int
) -> tuple[dict[str, float], dict[tuple[float, ...], float]]:
    """Coordinate search over factors of two, in the order of `start`, until a whole round changes nothing.

    Returns the best rates and the loss of everything tried; ends early after `limit` tries.
    """
    rates = dict(start)
    tried: dict[tuple[float, ...], float] = {}

    def at(candidate: dict[str, float]) -> float:
        key = tuple(candidate.values())
        if key not in tried:
            if len(tried) >= limit:
                return float("inf")
            tried[key] = loss(candidate)
        return tried[key]

    at(rates)
    changed = True
    while changed:
        changed = False
        for kind in start:
            for factor in (0.5, 2.0):
                while at(neighbour := {**rates, kind: rates[kind] * factor}) < at(rates):
                    rates, changed = neighbour, True
    return rates, tried


def has_worse_neighbours(rates: dict[str, float], tried: dict[tuple[float, ...], float]) -> dict[str, bool]:
    """Whether each rate was tried at half and at twice its value, and was no better there."""
    best = tried[tuple(rates.values())]

    def worse(kind: str, factor: float) -> bool:
        return tried.get(tuple({**rates, kind: rates[kind] * factor}.values()), float("-inf")) >= best

    return {kind: worse(kind, 0.5) and worse(kind, 2.0) for kind in rates}


class _Pool:
    """Processes where there are several workers, calls at once where there is one."""

    def __init__(self, workers: int, initializer: Callable[[], None] | None) -> None:
        self.executor = None
        self.others = set(active_children())
        if workers > 1:
            with without_interrupts():
                self.executor = ProcessPoolExecutor(workers, get_context("spawn"), initialize_worker, (initializer,))

    def submit(self, function: Callable, *arguments: Any) -> Any:
        if self.executor is not None:
            with without_interrupts():  # a worker may start here
                return self.executor.submit(function, *arguments)
        return _Done(function(*arguments))

    def kill(self) -> None:
        """End the workers in the middle of their runs."""
        if self.executor is not None:
            for process in set(active_children()) - self.others:
                process.kill()

    def stop(self) -> None:
        if self.executor is not None:
            self.executor.shutdown(wait=False, cancel_futures=True)


@dataclass
class _Done:
    value: Any

    def result(self) -> Any:
        return self.value


# -------------------------------------------------------------------------------------------------------- report


def summarize(method: str, recipe: dict[str, Any], found: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One method's part of compare.json. Means and spreads are None if a seed diverged."""
    counts = runs[0]["parameters"]
    losses = [run["loss"] for run in runs]
    complete = None not in losses
    return {
        "label": METHODS[method],
        "model": recipe["model"],
        "rates": found["rates"],
        "rates_inside_grid": found["inside"],
        "tuning": found["tried"],
        "parameters": sum(counts.values()),
        "parameters_without_embeddings": sum(counts.values()) - counts["embeddings"] - counts["head"],
        "flops_per_token": runs[0]["flops_per_token"],
        "peak_memory_bytes": runs[0]["peak_memory_bytes"],
        "losses": losses,
        "loss_mean": statistics.mean(losses) if complete else None,
        "loss_stdev": statistics.stdev(losses) if complete and len(losses) > 1 else None,
        "perplexity": statistics.mean(run["perplexity"] for run in runs) if complete else None,
        "bits_per_byte": statistics.mean(run["bits_per_byte"] for run in runs) if complete else None,
        "seconds": statistics.median(run["seconds"] for run in runs),
        "curves": [run["curve"] for run in runs],
    }


def markdown_table(content: dict[str, Any]) -> str:
    """The final table."""
    lines = [
        "| method | parameters | without embeddings | peak memory | FLOPs/token | seconds | validation loss | "
        "perplexity | bits per byte |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in content["methods"].values():
        loss, others = "diverged", ["", ""]
        if row["loss_mean"] is not None:
            spread = "" if row["loss_stdev"] is None else f" ± {row['loss_stdev']:.4f}"
            loss = f"{row['loss_mean']:.4f}{spread}"
            others = [f"{row['perplexity']:.2f}", f"{row['bits_per_byte']:.3f}"]
        cells = [
            row["label"],
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['parameters_without_embeddings'] / 1e6:.2f}M",
            f"{sum(row['peak_memory_bytes'].values()) / 2**20:,.0f} MiB",
            f"{row['flops_per_token'] / 1e6:,.1f}M",
            f"{row['seconds']:,.0f}",
            loss,
            *others,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


COLOURS = ("#444444", "#1b5e9e", "#7a3fa0", "#d1660a", "#5a8f3a", "#b02a50", "#2a8f8f")


def draw(content: dict[str, Any], path: Path) -> bool:
    """Validation loss against tokens, operations and seconds: the mean of the seeds, their range shaded.

    False, and no file, without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11.0, 4.6), dpi=130, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    labels = ("tokens seen (millions)", "operations, forward and backward (10¹²)", "seconds within training steps")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats per token)")
    ends = []
    for name, colour in zip(CONTENDERS, COLOURS, strict=True):
        row = content["methods"].get(name)
        if row is None or row["loss_mean"] is None:
            continue
        points = list(zip(*row["curves"], strict=True))
        losses = [[run["loss"] for run in point] for point in points]
        tokens = [point[0]["tokens"] for point in points]
        horizontal = (
            [t / 1e6 for t in tokens],
            [t * row["flops_per_token"] / 1e12 for t in tokens],
            [statistics.median(run["seconds"] for run in point) for point in points],
        )
        means = [statistics.mean(values) for values in losses]
        ends.append(means)
        spread = "" if row["loss_stdev"] is None else f" ± {row['loss_stdev']:.3f}"
        label = f"{row['label']}, {row['parameters_without_embeddings'] / 1e6:.2f}M: {row['loss_mean']:.3f}{spread}"
        for axes, x in zip(panels, horizontal, strict=True):
            axes.plot(x, means, color=colour, linewidth=1.3, label=label)
            axes.fill_between(x, [min(v) for v in losses], [max(v) for v in losses], color=colour, alpha=0.2, lw=0)
    if ends:  # the first point is far above the rest and would flatten it
        low, high = min(min(means) for means in ends), max(means[min(1, len(means) - 1)] for means in ends)
        panels[0].set_ylim(low - 0.05 * (high - low + 0.1), high + 0.1 * (high - low + 0.1))
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        title="parameters without embeddings, final loss on the whole validation split",
    )
    figure.savefig(path)
    return True


def _described(statistics_: DataStatistics) -> dict[str, Any]:
    return {k: v for k, v in asdict(statistics_).items() if k not in ("cache_path", "cache_hit")}


def _shown(rates: dict[str, float]) -> str:
    return ", ".join(f"{kind} {rate:.2g}" for kind, rate in rates.items())


__all__: Sequence[str] = ["CONTENDERS", "Options", "compare", "has_worse_neighbours", "search_rates"]
