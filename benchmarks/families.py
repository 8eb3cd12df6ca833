"""Choices that the paper leaves open in today's families, at about 1M parameters: what carries, and what it is worth.

    python benchmarks/families.py --train train.jsonl.gz --validation valid.jsonl.gz
    OMP_NUM_THREADS=2 python benchmarks/families.py --cost 15

Within a study every contender has the same shape, tokenizer, data order and number of tokens; variants of CR-Net differ
in what carries, and so only in the number of betas. Rates are tuned for dense and CR-Net on Llama's and on GPT-2's
block, by runs as long as the others; the other studies take those of Llama. (Runs of a quarter of that length wanted
rates at which the matrices hardly learn.) All contenders run with the first seed; those that are clearly worse there
(2 % of perplexity behind the best variant) get no further seeds. One run at a time, on one thread; each is a record in
the result file, so that the script goes on where it stopped.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from result_file import ResultFile

RESULTS = Path(__file__).parent / "results" / "families.json"
BLOCK_SIZE, BATCH_SIZE, VOCABULARY = 256, 4, 2048
STEPS = 300
SEEDS, TUNING_SEED = (0, 1, 2), 100
CLEARLY_WORSE = 1.02
BASE_RATE, EMBEDDING_RATE = 1e-3, 8e-3
MOST_STEPS = 5
START = {"full_rank": 5e-4, "low_rank": 1e-3}

WIDTHS = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
MOE = {"moe_intermediate_size": 96, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32}
DENSE = {"factorization": "dense"}


@dataclass(frozen=True)
class Study:
    """Contenders by name: fields of the configuration. Without `tunes` the rates are those found on Llama's block."""

    base: dict[str, Any]
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)
    tunes: bool = False


