"""LoR2C's claims (arXiv 2503.00572)."""

import statistics
from typing import Any

from crosslayer.accounting import lor2c_parameters, lora_parameters, named_shape

from .claim import LOR2C, Found, MissingError, Results, Values, claim, differs, listed, spread, untestable

GLUE = "python benchmarks/lor2c_minilm.py --glue DIR"
MINILM = "all-MiniLM-L6-v2, {rows} rows of each task ({tasks}), {seeds} seeds, rates searched for each"


class Encoder:
    """The runs of lor2c_minilm.json with the rate that each method's search chose."""

    def __init__(self, results: Results) -> None:
        content = results("lor2c_minilm.json")
        runs = [run for run in content["runs"] if run["method"] in content["methods"]]
        self.methods = list(content["methods"])
        tuning = max(run["seed"] for run in runs)
        self.rates: dict[str, float] = {}
        for name in self.methods:
            tried = [run for run in runs if run["method"] == name and run["seed"] == tuning]
            if tried:
                self.rates[name] = max(tried, key=metric)["learning_rate"]
        self.runs = [r for r in runs if r["seed"] != tuning and r["learning_rate"] == self.rates.get(r["method"])]
        self.tasks = list(dict.fromkeys(run["task"] for run in self.runs))
        self.seeds = sorted({run["seed"] for run in self.runs})
        rows = sorted({run["rows"] for run in self.runs})
        self.values: Values = {
            "rows": " or ".join(f"{number:,}" for number in rows),
            "tasks": ", ".join(TASKS[task] for task in self.tasks),
            "seeds": len(self.seeds),
        }

    def of(self, method: str, task: str | None = None) -> list[float]:
        """In percent, a number a seed: of one task, or the average over all."""
        own = [run for run in self.runs if run["method"] == method and task in (None, run["task"])]
        if len(own) != len(self.seeds) * (len(self.tasks) if task is None else 1):
            raise MissingError(f"lor2c_minilm.json: {method}")
        return [statistics.mean(100 * metric(run) for run in own if run["seed"] == seed) for seed in self.seeds]

    def size(self, method: str) -> int:
        own = [run["trained"] for run in self.runs if run["method"] == method]
        if not own:
            raise MissingError(f"lor2c_minilm.json: {method}")
        return own[-1]["adapter"] + own[-1]["base"]


TASKS = {"sst2": "SST-2", "cola": "CoLA", "mrpc": "MRPC", "rte": "RTE"}


def metric(run: dict[str, Any]) -> float:
    return next(value for name, value in run["metrics"].items() if name in ("accuracy", "matthews_correlation"))


def against(results: Results, method: str, other: str) -> tuple[Values, int]:
    """(values, 1 where the method is better on the average of the tasks, -1 where worse, 0 where level)."""
    encoder = Encoder(results)
    ours, theirs = encoder.of(method), encoder.of(other)
    values = encoder.values | {
        "ours": spread(ours, 1),
        "theirs": spread(theirs, 1),
        "ours_sst2": spread(encoder.of(method, "sst2"), 1),
        "theirs_sst2": spread(encoder.of(other, "sst2"), 1),
        "parameters": encoder.size(method) / encoder.size(other),
    }
    return values, differs(ours, theirs)


def on_sst2(results: Results, method: str, other: str) -> int:
    encoder = Encoder(results)
    return differs(encoder.of(method, "sst2"), encoder.of(other, "sst2"))


ON_AVERAGE = (
    "{ours} against {theirs} on average, {ours_sst2} against {theirs_sst2} on SST-2, {parameters:.2f} of the parameters"
)


@claim(
    LOR2C,
    text="Half of LoRA's trained parameters at the same rank",
    source="abstract; our README",
    quote="half of LoRA's parameters in fine-tuning",
    command="python benchmarks/lor2c_cost.py --model FOLDER",
    run="arithmetic for RoBERTa-base and LLaMA-2-7B at rank {rank}; all-MiniLM-L6-v2, counted",
    result="{roberta:.3f}, {llama:.3f}; {minilm:.3f} of LoRA's",
    rule="each is 0.5",
)
def half_of_lora(results: Results) -> Found:
    encoder = Encoder(results)
    rank = results("lor2c_minilm.json", "methods", "lor2c")["r"]

    def share(width: int, blocks: int) -> float:
        return lor2c_parameters(width, blocks, rank) / lora_parameters(blocks, [(width, width)] * 2, rank)

    llama = named_shape("llama_7b")
    values = {
        "rank": rank,
        "roberta": share(768, 12),
        "llama": share(llama.hidden_size, llama.num_hidden_layers),
        "minilm": encoder.size("lor2c") / encoder.size("lora_same_r"),
    }
    return values, all(values[name] == 0.5 for name in ("roberta", "llama", "minilm"))


