"""Predicted and measured time of a training step on the CPU at hand, and the tables of docs/roofline.md.

    export OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776
    python benchmarks/roofline.py --measure    measures, and writes results/roofline.json
    python benchmarks/roofline.py              prints the tables, from that file and by arithmetic
    python benchmarks/roofline.py --write      puts them into the page

The settings of malloc are glibc's: what was freed stays with the process, as allocators made for this keep it.
Otherwise pages that each step faults in anew are part of its time, and no prediction has them.

One run: the device is measured (`crosslayer bench device`) ahead of each section, contenders take turns in one process,
and a figure is the median of the turns after a warm-up. A step is forward, loss, backward and AdamW; the loss is taken
by vocabulary chunks, and predicted so.
"""

import argparse
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from crosslayer.accounting import DEVICES, PRECISIONS, Method, Precision, Shape, Step, count_operations, named_shape
from crosslayer.accounting.passes import list_passes
from crosslayer.accounting.rates import Rates, sheet_rates
from crosslayer.accounting.roofline import StepTime, predict_step
from page_tables import filled, table
from result_file import ResultFile

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "roofline.md"
RESULTS = FOLDER / "results" / "roofline.json"
SHAPES = {  # hidden, MLP, layers, heads, sequences of a step, tokens of each
    "h256": (256, 688, 6, 4, 4, 256),
    "h512": (512, 1376, 4, 8, 4, 256),
    "h768": (768, 2048, 3, 12, 2, 512),
}
VOCABULARY = 1024
CONTENDERS = {
    "dense": ("dense", "none"),
    "dense, checkpointing": ("dense", "layers"),
    "CoLA, checkpointing": ("cola", "layers"),
    "CoLA, none": ("cola", "none"),
    "CoLA, invert": ("cola", "invert"),
    "CoLA, replay": ("cola", "replay"),
    "CR-Net, none": ("cross_layer", "none"),
    "CR-Net, replay": ("cross_layer", "replay"),
    "CR-Net, invert": ("cross_layer", "invert"),
    "CR-Net, reversible": ("cross_layer", "reversible"),
}
DTYPES = {"float32": "float32", "bfloat16": "bf16"}
ENVIRONMENT = ("OMP_NUM_THREADS", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


# Measuring


def fields_of(name: str) -> dict[str, Any]:
    hidden, mlp, layers, heads, _, sequence = SHAPES[name]
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": sequence,
    }


def measure(name: str, dtype: str, turns: int, clock: str = "perf_counter") -> dict[str, Any]:
    """Rates of the device, then the steps: {"clock", "rates", "steps": {contender: seconds of every turn}}."""
    import torch

    from crosslayer.bench.contenders import LOSS, Contenders
    from crosslayer.bench.device import measure_device
    from crosslayer.bench.speed import take_turns, training_step

    rates = measure_device("cpu", list(dict.fromkeys(("float32", dtype))))
    models = Contenders(fields_of(name), ["dense", "cola", "crnet"], dtype=dtype)
    own = {"dense": "dense", "cola": "cola", "cross_layer": "crnet"}
    *_, batch, sequence = SHAPES[name]
    ids = models.tokens(batch, sequence)
    steps = {}
    optimizers = {
        factorization: torch.optim.AdamW(models.model(method).parameters(), lr=1e-4, fused=True)
        for factorization, method in own.items()
    }
    for contender, (factorization, _) in CONTENDERS.items():
        model = models.model(own[factorization])
        steps[contender] = training_step(model, ids, optimizers[factorization], models.precision)

    def switch(contender: str) -> None:
        factorization, recompute = CONTENDERS[contender]
        model = models.model(own[factorization])
        if recompute == "layers":
            model.activation_checkpointing_enable()
            return
        if model.is_activation_checkpointing:
            model.activation_checkpointing_disable()
        if factorization != "dense":
            model.set_recompute(recompute)

    seconds = take_turns(steps, turns, warm_up=1, before=switch)
    rounded = {each: [round(x, 5) for x in taken] for each, taken in seconds.items()}
    environment = {setting: os.environ.get(setting) for setting in ENVIRONMENT}
    return {"clock": clock, "environment": environment, "loss": LOSS, "rates": rates.to_dict(), "steps": rounded}


# Predicting


def rates_of(section: dict[str, Any]) -> Rates:
    return Rates(**{name: value for name, value in section["rates"].items() if name not in ("what", "format")})


def predict(name: str, dtype: str, contender: str, rates: Rates) -> StepTime:
    factorization, recompute = CONTENDERS[contender]
    *_, batch, sequence = SHAPES[name]
    shape = Shape.of({"model_type": "llama", **fields_of(name)}).factorized(factorization)
    precision = PRECISIONS[DTYPES[dtype]]
    step = Step(sequence=sequence, micro_batch=batch, precision=precision, fused_norms=False, fused_loss=True)
    return predict_step(shape, step, rates, Method(recompute=recompute))


