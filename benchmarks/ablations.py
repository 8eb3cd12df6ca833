"""What each part of CR-Net is worth, and where its rank begins to hurt: about 0.3M parameters, 20 tokens for each.

    python benchmarks/ablations.py --train train.jsonl.gz --validation valid.jsonl.gz

The shape is dense 0.30M without embeddings (hidden 64, 6 layers); every contender reads 20 tokens per parameter of the
dense model, in the same order. The learning rates of each are searched by runs of a fifth of that, as `crosslayer
compare` does it, from those found for CR-Net; then three seeds. The rank sweep does the same for 0.1 h to 0.48 h (from
0.5 h on the factors of a square matrix are as large as it, and refused); its runs are those of `crosslayer pretrain`,
whose logs hold b and gradient norms. Every run is a file in the work folder and every contender a section of the
result, so that the script goes on where it stopped. About 6.5 hours of one core, 3.5 of them for the ablations; half of
that with --workers 2.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from result_file import ResultFile

RECIPE = "crnet_1m_text"
SHAPE = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 6, "num_attention_heads": 4, "rank": 16}
TOKENS_PER_PARAMETER, BATCH_SIZE = 20, 8
SEEDS, TUNING_SEED, TUNING_SHARE, TUNING_RUNS, BLOCKS = (0, 1, 2), 100, 5, 14, 64
MIDDLE_HIGH = {1: 10, 2: 18, 3: 24, 4: 18, 5: 10}  # the mean is the uniform rank
POSITIONS = ("q", "k", "v", "o", "gate", "up", "down")

ABLATIONS: dict[str, dict[str, Any]] = {
    "CR-Net": {},
    "b = 1, fixed": {"beta_trainable": False},
    "no carried term": {"carries": dict.fromkeys(POSITIONS, False)},
    "low-rank first layer": {"first_layer_rank": SHAPE["rank"]},
    "ranks middle high, ends low": {"rank_pattern": {rf"layers\.{layer}\..*": r for layer, r in MIDDLE_HIGH.items()}},
    "dense": {"factorization": "dense"},
}
"""Contender -> its changes to the model. Without a carried term the first layer stays full rank, and A and B start as
plain low rank's do: with B = 0 a layer would begin as nothing."""

RANKS = (6, 13, 19, 26, 31)
COMMAND = "python benchmarks/ablations.py --train FILE --validation FILE"