@claim(
    LOR2C,
    text="As good as LoRA or better on GLUE, with half of the parameters",
    source="GLUE table, RoBERTa-base",
    command=GLUE,
    run=MINILM,
    result=f"{ON_AVERAGE}; CoLA {{ours_cola}} against {{theirs_cola}}",
    rule="the average is not lower",
)
def as_good_as_lora(results: Results) -> Found:
    values, found = against(results, "lor2c", "lora_same_r")
    encoder = Encoder(results)
    names = {"ours": "lor2c", "theirs": "lora_same_r"}
    return values | {f"{key}_cola": spread(encoder.of(name, "cola"), 1) for key, name in names.items()}, found >= 0


@claim(
    LOR2C,
    text="Better than LoRA at as many parameters",
    source="GLUE table",
    command=GLUE,
    run=MINILM,
    result=ON_AVERAGE,
    rule="the average is higher",
)
def better_at_equal_parameters(results: Results) -> Found:
    values, found = against(results, "lor2c", "lora_same_parameters")
    return values, found > 0


@claim(
    LOR2C,
    text="ShareLoR2C saves most and is the weakest variant",
    source="variants",
    command=GLUE,
    run=MINILM,
    result=ON_AVERAGE,
    rule="it has fewer parameters than LoR2C and is lower on SST-2, which alone tells methods apart",
)
def share(results: Results) -> Found:
    values, _ = against(results, "sharelor2c", "lor2c")
    return values, values["parameters"] < 1 and on_sst2(results, "sharelor2c", "lor2c") < 0


@claim(
    LOR2C,
    text="MergeLoR2C saves parameters without loss",
    source="variants",
    command=GLUE,
    run=MINILM,
    result=ON_AVERAGE,
    rule="it is not lower than LoR2C on SST-2, which alone tells methods apart",
)
def merge(results: Results) -> Found:
    values, _ = against(results, "mergelor2c", "lor2c")
    return values, on_sst2(results, "mergelor2c", "lor2c") >= 0


@claim(
    LOR2C,
    text="InjectLoR2C improves on LoR2C at the same number of parameters",
    source="variants",
    command=GLUE,
    run=MINILM,
    result=ON_AVERAGE,
    rule="it has as many parameters and is higher on SST-2, which alone tells methods apart",
)
def inject(results: Results) -> Found:
    values, _ = against(results, "injectlor2c", "lor2c")
    return values, values["parameters"] == 1 and on_sst2(results, "injectlor2c", "lor2c") > 0


@claim(
    LOR2C,
    text="IMLoR2C is the best of all variants",
    source="GLUE table",
    command=GLUE,
    run=MINILM,
    result="average by variant: {averages}",
    rule="no other variant is higher on average and LoR2C is lower",
)
def imlor2c(results: Results) -> Found:
    encoder = Encoder(results)
    names = ("lor2c", "sharelor2c", "mergelor2c", "injectlor2c", "imlor2c")
    averages = {name: encoder.of(name) for name in names}
    values = encoder.values | {"averages": listed(f"{name} {spread(a, 1)}" for name, a in averages.items())}
    best = max(averages, key=lambda name: statistics.mean(averages[name]))
    return values, best == "imlor2c" and differs(averages["imlor2c"], averages["lor2c"]) > 0


@claim(
    LOR2C,
    text="One fuse and three injections are the best of the grid from 0 to 6",
    source="grid on MRPC",
    command="python benchmarks/lor2c_grid.py --model FOLDER --task sst2 --data DIR --auto",
    run="all-MiniLM-L6-v2, SST-2, {rows} rows, one seed, {cells} cells",
    result="{cell:.1f} there, {none:.1f} without changes, {best:.1f} at best ({fuses} fuses, {injections} injections); "
    "a standard deviation is {spread:.1f}",
    rule="it is above no changes by more than the standard deviation of LoR2C's seeds",
)
def grid(results: Results) -> Found:
    content = results("lor2c_grid.json")
    cells = {(c["fuses"], c["injections"]): 100 * c["metrics"]["accuracy"] for c in content["cells"]}
    cells.pop(("auto", "auto"), None)
    best = max(cells, key=cells.__getitem__)
    deviation = statistics.stdev(Encoder(results).of("lor2c", "sst2"))
    values = {
        "rows": f"{int(content['settings']['rows']):,}",
        "cells": len(cells),
        "cell": cells[1, 3],
        "none": cells[0, 0],
        "best": cells[best],
        "fuses": best[0],
        "injections": best[1],
        "spread": deviation,
    }
    return values, cells[1, 3] > cells[0, 0] + deviation