def compared(results: ResultFile) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """{(dtype, shape): {contender: (median of the measured seconds, predicted seconds)}}."""
    found = {}
    for dtype in DTYPES:
        for name in SHAPES:
            section = results[f"{dtype} {name}"]
            rates = rates_of(section)
            found[dtype, name] = {
                contender: (statistics.median(seconds), predict(name, dtype, contender, rates).seconds)
                for contender, seconds in section["steps"].items()
            }
    return found


def wrong_orders(pairs: dict[str, tuple[float, float]], apart: float = 0.05) -> list[tuple[str, str]]:
    """Pairs of contenders, measured at least so far apart, of which the prediction says the contrary."""
    return [
        (fast, slow)
        for fast, (measured, predicted) in pairs.items()
        for slow, (longer, other) in pairs.items()
        if longer > (1 + apart) * measured and other <= predicted
    ]


# Tables


def measured_table(dtype: str) -> str:
    found = compared(ResultFile(RESULTS, ""))
    rows = []
    for contender in CONTENDERS:
        cells = []
        for name in SHAPES:
            measured, predicted = found[dtype, name][contender]
            cells.append(f"{1e3 * measured:,.0f} / {1e3 * predicted:,.0f} ({predicted / measured - 1:+.0%})")
        rows.append([contender, *cells])
    return table(("measured / predicted, ms", *SHAPES), rows)


SIZE = "llama_1b"
TOKENS = {"sequence": 4096, "micro_batch": 4}
POLICIES = {
    "dense": ("dense", "none"),
    "dense, checkpointing": ("dense", "layers"),
    "CoLA, none": ("cola", "none"),
    "CoLA, invert": ("cola", "invert"),
    "CR-Net, none": ("cross_layer", "none"),
    "CR-Net, replay": ("cross_layer", "replay"),
    "CR-Net, invert": ("cross_layer", "invert"),
    "CR-Net, reversible": ("cross_layer", "reversible"),
}
DEVICES_SHOWN = {"H100": "h100", "H200": "h200", "RTX 4090": "rtx-4090"}


class NarrowCarry(Precision):
    """What if hidden states and Y were carried in the dtype of the weights."""

    @property
    def at_least_float32(self) -> int:
        return self.weights


def step_of(precision: Precision, fused_norms: bool = True, **tokens: int) -> Step:
    return Step(**(TOKENS | tokens), precision=precision, fused_norms=fused_norms)


def per_layer() -> str:
    """Operations and bytes of a token in one layer, the average of all; bf16 autocast on an accelerator."""
    step, rows = step_of(PRECISIONS["bf16_autocast"]), []
    kinds = {
        "norms": ("norm",),
        "rotation": ("rotation",),
        "gate, silu": ("activation",),
        "b Y": ("carried",),
        "h": ("residual", "gradient"),
        "casts": ("cast",),
    }
    for name, (factorization, recompute) in POLICIES.items():
        shape, method = named_shape(SIZE, factorization), Method(recompute=recompute)
        layers = shape.num_hidden_layers
        operations = count_operations(shape, step.sequence, method)
        phases = (operations.forward, operations.backward, operations.recompute)
        products, attention = (sum(phase[part] for phase in phases) / layers for part in ("layers", "attention"))
        moved = dict.fromkeys(kinds, 0.0)
        for each, times in list_passes(shape, step, method).items():
            for kind, names in kinds.items():
                moved[kind] += times * each.moved / step.tokens / layers * (each.what in names)
        cells = [f"{size / 1e3:,.0f}" for size in (*moved.values(), sum(moved.values()))]
        rows.append([name, f"{products / 1e6:,.0f}", f"{attention / 1e6:,.0f}", *cells])
    return table(("a token and layer", "MFLOP, products", "MFLOP, attention", *(f"KB, {k}" for k in kinds), "KB"), rows)


def this_cpu() -> Rates:
    return rates_of(ResultFile(RESULTS, "")["bfloat16 h768"])


def on_devices() -> dict[str, tuple[Rates, Precision]]:
    autocast = PRECISIONS["bf16_autocast"]
    found = {label: (sheet_rates(DEVICES[name]), autocast) for label, name in DEVICES_SHOWN.items()}
    return found | {"this CPU": (this_cpu(), PRECISIONS["float32"])}


def predicted(rates: Rates, precision: Precision, factorization: str, recompute: str, rank=None, **tokens) -> StepTime:
    shape = named_shape(SIZE, factorization, rank if factorization != "dense" else None)
    step = step_of(precision, rates.kind == "cuda", **tokens)
    return predict_step(shape, step, rates, Method(recompute=recompute))