STUDIES = {
    "llama": Study(
        {"model_type": "llama", **WIDTHS, "intermediate_size": 344},
        {"dense": DENSE, "CR-Net": {}},
        tunes=True,
    ),
    "gpt2": Study(
        {"model_type": "gpt2", **WIDTHS, "n_inner": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        {"dense": DENSE, "CR-Net": {}},
        tunes=True,
    ),
    "moe": Study(
        {"model_type": "qwen3_moe", **WIDTHS, **MOE, "num_key_value_heads": 4, "num_experts": 8, "head_dim": 32},
        {"dense": DENSE, "the mixture carries": {}, "the mixture does not carry": {"carries": {"experts": False}}},
    ),
    "shared_expert": Study(
        {
            "model_type": "deepseek_v3",
            **WIDTHS,
            **MOE,
            **LATENT,
            "intermediate_size": 344,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
        },
        {
            "mixture and shared expert carry": {},
            "the shared expert carries": {"carries": {"experts": False}},
            "neither carries": {
                "carries": dict.fromkeys(("experts", "shared_gate", "shared_up", "shared_down"), False)
            },
        },
    ),
    "latent_attention": Study(
        {
            "model_type": "deepseek_v3",
            **WIDTHS,
            **LATENT,
            "intermediate_size": 344,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 6,
        },
        {
            "dense": DENSE,
            "all but kv_b carry": {},
            "all carry": {"carries": {"kv_b": True}},
            "q_a and kv_a carry": {"carries": {"q_b": False}},
            "q_b and kv_b carry": {"carries": {"q_a": False, "kv_a": False, "kv_b": True}},
            "none of the four carries": {"carries": {"q_a": False, "q_b": False, "kv_a": False}},
        },
    ),
}


def recipe_of(study: Study, fields: dict, rates: dict[str, float], seed: int, options):
    from crosslayer.train import build_recipe

    full_rank = rates["full_rank"]
    return build_recipe(
        {
            "name": "families",
            "model": {"base": study.base, **fields},
            "data": {
                "data": str(options.train),
                "validation_data": str(options.validation),
                "tokenizer_vocab_size": VOCABULARY,
                "block_size": BLOCK_SIZE,
                "cache_dir": str(options.work / "cache"),
            },
            "parameter_groups": {
                "embedding_lr_factor": EMBEDDING_RATE / BASE_RATE,
                "full_rank_lr_factor": full_rank / BASE_RATE,
                "low_rank_lr_factor": rates.get("low_rank", 0.0) / BASE_RATE,
                "beta_lr_factor": rates.get("low_rank", 0.0) / BASE_RATE,
            },
            "training": {
                "max_steps": STEPS,
                "per_device_train_batch_size": BATCH_SIZE,
                "per_device_eval_batch_size": BATCH_SIZE,
                "learning_rate": BASE_RATE,
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
            },
        }
    )


def train(study: Study, fields: dict, rates: dict[str, float], seed: int, options) -> dict[str, Any]:
    """Perplexity after one run, its parameters and its speed."""
    import torch

    torch.set_num_threads(1)
    from transformers import default_data_collator

    from crosslayer.cli.common import quiet_libraries
    from crosslayer.data import prepare_data
    from crosslayer.train.run import build_arguments, build_model, build_model_config
    from crosslayer.train.trainer import PretrainTrainer

    quiet_libraries()
    recipe = recipe_of(study, fields, rates, seed, options)
    prepared = prepare_data(recipe.data)
    config = build_model_config(recipe, prepared.tokenizer)
    arguments = build_arguments(recipe, options.work / "unused")
    arguments.disable_tqdm = True
    model = build_model(config, seed)
    trainer = PretrainTrainer(
        model=model,
        args=arguments,
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        processing_class=prepared.tokenizer,
        data_collator=default_data_collator,
        parameter_groups=recipe.parameter_groups,
        block_size=BLOCK_SIZE,
        validation_bytes=prepared.statistics.validation.bytes,
    )
    started = time.perf_counter()
    try:
        trainer.train()
        perplexity = trainer.evaluate()["eval_perplexity"]
    except Exception as error:
        if type(error).__name__ != "TrainingError":
            raise
        perplexity = float("inf")  # the rate was too high
    outside = {id(p) for p in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
    return {
        "perplexity": round(perplexity, 3),
        "parameters": model.num_parameters(),
        "parameters_without_embeddings": sum(p.numel() for p in model.parameters() if id(p) not in outside),
        "tokens": STEPS * BATCH_SIZE * BLOCK_SIZE,
        "seconds": round(time.perf_counter() - started, 1),
        "b": b_of(model),
    }


def b_of(model) -> dict[str, list[float]]:
    """b of every position, layer by layer."""
    found: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "beta"):
            place = re.sub(r"^.*?\.\d+\.", "", name)
            found.setdefault(place, []).append(round(module.b().item(), 3))
    return found


class Runs:
    """Runs of one study, read from the result file where they have been made."""

    def __init__(self, name: str, file: ResultFile, options) -> None:
        self.name, self.study, self.file, self.options = name, STUDIES[name], file, options

    def run(self, contender: str, rates: dict[str, float], seed: int) -> float:
        rate = " ".join(f"{group}={value:g}" for group, value in rates.items())
        key = f"{self.name}: {contender}, {rate}, seed {seed}"
        fields = self.study.contenders[contender]
        found = self.file.section(key, lambda: train(self.study, fields, rates, seed, self.options))
        return found["perplexity"]

    def tune(self, contender: str) -> dict[str, float]:
        """Rates with the lowest perplexity: of the factors, then of the full-rank matrices.

        In steps of two from `START` until the best one has a worse neighbour on both sides, or lies `MOST_STEPS` away:
        factors that hardly learn go on getting better by nothing.
        """
        groups = ("full_rank",) if contender == "dense" else ("low_rank", "full_rank")
        best = {group: START[group] for group in groups}
        for group in groups:
            tried: dict[float, float] = {}

            def perplexity(rate: float, group=group, tried=tried) -> float:
                if rate not in tried:
                    tried[rate] = self.run(contender, best | {group: rate}, TUNING_SEED)
                return tried[rate]

            rate, most = START[group], 2**MOST_STEPS
            while START[group] / most < rate < START[group] * most and (
                min(perplexity(rate / 2), perplexity(2 * rate)) < perplexity(rate)
            ):
                rate = rate / 2 if perplexity(rate / 2) < perplexity(2 * rate) else 2 * rate
            best[group] = rate
        return best

    def all(self) -> dict[str, Any]:
        names = list(self.study.contenders)
        variants = [name for name in names if name != "dense"]
        tuned = self if self.study.tunes else Runs("llama", self.file, self.options)
        rates = {name: tuned.tune("dense" if name == "dense" else "CR-Net") for name in names}
        first = {name: self.run(name, rates[name], SEEDS[0]) for name in names}
        best = min(first[name] for name in variants)
        found = {}
        for name in names:
            goes_on = name == "dense" or first[name] <= best * CLEARLY_WORSE
            seeds = SEEDS if goes_on else SEEDS[:1]
            perplexities = [self.run(name, rates[name], seed) for seed in seeds]
            found[name] = {
                "rates": rates[name],
                "perplexities": perplexities,
                "perplexity": round(statistics.mean(perplexities), 2),
                "stopped_early": not goes_on,
            }
        return found


COST_WIDTHS = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 2048}
COST_BASES = {
    "gpt2": {"model_type": "gpt2", "n_inner": 2048, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {"model_type": "llama", "intermediate_size": 1376},
}
COST_CONTENDERS = {
    "dense": DENSE,
    "CR-Net, none": {},
    "CR-Net, invert": {"recompute": "invert"},
}


def measure_cost(base: dict[str, Any], turns: int) -> dict[str, Any]:
    """Seconds of a training step (AdamW, 4 x 256 tokens, float32), contenders in turn; activations kept; parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    from crosslayer import crnet_config
    from crosslayer.analysis import measure_saved_activations

    ids = torch.randint(3, COST_WIDTHS["vocab_size"], (BATCH_SIZE, BLOCK_SIZE))
    steps, found = {}, {}
    for name, fields in COST_CONTENDERS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(crnet_config(base, **COST_WIDTHS, **fields)).train()
        model.fused_loss = True
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(model=model, optimizer=optimizer) -> float:
            started = time.perf_counter()
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - started

        saved = measure_saved_activations(model, ids)
        outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        found[name] = {
            "parameters_without_embeddings": sum(p.numel() for p in model.parameters() if id(p) not in outside),
            "kept_bytes_per_token_and_layer": round(sum(saved.layer_bytes[2:-1]) / saved.tokens / 5),
        }
        step()
        steps[name] = step
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            seconds[name].append(steps[name]())
    for name, times in seconds.items():
        ratios = [mine / dense for mine, dense in zip(times, seconds["dense"], strict=True)]
        found[name] |= {
            "seconds": round(statistics.median(times), 3),
            "of_dense": round(statistics.median(ratios), 3),
            "quartiles_of_dense": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
        }
    return {"threads": torch.get_num_threads(), "turns": turns, "contenders": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="training text: JSON lines with `text`")
    parser.add_argument("--validation", type=Path, help="validation text")
    parser.add_argument("--cost", type=int, metavar="TURNS", help="measure time and memory instead, in so many turns")
    parser.add_argument("--work", type=Path, default=Path("runs/families"), help="folder for the tokenised text")
    parser.add_argument("--output", type=Path, default=RESULTS, help="result file")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), metavar="STUDY")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    file = ResultFile(
        options.output, "Perplexity of variants of CR-Net in several families, see benchmarks/families.py"
    )
    if options.cost:
        for name, base in COST_BASES.items():
            print(
                json.dumps(file.section(f"cost: {name}", lambda base=base: measure_cost(base, options.cost)), indent=1)
            )
        return
    if options.train is None or options.validation is None:
        parser.error("--train and --validation are needed: the text to train on and to hold out")
    for name in options.studies:
        summary = Runs(name, file, options).all()
        file.content.setdefault("summary", {})[name] = summary
        file.save()
        print(json.dumps({name: summary}, indent=1), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
