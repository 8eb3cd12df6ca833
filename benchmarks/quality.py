"""Quality at equal tokens: dense, CR-Net, CoLA and plain low rank, each with its own tuned learning rates.

    python benchmarks/quality.py --train train.jsonl.gz --validation valid.jsonl.gz

Same shape, tokenizer, data order and number of tokens for every method. Learning rates of embeddings, full-rank
matrices and low-rank factors are tuned apart, one after the other, by short runs on a grid of factors of two that is
extended until the best value has a worse neighbour on both sides. Then every method trains with its best rates and
three seeds. Each run is one JSON in the work folder, so that the script goes on where it stopped; the summary is
benchmarks/results/quality.json. Two runs at a time, one thread each.
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two runs at a time on two cores

SHAPE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 3}
BLOCK_SIZE, BATCH_SIZE, VOCABULARY = 256, 4, 2048
TUNING_STEPS, FINAL_STEPS = 250, 800
TUNING_SEED, FINAL_SEEDS = 100, (0, 1, 2)
TUNING_VALIDATION_BLOCKS = 148
MAX_TUNING_RUNS = 16

# Ranks: CR-Net h/4, the others so that the parameters without embeddings and head are equal to CR-Net's.
METHODS = {
    "dense": {"factorization": "dense"},
    "crnet": {"factorization": "cross_layer", "rank": 48},
    "cola": {"factorization": "cola", "rank": 60},
    "low_rank": {"factorization": "low_rank", "rank": 60},
    "crnet_silu": {"factorization": "cross_layer", "rank": 48, "increment_activation": "silu"},
}
RATES = {
    "dense": ("embedding", "full_rank"),
    "crnet": ("embedding", "full_rank", "low_rank"),
    "cola": ("embedding", "low_rank"),
    "low_rank": ("embedding", "low_rank"),
    "crnet_silu": ("embedding", "full_rank", "low_rank"),
}
START = {"embedding": 8e-3, "full_rank": 5e-4, "low_rank": 1e-3}
BASE_RATE = 1e-3  # learning_rate of the run: norms; every group has a factor on it


def build(method: str, rates: dict[str, float], seed: int, steps: int, options):
    from crosslayer.train import build_recipe

    return build_recipe(
        {
            "name": f"quality_{method}",
            "model": {**SHAPE, **METHODS[method]},
            "data": {
                "data": str(options.train),
                "validation_data": str(options.validation),
                "tokenizer_vocab_size": VOCABULARY,
                "block_size": BLOCK_SIZE,
                "cache_dir": str(options.work / "cache"),
            },
            "parameter_groups": {
                "embedding_lr_factor": rates["embedding"] / BASE_RATE,
                "full_rank_lr_factor": rates.get("full_rank", 0.0) / BASE_RATE,
                "low_rank_lr_factor": rates.get("low_rank", 0.0) / BASE_RATE,
                "beta_lr_factor": rates.get("beta", rates.get("low_rank", 0.0)) / BASE_RATE,
            },
            "training": {
                "max_steps": steps,
                "per_device_train_batch_size": BATCH_SIZE,
                "per_device_eval_batch_size": BATCH_SIZE,
                "learning_rate": BASE_RATE,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
                "warmup_steps": steps // 10,
                "adam_beta2": 0.98,
                "max_grad_norm": 1.0,
                "logging_steps": 20,
                "save_strategy": "no",
                "eval_strategy": "no",
                "seed": seed,
                "data_seed": seed,
                "use_cpu": True,
            },
        }
    )


def train(method: str, rates: dict[str, float], seed: int, steps: int, options) -> dict:
    """One run; read from its file if it has been made before."""
    key = {"method": method, "model": METHODS[method], "shape": SHAPE, "rates": rates, "seed": seed, "steps": steps}
    path = options.work / "runs" / (hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16] + ".json")
    if path.exists():
        return json.loads(path.read_text())

    import torch

    torch.set_num_threads(1)
    from transformers import default_data_collator

    from crosslayer.accounting import count_parameters
    from crosslayer.cli.common import quiet_libraries
    from crosslayer.data import prepare_data
    from crosslayer.train.run import build_arguments, build_model, build_model_config
    from crosslayer.train.trainer import PretrainTrainer

    quiet_libraries()
    recipe = build(method, rates, seed, steps, options)
    prepared = prepare_data(recipe.data)
    config = build_model_config(recipe, prepared.tokenizer)
    arguments = build_arguments(recipe, options.work / "unused")
    arguments.disable_tqdm = True
    validation, utf8_bytes = prepared.validation, prepared.statistics.validation.bytes
    if steps == TUNING_STEPS:
        validation, utf8_bytes = validation.select(range(min(len(validation), TUNING_VALIDATION_BLOCKS))), None
    trainer = PretrainTrainer(
        model=build_model(config, seed),
        args=arguments,
        train_dataset=prepared.train,
        eval_dataset=validation,
        processing_class=prepared.tokenizer,
        data_collator=default_data_collator,
        parameter_groups=recipe.parameter_groups,
        block_size=BLOCK_SIZE,
        validation_bytes=utf8_bytes,
    )
    started = time.process_time()
    try:
        trainer.train()
        metrics = trainer.evaluate()
    except Exception as error:  # a rate that diverges is a result, too
        if "not finite" not in str(error):
            raise
        metrics = {"eval_loss": float("inf")}
    result = {
        **key,
        "tokens": steps * BATCH_SIZE * BLOCK_SIZE,
        "parameters": count_parameters(config),
        "loss": metrics["eval_loss"],
        "perplexity": metrics.get("eval_perplexity"),
        "bits_per_byte": metrics.get("eval_bits_per_byte"),
        "cpu_seconds": round(time.process_time() - started, 1),
        "curve": [(line["step"], round(line["loss"], 4)) for line in trainer.state.log_history if "loss" in line],
        "beta": {
            k: v
            for k, v in (trainer.state.log_history[-3] if len(trainer.state.log_history) > 2 else {}).items()
            if k.startswith("beta")
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result))
    temporary.rename(path)
    return result


def tune(method: str, options) -> tuple[dict[str, float], dict[str, bool], list[dict]]:
    """Best learning rates of a method, whether each has a worse neighbour on both sides, and every tuning run."""
    from crosslayer.compare import has_worse_neighbours, search_rates

    runs: list[dict] = []

    def loss(rates: dict[str, float]) -> float:
        runs.append(train(method, rates, TUNING_SEED, TUNING_STEPS, options))
        print(f"{method:10s} {rates} -> {runs[-1]['loss']:.4f}", file=sys.stderr, flush=True)
        return runs[-1]["loss"]

    # The embeddings first: their rate matters most.
    order = sorted(RATES[method], key=("embedding", "low_rank", "full_rank").index)
    rates, tried = search_rates({kind: START[kind] for kind in order}, loss, MAX_TUNING_RUNS)
    return rates, has_worse_neighbours(rates, tried), runs


def finals(method: str, rates: dict[str, float], seed: int, options) -> dict:
    result = train(method, rates, seed, FINAL_STEPS, options)
    print(f"{method:10s} seed {seed} -> {result['loss']:.4f}", file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality.json")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    for path in (options.train, options.validation):
        if not path.is_file():
            parser.error(f"{path} does not exist")

    started = time.time()
    from crosslayer.data import prepare_data
    from crosslayer.provenance import describe_run

    prepared = prepare_data(build("crnet", START, 0, FINAL_STEPS, options).data)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        searches = {pool.submit(tune, method, options): method for method in options.methods}
        tuned = {}
        runs = {}
        for search in as_completed(searches):
            method = searches[search]
            tuned[method] = search.result()
            rates = tuned[method][0]
            runs[method] = [pool.submit(finals, method, rates, seed, options) for seed in FINAL_SEEDS]
        results = {method: [run.result() for run in runs[method]] for method in options.methods}

    summary = {}
    for method, outcomes in results.items():
        rates, inside, tuning = tuned[method]
        losses = [outcome["loss"] for outcome in outcomes]
        parameters = outcomes[0]["parameters"]
        summary[method] = {
            "model": METHODS[method],
            "rates": rates,
            "rates_inside_grid": inside,
            "tuning": [{"rates": run["rates"], "loss": run["loss"]} for run in tuning],
            "parameters": sum(parameters.values()),
            "parameters_without_embeddings": sum(parameters.values()) - parameters["embeddings"] - parameters["head"],
            "losses": losses,
            "loss_mean": statistics.mean(losses),
            "loss_stdev": statistics.stdev(losses),
            "perplexities": [outcome["perplexity"] for outcome in outcomes],
            "bits_per_byte": [outcome["bits_per_byte"] for outcome in outcomes],
            "cpu_seconds": statistics.median(outcome["cpu_seconds"] for outcome in outcomes),
            "beta": [outcome["beta"] for outcome in outcomes],
            "curves": [outcome["curve"] for outcome in outcomes],
        }
    content = {
        "what": "validation loss (nats per token) at equal tokens, learning rates tuned per method",
        "shape": SHAPE,
        "tokens": FINAL_STEPS * BATCH_SIZE * BLOCK_SIZE,
        "tuning": {"steps": TUNING_STEPS, "seed": TUNING_SEED, "validation_blocks": TUNING_VALIDATION_BLOCKS},
        "final": {"steps": FINAL_STEPS, "seeds": FINAL_SEEDS},
        "data": {
            "train": {"file": options.train.name, "sha256": sha256(options.train)},
            "validation": {"file": options.validation.name, "sha256": sha256(options.validation)},
            "vocabulary": prepared.statistics.vocab_size,
            "validation_tokens": prepared.statistics.validation.tokens,
        },
        "run": describe_run("python benchmarks/quality.py --train FILE --validation FILE"),
        "wall_seconds_of_this_call": round(time.time() - started),
        "methods": summary,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    draw(content, options.out.with_suffix(".png"))
    print_table(content)


def print_table(content: dict) -> None:
    print("| method | parameters without embeddings | validation loss (3 seeds) | perplexity | bits per byte | rates |")
    print("|---|---|---|---|---|---|")
    for method, row in content["methods"].items():
        rates = ", ".join(f"{kind} {rate:g}" for kind, rate in row["rates"].items())
        print(
            f"| {method} | {row['parameters_without_embeddings'] / 1e6:.2f}M | {row['loss_mean']:.3f} ± "
            f"{row['loss_stdev']:.3f} | {statistics.mean(row['perplexities']):.2f} | "
            f"{statistics.mean(row['bits_per_byte']):.3f} | {rates} |"
        )


def draw(content: dict, path: Path) -> None:
    """Training loss against tokens, mean over the seeds, one line a method."""
    from matplotlib.figure import Figure

    names = {"crnet": "CR-Net", "dense": "dense", "cola": "CoLA", "low_rank": "plain low rank"}
    names["crnet_silu"] = "CR-Net, silu in the increment"
    tokens_per_step = BATCH_SIZE * BLOCK_SIZE
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for method, row in content["methods"].items():
        steps = [step for step, _ in row["curves"][0]]
        losses = [statistics.mean(curve[i][1] for curve in row["curves"]) for i in range(len(steps))]
        size = row["parameters_without_embeddings"] / 1e6
        axes.plot(
            [step * tokens_per_step / 1e6 for step in steps],
            losses,
            linewidth=1.3,
            label=f"{names[method]}, {size:.2f}M: {row['loss_mean']:.3f}",
        )
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_ylim(top=7.0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, title="parameters without embeddings, final validation loss")
    figure.savefig(path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