def gradient_ratios(results: Results, name: str) -> Found:
    """LoR2C's gradient over LoRA's, and whether it is larger towards the first block."""
    content = results(name)
    ratios = [a / b for a, b in zip(content["gradient"]["lor2c"], content["gradient"]["lora"], strict=True)]
    values = {
        "blocks": len(ratios),
        "rows": f"{int(content['settings']['rows']):,}",
        "ratios": listed(f"{x:.1f}" for x in ratios),
    }
    return values, ratios[0] > 1 and ratios[0] > ratios[-1]


@claim(
    LOR2C,
    text="The path around the blocks keeps gradients from vanishing towards the first block",
    source="motivation; gradient figure",
    command="python benchmarks/lor2c_gradients.py --model FOLDER --task sst2 --data DIR --rows 1000 --epochs 2",
    run="all-MiniLM-L6-v2, SST-2, {rows} rows, one seed, not clipped",
    result="LoR2C's gradient over LoRA's, first to last block: {ratios}",
    rule="it is above 1 in the first block and above the last block's",
)
def gradients(results: Results) -> Found:
    return gradient_ratios(results, "lor2c_gradients.json")


@claim(
    LOR2C,
    text="The same on a net of 24 blocks, where vanishing would show",
    source="our question",
    command="python benchmarks/lor2c_gradients.py --pretrain FILE --task sst2 --data DIR --rows 8000 --epochs 1 "
    "--learning_rate 0.002 --max_length 64 --out benchmarks/results/lor2c_gradients_24.json",
    run="a small Llama of {blocks} blocks trained here, SST-2, {rows} rows, one seed, not clipped",
    result="LoR2C's gradient over LoRA's, first to last block: {ratios}",
    rule="it is above 1 in the first block and above the last block's",
)
def gradients_of_24(results: Results) -> Found:
    return gradient_ratios(results, "lor2c_gradients_24.json")


@claim(
    LOR2C,
    text="As good as LoRA at as many parameters on images too",
    source="our question",
    command="python benchmarks/lor2c_vision.py",
    run="a small ViT of {blocks} blocks, trained here on half of the digits, adapted to the others, {seeds} seeds, "
    "rates searched for each",
    result="accuracy {ours} against {theirs}; LoRA in the first block alone {first}",
    rule="it is not lower",
)
def on_images(results: Results) -> Found:
    sections = results("lor2c_vision.json", "sections")
    lor2c, lora, first = (
        [100 * accuracy for accuracy in sections[name]["accuracies"]]
        for name in ("lor2c", "lora_same_parameters", "lora_first_block")
    )
    values = {
        "blocks": sections["base"]["shape"]["num_hidden_layers"],
        "seeds": len(lor2c),
        "ours": spread(lor2c, 1),
        "theirs": spread(lora, 1),
        "first": spread(first, 1),
    }
    return values, differs(lor2c, lora) >= 0


@claim(
    LOR2C,
    text="Ablation: the residual is what helps, not its parameters alone",
    source="motivation",
    command=f"{GLUE} --methods lor2c_no_residual",
    run=MINILM,
    result=f"LoR2C, and the same A and B on the block's output: {ON_AVERAGE}",
    rule="LoR2C is higher on SST-2, which alone tells methods apart",
)
def residual(results: Results) -> Found:
    values, _ = against(results, "lor2c", "lor2c_no_residual")
    return values, on_sst2(results, "lor2c", "lor2c_no_residual") > 0


for what, why, recipe in (
    (
        "RoBERTa-base on eight GLUE tasks",
        "neither its weights nor four of the tasks are here",
        "lor2c_roberta_base_sst2",
    ),
    (
        "LLaMA-2-7B on BBH and HumanEval after Alpaca",
        "neither weights nor machine are here",
        "lor2c_llama2_7b_alpaca",
    ),
):
    untestable(
        LOR2C,
        text=f"{what}: at LoRA's scores or above",
        source="main tables",
        command=f"crosslayer finetune --recipe finetune/{recipe}",
        cannot=f"{why}; the recipe is read in tests",
    )
