"""Activation memory of CR-Net's policies against dense and CoLA: what is kept, and what keeping less costs in time.

    python benchmarks/memory.py                              everything that is not in the result file yet
    python benchmarks/memory.py --sections speed --redo      one section anew

Sections, in benchmarks/results/memory_cpu.json:

    saved      bytes kept for the backward by method and depth, counted; drawn as docs/memory_depth.png
    resident   growth of the process's peak resident memory per layer, one process for each depth, against the count
    peak       peak of a training step by part
    speed      tokens/s and step time, float32, contenders in processes of their own, taking turns
    policies   the four policies alone, in less time, over `none`
    kept_heap  the same as speed where the C allocator keeps what was freed, as allocators made for this do
    bf16       speed with bf16 products and with bf16 weights, 8 layers
    interval   the largest `reversible` interval whose gradients are still right, and what it keeps, at 48 layers
    interval_deep  the same at 80 layers, those of a LLaMA 70B

The loss is taken by vocabulary chunks. `speed`, `policies`, `kept_heap` and `bf16` need a quiet machine. Last, the bars
of the project are printed, each with its number.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from crosslayer.bench.contenders import LOSS, ChunkedLoss, Contenders
from crosslayer.bench.memory import memory_rows, saved_by_depth
from crosslayer.bench.speed import measure_memory, measure_training
from crosslayer.crnet import CRNetConfig, CRNetForCausalLM
from crosslayer.methods import METHODS
from result_file import ResultFile

HERE = Path(__file__).parent
POLICIES = ["crnet", "crnet_invert", "crnet_replay", "crnet_reversible"]
METHODS_HERE = ["dense", "dense_checkpointing", "cola", *POLICIES]
SMOKE = {"hidden": 64, "depths": [2, 4], "resident": [4, 8], "speed": [2, 3], "exact": 4, "deep": 6, "sequence": 32}
FULL = {"hidden": 512, "depths": [4, 8, 12, 16, 24, 32, 48], "resident": [4, 12, 20], "speed": [8, 24], "exact": 48}
FULL |= {"deep": 80, "sequence": 256}


def shape_of(hidden: int, layers: int, sequence: int = 256) -> dict[str, Any]:
    """MLP of 2.69 h, rank h / 4, heads of 64."""
    return {
        "vocab_size": 1024,
        "hidden_size": hidden,
        "intermediate_size": round(2.6875 * hidden / 8) * 8,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 64),
        "max_position_embeddings": sequence,
    }


# saved


def measure_saved(sizes: dict) -> dict[str, Any]:
    shape = shape_of(sizes["hidden"], sizes["depths"][-1])
    saved = saved_by_depth(shape, METHODS_HERE, sizes["depths"])
    rows = memory_rows(saved, sizes["hidden"])
    for name, row in rows.items():  # the bars speak of 4 to 16 layers, the figure goes on from there
        between = [depth for depth in sizes["depths"] if 4 <= depth <= 16]
        if len(between) > 1:
            growth = saved[name][between[0]].growth_per_layer(saved[name][between[-1]])
            row["growth_h_4_to_16"] = round(growth / (4 * sizes["hidden"]), 3)
    unkept = saved_by_depth(shape, ["crnet_reversible"], sizes["depths"], interval=10**6)
    rows["crnet_reversible_whole"] = memory_rows(unkept, sizes["hidden"])["crnet_reversible"]
    rows["crnet_reversible_whole"]["label"] += ", no state in between"
    return {"shape": shape, "dtype": "float32", "loss": LOSS, "methods": rows}


def draw(section: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    colors = {"dense": "#7f7f7f", "dense_checkpointing": "#7f7f7f", "cola": "#8c564b", "crnet": "#1f77b4"}
    colors |= {"crnet_invert": "#2ca02c", "crnet_replay": "#ff7f0e", "crnet_reversible": "#d62728"}
    colors["crnet_reversible_whole"] = "#d62728"
    figure, axes = pyplot.subplots(figsize=(7.6, 4.6), layout="constrained")
    for name, color in colors.items():
        row = section["methods"][name]
        depths = [int(depth) for depth in row["depths"]]
        values = [by_depth["bytes_per_token"] / 1024 for by_depth in row["depths"].values()]
        dashed = name in ("dense_checkpointing", "crnet_reversible_whole")
        label = "CR-Net, none" if name == "crnet" else row["label"]
        label = "CR-Net, reversible (8)" if name == "crnet_reversible" else label
        width = 5.0 if name == "cola" else 1.5  # CR-Net's line lies on it
        line = {"marker": "o", "markersize": 3, "color": color, "lw": width, "label": label}
        axes.plot(depths, values, "--" if dashed else "-", **line)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_yticks([20, 50, 100, 200, 500, 1000, 2000])
    axes.set_xticks([int(depth) for depth in section["methods"]["dense"]["depths"]])
    axes.set_xlabel("layers")
    hidden = section["shape"]["hidden_size"]
    axes.set_ylabel("kept for the backward, KiB per token")
    axes.set_title(f"Saved activations against depth (hidden size {hidden}, float32)", fontsize=11)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    unfinished = path.with_suffix(".tmp.png")
    figure.savefig(unfinished, dpi=150)
    os.replace(unfinished, path)
    pyplot.close(figure)


# resident

RESIDENT = {"dense": None, "dense_checkpointing": None, "cola": None, "crnet": None, "crnet_invert": None}
RESIDENT |= {"crnet_replay": 4, "crnet_reversible": 4}
"""Method -> interval; a fixed one, so that what is kept grows in a straight line with depth."""


def measure_resident(sizes: dict) -> dict[str, Any]:
    """Peak resident memory of forward and backward over what was there before, one process for each depth."""
    hidden, smoke = sizes["hidden"] // 2, sizes is SMOKE
    batch, sequence = (1, 64) if smoke else (16, 128)
    depths, found = sizes["resident"], {}
    for name in ("dense", "crnet_reversible") if smoke else RESIDENT:
        interval = RESIDENT[name]
        peaks = {}
        for layers in depths:
            arguments = [name, str(min(interval, layers) if interval else 0), hidden, layers, batch, sequence]
            command = [sys.executable, __file__, "--one-process", json.dumps(arguments)]
            # Freed blocks go back at once, or the peak would be that of the heap's history.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            peaks[layers] = json.loads(output.stdout)["peak_bytes"]
        shape = shape_of(hidden, depths[-1], sequence)
        counted = saved_by_depth(shape, [name], [depths[0], depths[-1]], interval=interval, sequence=sequence)[name]
        growth = counted[depths[0]].growth_per_layer(counted[depths[-1]])
        slope = (peaks[depths[-1]] - peaks[depths[0]]) / (depths[-1] - depths[0]) / (batch * sequence)
        found[name] = {
            "label": METHODS[name],
            "interval": interval,
            "peak_bytes": {str(layers): peak for layers, peak in peaks.items()},
            "resident_h": round(slope / (4 * hidden), 3),
            "counted_h": round(growth / (4 * hidden), 3),
            "ratio": round(slope / growth, 3),
        }
    shape = shape_of(hidden, 0, sequence)
    return {"shape": shape, "loss": LOSS, "batch": batch, "sequence": sequence, "methods": found}


def peak_of_this_process(name: str, interval: str, hidden: int, layers: int, batch: int, sequence: int) -> None:
    """Gradients are there before, so that their growth with depth is not counted as activations'."""
    torch.set_num_threads(1)
    contenders = Contenders(shape_of(hidden, layers, sequence), [name], interval=int(interval) or None)
    model = ChunkedLoss(contenders.model(name))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter).add_(0.0)
    warm_up, ids = contenders.tokens(1, 8), contenders.tokens(batch, sequence)
    model(warm_up, labels=warm_up, use_cache=False).loss.backward()
    gc.collect()
    before = memory_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # restart the peak
    model(ids, labels=ids, use_cache=False).loss.backward()
    print(json.dumps({"peak_bytes": memory_status("VmHWM") - before}))


