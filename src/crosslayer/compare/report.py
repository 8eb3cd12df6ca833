"""What a comparison found: compare.json's content, the table and the curves made of it."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

from ..provenance import Provenance
from ..train.run_folder import write_json
from .options import CONTENDERS, OPTIMIZERS, label_of
from .runs import CurvePoint, RunResult
from .tuning import Tried, Tuning


class MethodResult(TypedDict):
    """One method's part of compare.json. Means and spreads are None if a seed diverged."""

    label: str
    model: dict[str, Any]
    rates: dict[str, float]
    rates_inside_grid: dict[str, bool]
    tuning: list[Tried]
    parameters: int
    parameters_without_embeddings: int
    flops_per_token: int
    peak_memory_bytes: dict[str, int]
    losses: list[float | None]
    loss_mean: float | None
    loss_stdev: float | None
    perplexity: float | None
    bits_per_byte: float | None
    seconds: float
    curves: list[list[CurvePoint]]


class Comparison(TypedDict):
    """What compare.json holds."""

    what: str
    recipe: dict[str, Any]
    options: dict[str, Any]
    run: Provenance
    tuning: dict[str, int]
    data: dict[str, Any]
    methods: dict[str, MethodResult]


def summarize(method: str, recipe: dict[str, Any], found: Tuning, runs: list[RunResult]) -> MethodResult:
    """One method's part, from its search and its runs."""
    counts = runs[0]["parameters"]
    losses = [run["loss"] for run in runs]
    finished = [loss for loss in losses if loss is not None]
    is_complete = len(finished) == len(losses)
    return {
        "label": label_of(method),
        "model": recipe["model"],
        "rates": found["rates"],
        "rates_inside_grid": found["inside"],
        "tuning": found["tried"],
        "parameters": sum(counts.values()),
        "parameters_without_embeddings": sum(counts.values()) - counts["embeddings"] - counts["head"],
        "flops_per_token": runs[0]["flops_per_token"],
        "peak_memory_bytes": runs[0]["peak_memory_bytes"],
        "losses": losses,
        "loss_mean": statistics.mean(finished) if is_complete else None,
        "loss_stdev": statistics.stdev(finished) if is_complete and len(losses) > 1 else None,
        "perplexity": _mean(run["perplexity"] for run in runs),
        "bits_per_byte": _mean(run["bits_per_byte"] for run in runs),
        "seconds": statistics.median(run["seconds"] for run in runs),
        "curves": [run["curve"] for run in runs],
    }


def _mean(values: Iterable[float | None]) -> float | None:
    """None where one of them is."""
    given = list(values)
    known = [value for value in given if value is not None]
    return statistics.mean(known) if len(known) == len(given) else None


def write_comparison(output_dir: Path, content: Comparison) -> None:
    """compare.json and compare.md, and compare.png where matplotlib is installed."""
    write_json(output_dir / "compare.json", content)
    (output_dir / "compare.md").write_text(
        f"# {content['recipe']['name']}\n\n{markdown_table(content)}\n", encoding="utf-8"
    )
    draw(content, output_dir / "compare.png")


def markdown_table(content: Comparison) -> str:
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


COLOURS = dict(
    zip(CONTENDERS, ("#444444", "#1b5e9e", "#7a3fa0", "#d1660a", "#5a8f3a", "#b02a50", "#2a8f8f"), strict=True)
)
STYLES = {"": "-", **dict(zip(OPTIMIZERS, ("-", "--", ":"), strict=True))}


def draw(content: Comparison, path: Path) -> bool:
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
    for name, row in content["methods"].items():
        if row["loss_mean"] is None:
            continue
        method, _, optimizer = name.partition("+")
        colour = COLOURS[method]
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
            axes.plot(x, means, STYLES[optimizer], color=colour, linewidth=1.3, label=label)
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
