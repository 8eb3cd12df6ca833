"""Ranks from spectra against uniform ranks and middle-high, ends-low ones, at equal parameters: does choosing pay?

    python benchmarks/rank_suggestion.py --train train.jsonl.gz --validation valid.jsonl.gz

A probe, a CR-Net with twice the rank, is trained once; the spectra of its increments on held-out text and the number
of parameters that the uniform rank takes give the suggested ranks (`crosslayer analyze --suggest-ranks` does the same).
Then each choice trains with the same data, tokens, learning rates and three seeds that the probe did not use. Each run
is one JSON in the work folder, so that the script goes on where it stopped. About 25 minutes on one core.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

SHAPE = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 6, "num_attention_heads": 4}
UNIFORM_RANK, PROBE_RANK, PROBE_SEED, SEEDS = 32, 64, 100, (0, 1, 2)
MIDDLE_HIGH = {1: 20, 2: 36, 3: 48, 4: 36, 5: 20}  # the mean is the uniform rank
BLOCK_SIZE, BATCH_SIZE, VOCABULARY, STEPS = 256, 8, 2048, 400
VALIDATION_DOCUMENTS, SPECTRA_TOKENS = 30, 32_768
NAMES = {"uniform": "uniform", "middle_high": "middle high, ends low", "suggested": "from the spectra"}


def build(model: dict, seed: int, options):
    from crosslayer.train import build_recipe

    return build_recipe(
        {
            "name": "rank_suggestion",
            "model": {**SHAPE, **model},
            "data": {
                "data": str(options.train),
                "validation_data": str(options.validation),
                "max_validation_documents": VALIDATION_DOCUMENTS,
                "tokenizer_vocab_size": VOCABULARY,
                "block_size": BLOCK_SIZE,
                "cache_dir": str(options.work / "cache"),
            },
            # The rates that the quality study (docs/crnet.md) found for CR-Net: 3.2e-2, 2.5e-4 and 2e-3.
            "parameter_groups": {"embedding_lr_factor": 16.0, "full_rank_lr_factor": 0.125},
            "training": {
                "max_steps": STEPS,
                "per_device_train_batch_size": BATCH_SIZE,
                "per_device_eval_batch_size": BATCH_SIZE,
                "learning_rate": 2e-3,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
                "warmup_steps": STEPS // 10,
                "adam_beta2": 0.98,
                "max_grad_norm": 1.0,
                "logging_steps": 20,
                "save_strategy": "no",
                "eval_strategy": "no",
                "seed": seed,
                "data_seed": seed,
                "use_cpu": True,
                "disable_tqdm": True,
            },
        }
    )


def train(name: str, model: dict, seed: int, options) -> tuple[dict, object, object]:
    """One run -> (result, model, validation blocks); the last two are None where the result was on file."""
    path = options.work / f"{name}-{seed}.json"
    key = {"shape": SHAPE, "model": model, "seed": seed, "steps": STEPS}
    if path.exists():
        result = json.loads(path.read_text())
        if all(result[k] == v for k, v in key.items()):
            return result, None, None

    from transformers import default_data_collator

    from crosslayer.accounting import count_parameters
    from crosslayer.data import prepare_data
    from crosslayer.train.run import build_arguments, build_model, build_model_config
    from crosslayer.train.trainer import PretrainTrainer

    recipe = build(model, seed, options)
    prepared = prepare_data(recipe.data)
    config = build_model_config(recipe, prepared.tokenizer)
    trainer = PretrainTrainer(
        model=build_model(config, seed),
        args=build_arguments(recipe, options.work / "unused"),
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        processing_class=prepared.tokenizer,
        data_collator=default_data_collator,
        parameter_groups=recipe.parameter_groups,
        block_size=BLOCK_SIZE,
        validation_bytes=prepared.statistics.validation.bytes,
    )
    started = time.process_time()
    trainer.train()
    metrics = trainer.evaluate()
    result = {
        **key,
        "loss": metrics["eval_loss"],
        "perplexity": metrics["eval_perplexity"],
        "low_rank_parameters": count_parameters(config)["low_rank"],
        "tokens": STEPS * BATCH_SIZE * BLOCK_SIZE,
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    print(f"{name:12s} seed {seed}: {result['loss']:.4f} in {result['cpu_seconds']:.0f} s", file=sys.stderr, flush=True)
    write(path, result)
    return result, trainer.model, prepared.validation


def suggest(options) -> dict:
    """The suggested ranks and what they rest on: from the probe, once."""
    path = options.work / "suggestion.json"
    if path.exists():
        return json.loads(path.read_text())

    import torch

    from crosslayer.analysis.ranks import suggest_ranks
    from crosslayer.analysis.spectra import measure_spectra

    probe = {"rank": PROBE_RANK}
    result, model, validation = train("probe", probe, PROBE_SEED, options)
    if model is None:  # its spectra were not written: once more
        (options.work / f"probe-{PROBE_SEED}.json").unlink()
        result, model, validation = train("probe", probe, PROBE_SEED, options)
    blocks = torch.tensor(validation[: SPECTRA_TOKENS // BLOCK_SIZE]["input_ids"])
    spectra = measure_spectra(model.base_model, [{"input_ids": rows} for rows in blocks.split(8)])
    budget = UNIFORM_RANK * sum(x.in_features + x.width for x in spectra.linears if x.layer > 0)
    content = {"probe": result, **suggest_ranks(spectra, budget).to_dict()}
    write(path, content)
    return content


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/rank_suggestion"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rank_suggestion.json")
    options = parser.parse_args()
    for path in (options.train, options.validation):
        if not path.is_file():
            parser.error(f"{path} does not exist")

    import torch

    torch.set_num_threads(1)
    from crosslayer.cli.common import quiet_libraries
    from crosslayer.provenance import describe_run

    quiet_libraries()
    suggestion = suggest(options)
    choices = {
        "uniform": {"rank": UNIFORM_RANK},
        "middle_high": {"rank_pattern": {rf"layers\.{layer}\..*": rank for layer, rank in MIDDLE_HIGH.items()}},
        "suggested": {"rank_pattern": suggestion["rank_pattern"]},
    }
    results: dict[str, list[dict]] = {name: [] for name in choices}
    for seed in SEEDS:
        for name, model in choices.items():
            results[name].append(train(name, model, seed, options)[0])
    content = {
        "what": "validation loss (nats per token) of CR-Nets with equal numbers of parameters, by choice of ranks",
        "shape": SHAPE,
        "tokens": STEPS * BATCH_SIZE * BLOCK_SIZE,
        "seeds": SEEDS,
        "data": {"train": options.train.name, "validation": options.validation.name},
        "suggestion": suggestion,
        "choices": {
            name: {
                "model": choices[name],
                "low_rank_parameters": runs[0]["low_rank_parameters"],
                "losses": [run["loss"] for run in runs],
                "loss_mean": statistics.mean(run["loss"] for run in runs),
                "loss_stdev": statistics.stdev(run["loss"] for run in runs),
                "minus_uniform": [a["loss"] - b["loss"] for a, b in zip(runs, results["uniform"], strict=True)],
                "cpu_seconds": [run["cpu_seconds"] for run in runs],
            }
            for name, runs in results.items()
        },
        "run": describe_run("python benchmarks/rank_suggestion.py --train FILE --validation FILE"),
    }
    write(options.out, content)
    for name, row in content["choices"].items():
        print(
            f"| {NAMES[name]} | {row['low_rank_parameters']:,} | {row['loss_mean']:.4f} ± {row['loss_stdev']:.4f} | "
            f"{', '.join(f'{x:+.4f}' for x in row['minus_uniform'])} |"
        )


if __name__ == "__main__":
    main()