def memory_status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


# peak, speed, bf16


def measure_peak(sizes: dict, batch: int) -> dict[str, Any]:
    sequence = sizes["sequence"]
    found = {}
    for layers in sizes["speed"]:
        contenders = Contenders(shape_of(sizes["hidden"], layers), METHODS_HERE)
        found[str(layers)] = measure_memory(contenders, contenders.tokens(batch, sequence))
    shape = shape_of(sizes["hidden"], 0)
    return {"shape": shape, "loss": LOSS, "batch": batch, "sequence": sequence, "layers": found}


KEPT_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""glibc: every block comes from one heap, and its end is never given back to the system."""


def median_ratio(seconds: list[float], others: list[float]) -> float:
    """Of the ratios within a turn: what changes from turn to turn meets both."""
    return round(statistics.median(a / b for a, b in zip(seconds, others, strict=True)), 3)


def measure_speed(
    sizes: dict,
    dtypes: list[str],
    depths: list[int],
    batch: int,
    count: int,
    restarts: int,
    methods: Sequence[str] = METHODS_HERE,
) -> dict[str, Any]:
    sequence = sizes["sequence"]
    found: dict[str, Any] = {}
    for dtype in dtypes:
        for layers in depths:
            contenders = Contenders(shape_of(sizes["hidden"], layers), methods, dtype=dtype)
            rows = measure_training(
                contenders, contenders.tokens(batch, sequence), turns=count, warm_up=1, own_processes=restarts
            )
            turns = {name: row["step_s"]["turns"] for name, row in rows.items()}
            for name, row in rows.items():
                del row["speed_over_llama"]  # dense is the measure here
                row["step_over_none"] = median_ratio(turns[name], turns["crnet"])
                for other in {"dense", "dense_checkpointing"} & turns.keys():
                    row[f"speed_over_{other}"] = median_ratio(turns[other], turns[name])
            found.setdefault(dtype, {})[str(layers)] = rows
            del contenders
    return {
        "shape": shape_of(sizes["hidden"], 0),
        "loss": LOSS,
        "batch": batch,
        "sequence": sequence,
        "turns": count,
        "restarts": restarts,
        "dtypes": found,
    }


def measure_with_kept_heap(sizes: dict, batch: int, count: int, restarts: int) -> dict[str, Any]:
    with mock.patch.dict(os.environ, KEPT_HEAP):  # the contenders' processes read it when they start
        found = measure_speed(sizes, ["float32"], sizes["speed"], batch, count, restarts)
    return {"environment": KEPT_HEAP, **found}


# interval


def measure_interval(sizes: dict, layers: int) -> dict[str, Any]:
    """Error of all gradients of the layers against float64: of `invert`, and of `reversible` by interval."""
    intervals = [2, 4] if sizes is SMOKE else [n for n in (8, 12, 16, 24, 32, 48, 64, 80) if n <= layers]
    cases = [("float32", b) for b in (1.0, 0.9)]
    cases += [(dtype, b) for dtype in ("mixed", "bfloat16") for b in (1.0, 0.9, 0.5)]
    weights = {"float32": torch.float32, "mixed": torch.float32, "bfloat16": torch.bfloat16}
    errors: dict[str, dict[str, Any]] = {}
    for dtype, b in cases:
        exact, model = deep_model(layers, b, torch.float64), deep_model(layers, b, weights[dtype])
        exact.load_state_dict(model.state_dict())
        truth = gradients(exact, None, None, "float64")
        plain = error_of(gradients(model, None, None, dtype), truth)
        case = {"plain": plain, "bar": 5e-6 if dtype == "float32" else 1.2 * plain}
        case["invert"] = error_of(gradients(model, "invert", None, dtype), truth)
        case |= {str(n): error_of(gradients(model, "reversible", n, dtype), truth) for n in intervals}
        errors[f"{dtype}, b={b}"] = {name: float(f"{error:.3g}") for name, error in case.items()}
    fine = {
        dtype: [
            n for n in intervals if all(e[str(n)] <= e["bar"] for case, e in errors.items() if case.startswith(dtype))
        ]
        for dtype in weights
    }
    # The bar holds up to some interval; one beyond a gap does not count.
    largest = {dtype: max(_unbroken(intervals, good), default=None) for dtype, good in fine.items()}
    depths = [d for d in sizes["depths"] if d >= 24] or sizes["depths"]
    found = {"errors": errors, "largest_interval": largest, "layers": layers, "kept_h_per_token": {}}
    shape = shape_of(sizes["hidden"], depths[-1])
    against = saved_by_depth(shape, ["dense_checkpointing"], depths)["dense_checkpointing"]
    for dtype, interval in largest.items():
        kept = saved_by_depth(shape, ["crnet_reversible"], depths, interval=interval)["crnet_reversible"]
        found["kept_h_per_token"][dtype] = {
            str(d): {
                "reversible": round(sum(kept[d].layer_bytes) / kept[d].tokens / (4 * sizes["hidden"]), 2),
                "dense + checkpointing": round(
                    sum(against[d].layer_bytes) / against[d].tokens / 4 / sizes["hidden"], 2
                ),
            }
            for d in depths
        }
    return found


def _unbroken(intervals: list[int], good: list[int]) -> list[int]:
    found = intervals[: 1 if intervals[0] in good else 0]
    for before, after in pairwise(intervals):
        if before in found and after in good:
            found.append(after)
    return found


@torch.no_grad()
def deep_model(layers: int, b: float, dtype: torch.dtype) -> CRNetForCausalLM:
    """A narrow, deep net near its initialisation (B not zero), every b within 0.02 of the given one."""
    config = CRNetConfig(**shape_of(128, layers))
    model = CRNetForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("beta"):
            parameter.fill_(b + 0.02 * float(noise.clamp(-1, 1)))
        elif "norm" not in name:
            scale = parameter.shape[-1] ** -0.5 if name.endswith("A.weight") else 0.02
            parameter.copy_(noise if "embed" in name else scale * noise)
    return model


def gradients(model: CRNetForCausalLM, policy: str | None, interval: int | None, dtype: str) -> list[torch.Tensor]:
    """Of the loss in float64 logits; without a policy, of plain autograd."""
    model.train(policy is not None)
    if policy is not None:
        model.set_recompute(policy, interval and min(interval, model.config.num_hidden_layers))
    model.zero_grad()
    ids = torch.randint(1024, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "mixed"):
        logits = model(ids, use_cache=False).logits.double()
    (-logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])).mean().backward()
    return [parameter.grad.double().clone() for parameter in model.model.layers.parameters()]


def error_of(actual: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    squares = sum(float((a - t).square().sum()) for a, t in zip(actual, truth, strict=True))
    return (squares / sum(float(t.square().sum()) for t in truth)) ** 0.5


# The bars


def bars(results: ResultFile) -> list[tuple[str, float, str, bool]]:
    """(what, measured, bar, whether it holds) for every section that is there."""
    found: list[tuple[str, float, str, bool]] = []

    def at_most(what: str, value: float, bar: float) -> None:
        found.append((what, value, f"<= {bar}", value <= bar))

    def at_least(what: str, value: float, bar: float) -> None:
        found.append((what, value, f">= {bar}", value >= bar))

    if "saved" in results:
        rows = results["saved"]["methods"]
        for name, bar in (("crnet", 14.5), ("crnet_invert", 1.8), ("crnet_reversible", 1.5)):
            if "growth_h_4_to_16" in rows[name]:
                at_most(f"kept per layer, 4 to 16: {rows[name]['label']}, h", rows[name]["growth_h_4_to_16"], bar)
        at_most("kept per layer: reversible, no state in between, h", rows["crnet_reversible_whole"]["growth_h"], 0.0)
    if "resident" in results:
        for row in results["resident"]["methods"].values():
            at_most(f"resident memory against the count, {row['label']}", round(abs(row["ratio"] - 1), 3), 0.1)
    for section in ("speed", "policies", "kept_heap"):
        by_depth = results[section]["dtypes"]["float32"] if section in results else {}
        for layers, rows in by_depth.items():
            where = f"{layers} layers" + {"kept_heap": ", kept heap", "policies": ", alone"}.get(section, "")
            for name, bar in (("crnet_invert", 1.08), ("crnet_replay", 1.10), ("crnet_reversible", 1.25)):
                at_most(f"step over none, {where}, {METHODS[name]}", rows[name]["step_over_none"], bar)
            if section == "policies":
                continue
            for name, to_checkpointed, to_dense in (("crnet_invert", 1.9, 1.5), ("crnet_reversible", 1.7, 1.4)):
                row, label = rows[name], f"{where}, {METHODS[name]}"
                at_least(
                    f"speed over dense + checkpointing, {label}", row["speed_over_dense_checkpointing"], to_checkpointed
                )
                at_least(f"speed over dense, {label}", row["speed_over_dense"], to_dense)
    if "peak" in results:
        for layers, rows in results["peak"]["layers"].items():
            for name in ("crnet_invert", "crnet_reversible"):
                ratio = rows[name]["total"] / rows["dense_checkpointing"]["total"]
                at_most(f"peak memory over dense + checkpointing, {layers} layers, {METHODS[name]}", ratio, 1.0)
    if "bf16" in results:
        for dtype, by_depth in results["bf16"]["dtypes"].items():
            for layers, rows in by_depth.items():
                what = f"speed over dense, {dtype}, {layers} layers, CR-Net, invert"
                at_least(what, rows["crnet_invert"]["speed_over_dense"], 1.0)
    if "interval" in results:
        for dtype, by_depth in results["interval"]["kept_h_per_token"].items():
            interval = results["interval"]["largest_interval"][dtype]
            for layers, kept in by_depth.items():
                what = f"kept by reversible ({interval}, {dtype}) over dense + checkpointing, {layers} layers"
                at_most(what, kept["reversible"] / kept["dense + checkpointing"], 1.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ("saved", "resident", "peak", "speed", "policies", "kept_heap", "bf16", "interval", "interval_deep")
    parser.add_argument("--sections", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--redo", action="store_true", help="measure sections again that are in the file")
    parser.add_argument("--turns", type=int, default=3, help="counted turns, of two steps each, after one uncounted")
    parser.add_argument("--restarts", type=int, default=3, help="how often all contenders' processes start, turns each")
    parser.add_argument("--layers", nargs="+", type=int, help="depths of peak and speed, the first one of bf16: 8 24")
    parser.add_argument("--rows", type=int, default=8, help="sequences in a step: peak, speed, policies and bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "memory_cpu.json")
    parser.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "memory_depth.png")
    parser.add_argument("--one-process", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_process:
        peak_of_this_process(*options.one_process)
        return
    torch.set_num_threads(options.threads)
    sizes = SMOKE if options.smoke else FULL
    if options.layers:
        sizes["speed"] = options.layers
    rows, turns, restarts = options.rows, options.turns, options.restarts
    results = ResultFile(options.out, "activation memory of CR-Net's policies, on a CPU", redo=options.redo)
    measures = {
        "saved": lambda: measure_saved(sizes),
        "resident": lambda: measure_resident(sizes),
        "peak": lambda: measure_peak(sizes, rows),
        "speed": lambda: measure_speed(sizes, ["float32"], sizes["speed"], rows, turns, restarts),
        "policies": lambda: measure_speed(sizes, ["float32"], sizes["speed"], rows, turns, restarts, POLICIES),
        "kept_heap": lambda: measure_with_kept_heap(sizes, rows, turns, restarts),
        "bf16": lambda: measure_speed(sizes, ["mixed", "bfloat16"], sizes["speed"][:1], rows, turns, restarts),
        "interval": lambda: measure_interval(sizes, sizes["exact"]),
        "interval_deep": lambda: measure_interval(sizes, sizes["deep"]),
    }
    for name in options.sections:
        results.section(name, measures[name])
    if "saved" in results:
        draw(results["saved"], options.figure)
    found = bars(results)
    results.content["bars"] = [
        {"what": what, "value": round(value, 3), "bar": bar, "holds": holds} for what, value, bar, holds in found
    ]
    results.save()
    print("\n| | measured | bar | holds |\n|---|---|---|---|")
    for what, value, bar, holds in found:
        print(f"| {what} | {value:.3f} | {bar} | {'yes' if holds else 'no'} |")


if __name__ == "__main__":
    main()
