"""All that matters on one GPU in under nine minutes: training, memory and decode at 1B and 350M, and what was aimed at.

    python benchmarks/gpu.py                                 goes on where it stopped; --redo starts anew
    python benchmarks/gpu.py --expect                        what data sheets promise for the eager cells, anywhere
    python benchmarks/gpu.py --device cpu --smoke --out smoke.json

One contender at a time, so that each has the whole memory, at the rank that its recipe has; bf16, fused attention
(torch's sdpa), 16,384 tokens in a step, sequences of 1,024 and 4,096. Every contender takes its loss by vocabulary
chunks, transformers' Llama too. Four kinds of cells:

    eager, compiled   training: medians after a warm-up of CUDA events around whole steps (forward, loss, backward,
                      fused AdamW); the allocator's peak; MFU, which counts the forward's operations three times,
                      recomputation not at all, against the data sheet's dense bf16 peak. Compiled is the decoder, not
                      the loss, and of a memory policy but `none` only what is around the layers.
    limits            the most sequences of 1,024 tokens and the longest single sequence that train in eager mode:
                      doubling, then halving, until found or out of time (`fits` trains, `fails` does not)
    decode, static    greedy, one forward for each token, at batch 1 and 32: eager with a growing cache, bound by
                      launches; and compiled with a static cache and CUDA graphs

What no longer fits the time, or fails, is printed; run the command again for it.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crosslayer.accounting import (
    DEVICES,
    PRECISIONS,
    TRAININGS,
    Shape,
    Step,
    estimate_memory,
    peak_flops,
    predict_step,
    sheet_rates,
)
from crosslayer.bench.contenders import LOSS, Contenders
from crosslayer.bench.speed import matrix_operations, measure_generation, summarize, take_turns, training_step
from crosslayer.methods import METHODS
from on_device import Cells, is_cuda, largest, make_states, measure_in_order, peaks, restart_peak, runs
from result_file import ResultFile

SIZES = {
    # The published 1B shape has an MLP of 5461, an odd number that no tensor core likes: rounded up for everyone.
    "1B": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 32},
    "350M": {"hidden_size": 1024, "intermediate_size": 2736, "num_hidden_layers": 24, "num_attention_heads": 16},
}
RANKS = {"1B": {"crnet": 448, "cola": 512}, "350M": {"crnet": 224, "cola": 256}}
SMOKE_SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 2},
}
FULL = {"vocabulary": 32000, "tokens": 16384, "sequences": (1024, 4096), "prompt": 128, "new_tokens": 64, "most": 128}
SMOKE = {"vocabulary": 128, "tokens": 64, "sequences": (16, 32), "prompt": 8, "new_tokens": 4, "most": 3}

TRAINED = ["dense", "crnet", "cola", "crnet_invert", "dense_checkpointing", "cola_invert", "crnet_reversible"]
TRAINED += ["crnet_replay", "llama"]
"""In order of importance. `cola_invert` is what CoLA-M is for, under our policy."""
COMPILED = ["dense", "crnet", "cola"]
POLICIES_COMPILED = ["dense_checkpointing", "crnet_invert", "crnet_reversible", "cola_invert", "crnet_replay"]
LIMITS = ["crnet_invert", "dense_checkpointing", "dense", "crnet_reversible", "cola_invert", "crnet", "cola"]
DECODED = ["dense", "crnet", "cola"]
SECONDS = {"eager": 15, "compiled": 60, "limits": 30, "decode": 20, "static": 75}
"""That a cell may take; it is not begun with less."""
SEARCH_SECONDS = 12
"""Of a search for the largest batch, and of one for the longest sequence."""


class Bench:
    """How one cell is measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.sizes, self.given = (SMOKE_SIZES, SMOKE) if options.smoke else (SIZES, FULL)

    def contenders(self, size: str, name: str) -> Contenders:
        shape = {**self.sizes[size], "vocab_size": self.given["vocabulary"], "max_position_embeddings": 2**17}
        shape |= {"bos_token_id": None, "eos_token_id": None}
        rank = RANKS.get(size, {}).get(name.split("_")[0])
        return Contenders(
            shape if rank is None else shape | {"rank": rank}, [name], device=self.device, dtype=self.options.dtype
        )

    def train(self, size: str, name: str, sequence: int, compiled: bool) -> dict[str, Any]:
        """Speed, MFU and peak memory of training."""
        contenders = self.contenders(size, name)
        ids = contenders.tokens(self.given["tokens"] // sequence, sequence)
        try:
            model = contenders.model(name)
            operations = matrix_operations(model, ids)
            if compiled:
                torch.compiler.reset()
                model.model.compile(backend=self.options.backend)
            step = training_step(model, ids, precision=contenders.precision)
            take_turns({name: step}, 0, warm_up=3, device=self.device)
            restart_peak(self.device)
            seconds = take_turns({name: step}, self.options.turns, warm_up=0, device=self.device)[name]
        except torch.OutOfMemoryError:
            return {"label": METHODS[name], "out_of_memory": True}
        found = {"label": METHODS[name], "parameters": model.num_parameters(), **summarize(seconds, ids.numel())}
        peak = peak_flops(torch.cuda.get_device_name()) if is_cuda(self.device) else None
        mfu = round(operations / found["step_s"]["median"] / peak, 4) if peak else None
        return {**found, **peaks(self.device), "matrix_operations": operations, "mfu": mfu}

    def limits(self, size: str, name: str) -> dict[str, Any]:
        """The most sequences, and the longest one, that train."""
        contenders, length, most = self.contenders(size, name), self.given["sequences"][0], self.given["most"]
        try:
            model = contenders.model(name)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
            make_states(optimizer)
        except torch.OutOfMemoryError:
            return {"label": METHODS[name], "out_of_memory": True}

        def fits(batch: int, sequence: int) -> bool:
            def step() -> None:
                training_step(model, contenders.tokens(batch, sequence), optimizer, contenders.precision)()

            return runs(step, model)

        def search(fits: Callable[[int], bool], unit: int) -> dict[str, int | None]:
            found, fails = largest(fits, start=min(16, most), limit=most, seconds=SEARCH_SECONDS)
            return {"fits": found * unit, "fails": fails and fails * unit}

        batch = search(lambda n: fits(n, length), 1)
        return {"label": METHODS[name], "batch": batch, "sequence": search(lambda n: fits(1, n * length), length)}

    def decode(self, size: str, name: str, compiled: bool) -> dict[str, Any]:
        """Prefill and decode at batch 1 and 32."""
        found: dict[str, Any] = {"label": METHODS[name]}
        contenders = self.contenders(size, name)
        given = {"prompt": self.given["prompt"], "new_tokens": self.given["new_tokens"], "turns": 3, "warm_up": 1}
        for batch in (1, 32):
            backend = self.options.backend if compiled else None
            row = measure_generation(contenders, batch=batch, **given, backend=backend)[name]
            found["weight_bytes"] = row["weight_bytes"]
            found[f"batch {batch}"] = {
                part: {key: row[part][key] for key in ("tokens_per_s", "step_s")} for part in ("prefill", "decode")
            }
        return found

    def cells(self) -> Cells:
        """All of them, the most important first."""
        found: Cells = {}

        def add(
            kind: str, size: str, names: list[str], measure: Callable, sequence: int | None = None, **given
        ) -> None:
            for name in names:
                where = f"{kind} {size} {name}" if sequence is None else f"{kind} {size} {sequence} {name}"
                given |= {} if sequence is None else {"sequence": sequence}
                found[where] = (SECONDS[kind], partial(measure, size, name, **given))

        first, *others = self.sizes
        short, long = self.given["sequences"]
        add("eager", first, TRAINED, self.train, short, compiled=False)
        add("compiled", first, COMPILED, self.train, short, compiled=True)
        add("limits", first, LIMITS, self.limits)
        add("decode", first, DECODED, self.decode, compiled=False)
        add("static", first, DECODED, self.decode, compiled=True)
        add("eager", first, TRAINED, self.train, long, compiled=False)
        for size in others:
            add("eager", size, TRAINED, self.train, short, compiled=False)
            add("eager", size, TRAINED, self.train, long, compiled=False)
        for size in self.sizes:
            add("compiled", size, COMPILED, self.train, long, compiled=True)
            add("compiled", size, [*COMPILED, *POLICIES_COMPILED], self.train, short, compiled=True)
            add("compiled", size, POLICIES_COMPILED, self.train, long, compiled=True)
        for size in others:
            add("limits", size, LIMITS, self.limits)
            add("decode", size, DECODED, self.decode, compiled=False)
            add("static", size, DECODED, self.decode, compiled=True)
        return found


def speeds(results: ResultFile) -> dict[str, float]:
    """Tokens/s of every cell that trains or decodes; decode by batch."""
    found = {}
    for name, row in results.content["sections"].items():
        if "tokens_per_s" in row:
            found[name] = row["tokens_per_s"]
        found |= {
            f"{name} {batch}": row[batch]["decode"]["tokens_per_s"] for batch in row if batch.startswith("batch ")
        }
    return found


def over(other: str, found: dict[str, float]) -> dict[str, float]:
    """Tokens/s over those of another method in the same place."""
    ratios = {}
    for name, speed in found.items():
        method = next(word for word in name.split() if word in METHODS)
        reference = name.replace(f" {method}", f" {other}")
        if reference in found:
            ratios[name] = round(speed / found[reference], 3)
    return ratios


def targets(results: ResultFile, size: str = "1B") -> list[dict[str, Any]]:
    """What was aimed at ahead of the first run, beside what came of it: CR-Net at 1B, rank 448."""
    found, rows = speeds(results), []
    aims = (("crnet", "dense", 1.4), ("crnet", "cola", 0.95), ("crnet_invert", "crnet", round(1 / 1.08, 3)))
    for method, other, at_least in aims:
        for name, ratio in over(other, found).items():
            if name.startswith((f"eager {size} ", f"compiled {size} ")) and name.endswith(f" {method}"):
                what = f"{name}, speed over {METHODS[other]}"
                rows.append({"what": what, "measured": ratio, "at_least": at_least, "holds": ratio >= at_least})
    return rows


def show(results: ResultFile) -> None:
    """Every cell, then the targets."""
    found, over_dense = speeds(results), results.content["speed_over_dense"]
    print("\n| | tokens/s | over dense | MFU | peak GB |\n|---|---|---|---|---|")
    for name, speed in found.items():
        row = results.content["sections"].get(name, {})
        memory = f"{row['peak_allocated_bytes'] / 1e9:.1f}" if row.get("peak_allocated_bytes") else ""
        print(f"| {name} | {speed:,.0f} | {over_dense.get(name, '')} | {row.get('mfu') or ''} | {memory} |")
    print("\n| | sequences | fails at | longest sequence | fails at |\n|---|---|---|---|---|")
    for name, row in results.content["sections"].items():
        if row.get("out_of_memory"):
            print(f"| {name} | out of memory | | | |")
        elif name.startswith("limits"):
            cells = [f"{row[part][end] or ''}" for part in ("batch", "sequence") for end in ("fits", "fails")]
            print(f"| {name} | {' | '.join(cells)} |")
    print("\n| target | measured | at least | holds |\n|---|---|---|---|")
    for row in results.content["targets"]:
        print(f"| {row['what']} | {row['measured']} | {row['at_least']} | {'yes' if row['holds'] else 'no'} |")


def expect(names: tuple[str, ...] = ("h100", "h200")) -> None:
    """Prints tokens/s (over dense) of every eager cell by the devices' data sheets, and its memory by arithmetic."""
    print(f"| | {' | '.join(DEVICES[name].name for name in names)} | GB |\n|{'---|' * (len(names) + 2)}")
    for size, shape in SIZES.items():
        for sequence in FULL["sequences"]:
            step = Step(sequence=sequence, micro_batch=FULL["tokens"] // sequence, precision=PRECISIONS["bf16"])
            base = Shape.of({"model_type": "llama", "vocab_size": FULL["vocabulary"], **shape})
            dense: dict[str, float] = {}
            for method in (name for name in TRAINED if name in TRAININGS):
                factorization, how = TRAININGS[method]
                ours = base.factorized(factorization, RANKS[size].get(method.split("_")[0]))
                cells = []
                for name in names:
                    speed = step.tokens / predict_step(ours, step, sheet_rates(DEVICES[name]), how).seconds
                    cells.append(f"{speed:,.0f} ({speed / dense.setdefault(name, speed):.2f})")
                memory = sum(estimate_memory(ours, step, how).values()) / 1e9
                print(f"| {size} {sequence} {METHODS[method]} | {' | '.join(cells)} | {memory:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "mixed", "float32"))
    parser.add_argument("--turns", type=int, default=5, help="counted steps of each contender")
    parser.add_argument("--minutes", type=float, default=8.5, help="nothing is begun that would end after that")
    parser.add_argument("--backend", help="of torch.compile [default: inductor]")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--redo", action="store_true", help="throw away what the file holds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    parser.add_argument("--expect", action="store_true", help="only what is predicted, no GPU")
    options = parser.parse_args()
    if options.expect:
        expect()
        return
    if is_cuda(options.device) and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --smoke shows that the script runs")
    options.backend = options.backend or ("aot_eager" if options.smoke else "inductor")
    if options.redo:
        options.out.unlink(missing_ok=True)

    bench = Bench(options)
    results = ResultFile(options.out, f"training, memory and decode on one device, {options.dtype}")
    results.content["setting"] = {
        **bench.given,
        "turns": options.turns,
        "dtype": options.dtype,
        "backend": options.backend,
        "loss": LOSS,
        "sizes": bench.sizes,
        "ranks": RANKS,
    }
    left = measure_in_order(results, bench.cells(), options.minutes)
    results.content["speed_over_dense"] = over("dense", speeds(results))
    results.content["targets"] = targets(results)
    results.save()
    show(results)
    if left:
        print(f"\n{left}")


if __name__ == "__main__":
    main()