def base_content(options) -> dict[str, Any]:
    """The recipe of CR-Net, as a mapping."""
    from crosslayer.accounting import count_parameters, dense_counterpart
    from crosslayer.train import load_recipe
    from crosslayer.train.run import build_model_config

    texts = {"data": str(options.train), "validation_data": str(options.validation)}
    content = load_recipe(RECIPE, {**SHAPE, **texts, "per_device_train_batch_size": BATCH_SIZE}).to_dict()
    content["data"]["cache_dir"] = str(options.work / "cache")
    if options.smoke:
        content["data"] |= {"tokenizer_vocab_size": 300, "block_size": 32}
        steps = 6
    else:
        counts = count_parameters(dense_counterpart(build_model_config(as_recipe(content))))
        parameters = sum(counts.values()) - counts["embeddings"] - counts["head"]
        steps = round(TOKENS_PER_PARAMETER * parameters / (BATCH_SIZE * content["data"]["block_size"]))
    content["training"] |= {"max_steps": steps, "warmup_steps": steps // 10, "use_cpu": True, "bf16": False}
    content["training"] |= {"logging_steps": max(1, steps // 40), "disable_tqdm": True}
    return content


def as_recipe(content: dict[str, Any]):
    from crosslayer.train import build_recipe

    return build_recipe(content, ran=True)


def equal_rank(content: dict[str, Any]) -> int:
    """The rank in all layers, the first too, that comes closest to CR-Net's parameters."""
    from crosslayer.accounting import count_parameters
    from crosslayer.train.run import build_model_config

    def parameters(**changes) -> int:
        model = {**content["model"], **changes}
        return sum(count_parameters(build_model_config(as_recipe({**content, "model": model}))).values())

    ranks = range(1, SHAPE["hidden_size"] // 2)
    return min(ranks, key=lambda r: abs(parameters(rank=r, first_layer_rank=r) - parameters()))


def content_for(changes: dict[str, Any], base: dict[str, Any], rates: dict[str, float] | None) -> dict[str, Any]:
    """The base with a contender's changes, its search to start at `rates`."""
    from crosslayer.compare.recipes import FACTORS

    content = {**base, "model": {**base["model"], **changes}}
    if changes.get("factorization") == "dense":
        del content["model"]["rank"]
    factors = {FACTORS[kind]: rate / base["training"]["learning_rate"] for kind, rate in (rates or {}).items()}
    return {**content, "parameter_groups": {**base["parameter_groups"], **factors}}


def rates_of(given: Sequence[float] | None, begun: ResultFile) -> dict[str, float]:
    """The rates of a study that starts from CR-Net's: of embeddings, factors and full-rank matrices as given on the
    command line, else as this script found them; those that the study has `begun` with, once it has."""
    rates = dict(zip(("embedding", "low_rank", "full_rank"), given, strict=True)) if given else None
    if "settings" in begun:
        known = begun["settings"]["rates"]
        if rates not in (None, known):
            sys.exit(f"{begun.path.name} was begun with the rates {known}; leave --rates out, or give another --out")
        return known
    if rates is not None:
        return rates
    path = Path(__file__).parent / "results" / "ablations.json"
    found = ResultFile(path, "")
    if "CR-Net" not in found:
        sys.exit(f"{path.name} has no rates of CR-Net; run ablations.py first, or give --rates 0.032 0.004 0.0008")
    return found["CR-Net"]["result"]["rates"]


def study_parser(description: str | None, name: str, results: Path, *, rates: bool = True) -> argparse.ArgumentParser:
    """The command line of a study of this shape and text whose tables stand in docs/ablations.md."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--validation", type=Path)
    if rates:
        parser.add_argument("--rates", type=float, nargs=3, help="of embeddings, factors and full-rank matrices")
    parser.add_argument("--work", type=Path, default=Path("runs") / name)
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--smoke", action="store_true", help="a few steps each")
    parser.add_argument("--write", action="store_true", help="write what is measured into docs/ablations.md")
    return parser


def begin(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with a line where a text is missing; then one thread, and libraries that say no more than they must."""
    import torch

    from crosslayer.cli.common import quiet_libraries

    for path in (options.train, options.validation):
        if path is None or not path.is_file():
            parser.error("give --train and --validation" if path is None else f"{path} does not exist")
    torch.set_num_threads(1)
    quiet_libraries()


def tuned(content: dict[str, Any], options):
    """(what the search for the contender's rates found, seed -> the run with them)."""
    from crosslayer.compare import Job, Options
    from crosslayer.compare.tuning import tune

    method = "dense" if content["model"].get("factorization") == "dense" else "crnet"
    job = partial(Job, method=method, recipe=content, validation_blocks=BLOCKS)
    steps = content["training"]["max_steps"]
    search = partial(job, seed=TUNING_SEED, steps=max(1, steps // TUNING_SHARE), whole_validation=False)
    runs = 2 if options.smoke else TUNING_RUNS
    found = tune(search, folder_of_runs(options), Options(methods=(method,), tuning_runs=runs))
    return found, {seed: job(rates=found["rates"], seed=seed, steps=steps, whole_validation=True) for seed in SEEDS}


def folder_of_runs(options) -> Path:
    folder = options.work / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def measure_ablation(content: dict[str, Any], options) -> dict[str, Any]:
    """A contender of `ABLATIONS`: what compare.json holds of a method."""
    from crosslayer.compare.report import summarize
    from crosslayer.compare.runs import run_once

    found, jobs = tuned(content, options)
    runs = [run_once(job, folder_of_runs(options)) for job in jobs.values()]
    return about(content, options) | {"result": summarize(runs[0]["method"], content, found, runs)}


def measure_rank(content: dict[str, Any], options) -> dict[str, Any]:
    """A rank of the sweep: losses, and what b and the gradients did."""
    found, jobs = tuned(content, options)
    runs = [follow(job, options) for job in jobs.values()]
    losses = [run["loss"] for run in runs]
    finished = [loss for loss in losses if loss is not None]
    return about(content, options) | {
        "rank_over_width": content["model"]["rank"] / SHAPE["hidden_size"],
        "rates": found["rates"],
        "rates_inside_grid": found["inside"],
        "tuning": found["tried"],
        "losses": losses,
        "loss_mean": statistics.mean(finished) if None not in losses else None,
        "loss_stdev": statistics.stdev(finished) if None not in losses else None,
        "perplexities": [run["perplexity"] for run in runs],
        "traces": [run["trace"] for run in runs],
    }


def about(content: dict[str, Any], options) -> dict[str, Any]:
    from crosslayer.accounting import count_parameters
    from crosslayer.train.run import build_model_config

    counts = count_parameters(build_model_config(as_recipe(content)))
    training, block_size = content["training"], content["data"]["block_size"]
    return {
        "recipe": RECIPE,
        "model": content["model"],
        "parameters_without_embeddings": sum(counts.values()) - counts["embeddings"] - counts["head"],
        "steps": training["max_steps"],
        "tokens": training["max_steps"] * training["per_device_train_batch_size"] * block_size,
        "seeds": list(SEEDS),
        "texts": {"train": options.train.name, "validation": options.validation.name},
    }


def follow(job, options) -> dict[str, Any]:
    """One run by `pretrain`: its loss (None: it diverged), and b and gradient norms over its steps."""
    from crosslayer.analysis.health import read_health
    from crosslayer.compare.runs import content_of
    from crosslayer.errors import TrainingError
    from crosslayer.train.run import pretrain
    from crosslayer.train.run_folder import read_json, write_json

    folder = options.work / f"rank_{job.recipe['model']['rank']}_{job.key}"
    path = folder.with_suffix(".json")
    if path.is_file():
        return read_json(path)
    content = content_of(job)
    content["training"] |= {"eval_strategy": "no"}
    try:
        after = pretrain(as_recipe(content), folder, overwrite=folder.exists()).after
    except TrainingError as error:
        if "not finite" not in str(error):
            raise
        after = {}
    result = {"loss": after.get("eval_loss"), "perplexity": after.get("eval_perplexity")}
    result["trace"] = [condensed(line) for line in read_health(folder)[0]]
    write_json(path, result)
    return result


def condensed(line: dict[str, Any]) -> dict[str, Any]:
    """A line of health.jsonl: the range of b, and the gradient norm of all A and B of each layer from the second on."""
    values = [b for row in line["b"].values() for b in row]
    by_layer = zip(*line["gradient_norm"].values(), strict=True)
    return {
        "step": line["step"],
        "b": {"min": min(values), "mean": round(statistics.mean(values), 5), "max": max(values)},
        "gradient_norm": [float(f"{sum(x * x for x in norms) ** 0.5:.4g}") for norms in by_layer],
    }


def draw(results: ResultFile, path: Path) -> None:
    """Perplexity against the rank; b over the training; gradient norms by layer."""
    from matplotlib.figure import Figure

    sections = {rank: results[f"rank {rank}"] for rank in RANKS if f"rank {rank}" in results}
    figure = Figure(figsize=(12.0, 4.2), dpi=130, layout="constrained")
    loss, b, gradient = figure.subplots(1, 3)
    for rank, section in sections.items():
        known = [perplexity for perplexity in section["perplexities"] if perplexity is not None]
        share = section["rank_over_width"]
        (dots,) = loss.plot([share] * len(known), known, "o", label=f"r = {rank} = {share:.2f} h")
        colour = dots.get_color()
        points = list(zip(*section["traces"], strict=False))
        steps = [point[0]["step"] for point in points]
        b.plot(steps, [statistics.mean(t["b"]["mean"] for t in point) for point in points], color=colour)
        low, high = (
            [extreme(t["b"][of] for t in point) for point in points] for extreme, of in ((min, "min"), (max, "max"))
        )
        b.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
        layers = range(1, 1 + len(points[0][0]["gradient_norm"]))
        norms = [[t["gradient_norm"][layer - 1] for point in points for t in point] for layer in layers]
        gradient.semilogy(layers, [statistics.median(values) for values in norms], "o-", color=colour)
    for name, style in (("dense", "--"), ("CR-Net", ":")):
        if name in results and results[name]["result"]["perplexity"] is not None:
            loss.axhline(results[name]["result"]["perplexity"], color="0.4", ls=style, lw=1, label=name)
    for axes, x, y in (
        (loss, "rank over hidden size", "validation perplexity, one dot a seed"),
        (b, "step", "b of all layers and positions: mean, and range"),
        (gradient, "layer", "gradient norm of A and B, median over the run"),
    ):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
    loss.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--only", choices=("ablations", "ranks"), help="one of the two studies")
    parser.add_argument("--workers", type=int, default=1, help="contenders beside one another, a thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ablations.json")
    parser.add_argument("--smoke", action="store_true", help="a few steps each")
    options = parser.parse_args()
    begin(parser, options)
    from crosslayer.cli.common import quiet_libraries
    from crosslayer.compare.pool import Pool

    what = "validation loss (nats per token) of CR-Net without one of its parts, and by rank"
    results = ResultFile(options.out, what, command=COMMAND)
    base = base_content(options)
    results.section("CR-Net", partial(measure_ablation, content_for({}, base, None), options))
    rates = results["CR-Net"]["result"]["rates"]  # the others' searches start here
    wanted = {name: (measure_ablation, changes) for name, changes in ABLATIONS.items() if options.only != "ranks"}
    wanted |= {f"rank {rank}": (measure_rank, {"rank": rank}) for rank in RANKS if options.only != "ablations"}
    pool = Pool(min(options.workers, len(wanted)), quiet_libraries)
    try:
        calls = {
            name: partial(measure, content_for(changes, base, rates if name != "dense" else None), options)
            for name, (measure, changes) in wanted.items()
            if name not in results
        }
        begun = {name: pool.submit(call) for name, call in calls.items()} if options.workers > 1 else {}
        for name, call in calls.items():
            results.section(name, begun[name].result if name in begun else call)
    except KeyboardInterrupt:
        pool.kill()
        raise
    finally:
        pool.stop()
    if any(name.startswith("rank ") for name in results.content["sections"]):
        draw(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