def bound() -> str:
    """Speed over dense, and shares of products, attention and passes in the kernels' time."""
    rows = []
    for name, (factorization, recompute) in POLICIES.items():
        cells = []
        for rates, precision in on_devices().values():
            base = predicted(rates, precision, "dense", "none").seconds
            time = predicted(rates, precision, factorization, recompute)
            parts = time.by_part
            shares = " / ".join(
                f"{100 * parts[part] / sum(parts.values()):.0f}" for part in ("products", "attention", "passes")
            )
            cells.append(f"{base / time.seconds:.2f} ({shares})")
        rows.append([name, *cells])
    return table((f"{SIZE}, {TOKENS['micro_batch']} x {TOKENS['sequence']:,}", *on_devices()), rows)


def ranks() -> str:
    """CR-Net, none, over dense by rank; and what the products alone would give."""
    rows = []
    for rank in (128, 256, 384, 448, 512, 768):
        cells = []
        for rates, precision in on_devices().values():
            dense = predicted(rates, precision, "dense", "none")
            time = predicted(rates, precision, "cross_layer", "none", rank)
            products = dense.by_part["products"] / time.by_part["products"]
            cells.append(f"{dense.seconds / time.seconds:.2f} ({products:.2f})")
        rows.append([f"{rank} (h / {2048 / rank:.3g})", *cells])
    return table(("rank", *on_devices()), rows)


def carries() -> str:
    """CR-Net, none, r = h / 4: speed over dense of the same weights, by the dtype of weights and carry."""
    bf16 = PRECISIONS["bf16"]
    kinds = {
        "float32 weights and carry, autocast": (PRECISIONS["bf16_autocast"], PRECISIONS["bf16_autocast"]),
        "bf16 weights, float32 carry": (bf16, bf16),
        "bf16 weights and carry": (NarrowCarry(weights=2, gradients=2, states=2, products=2), bf16),
    }
    rows = []
    for name, (precision, of_dense) in kinds.items():
        cells = []
        for device in DEVICES_SHOWN.values():
            rates = sheet_rates(DEVICES[device])
            dense = predicted(rates, of_dense, "dense", "none")
            time = predicted(rates, precision, "cross_layer", "none")
            tokens = TOKENS["sequence"] * TOKENS["micro_batch"]
            cells.append(f"{tokens / time.seconds:,.0f} ({dense.seconds / time.seconds:.2f})")
        rows.append([name, *cells])
    return table(("tokens/s (over dense)", *DEVICES_SHOWN), rows)


def hosts() -> str:
    """Tokens of a micro-batch below which an accelerator waits for the host, CR-Net, none."""
    rows = []
    for name in ("dense", "CR-Net, none", "CR-Net, reversible"):
        cells = []
        for device in DEVICES_SHOWN.values():
            rates, tokens = sheet_rates(DEVICES[device]), 64
            while True:
                time = predicted(rates, PRECISIONS["bf16_autocast"], *POLICIES[name], sequence=tokens, micro_batch=1)
                if sum(time.by_part.values()) > sum(time.host.values()):
                    break
                tokens *= 2
            cells.append(f"{tokens:,}")
        rows.append([name, *cells])
    return table(("tokens from which kernels take longer than the host", *DEVICES_SHOWN), rows)


TABLES = {
    "float32": lambda: measured_table("float32"),
    "bfloat16": lambda: measured_table("bfloat16"),
    "per-layer": per_layer,
    "bound": bound,
    "ranks": ranks,
    "carries": carries,
    "hosts": hosts,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure, and write results/roofline.json")
    parser.add_argument("--redo", action="store_true", help="measure also what is in the file")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="take the process's own time, of device and steps alike: on one thread of a machine that others use",
    )
    parser.add_argument("--turns", type=int, default=5, help="counted turns of each contender")
    parser.add_argument("--write", action="store_true", help=f"write the tables into docs/{PAGE.name}")
    options = parser.parse_args()
    if options.measure:
        results = ResultFile(RESULTS, "predicted and measured time of a training step, one CPU", redo=options.redo)
        clock = time.process_time if options.cpu_time else time.perf_counter
        with patch.object(time, "perf_counter", clock):
            for dtype in DTYPES:
                for name in SHAPES:
                    section = partial(measure, name, dtype, options.turns, clock.__name__)
                    results.section(f"{dtype} {name}", section)
        for (dtype, name), pairs in compared(results).items():
            worst = max(abs(predicted / measured - 1) for measured, predicted in pairs.values())
            print(f"{dtype} {name}: at most {worst:.0%} off; wrong order: {wrong_orders(pairs) or 'none'}")
    elif options.write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), TABLES, PAGE.name), encoding="utf-8")
    else:
        for title, make in TABLES.items():
            print(f"{title}\n\n{make()}\n")


if __name__ == "__main__":
    main()
