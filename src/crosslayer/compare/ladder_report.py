"""The files of a ladder: ladder.json, the tables and the figure made of it."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..train.run_folder import write_json
from .ladder_findings import AXES, COSTS, FURTHER, REFERENCE, Bought, Ladder, Law, Ratio, Rung
from .options import label_of
from .power_law import Estimate
from .report import COLOURS, STYLES

HOW = """\
Intervals are of 95 %, by Student's t. For laws, trends, crossings and what a unit buys they rest on the scatter of the
sizes around the line (sizes - 2 degrees of freedom; with two sizes on that of the seeds); for the ratio at a size on
the scatter of the seeds, each compared with dense's run of that seed, pooled over the sizes. The size is the number of
parameters of its dense model without embeddings and head. FLOPs are those of forward and backward over all tokens.
"""


def write_ladder(output_dir: Path, content: Ladder) -> None:
    """ladder.json and ladder.md, and ladder.png where matplotlib is installed."""
    write_json(output_dir / "ladder.json", content)
    text = f"# {content['recipe']['name']}, {len(content['sizes'])} sizes\n\n{markdown_ladder(content)}\n"
    (output_dir / "ladder.md").write_text(text, encoding="utf-8")
    draw_ladder(content, output_dir / "ladder.png")


def markdown_ladder(content: Ladder) -> str:
    """All tables."""
    findings = content["findings"]
    parts = [_table_of_runs(content)]
    wanted = len(content["options"]["sizes"])
    if (done := len(content["sizes"])) < wanted:
        parts.insert(0, f"{done} of {wanted} sizes are done.")
    if findings["ratios"]:
        parts += [f"## Perplexity over {REFERENCE}", _table_of_ratios(content)]
    if any(findings["laws"].values()):
        parts += ["## Laws: loss = a x^-b", _table_of_laws(content)]
    if findings["irreducible"]:
        parts += ["## With an irreducible loss: loss = E + a N^-b", _table_of_irreducible(content)]
    if findings["crossings"]:
        parts += ["## Where two laws cross", _table_of_crossings(content)]
    if any(findings["bought"].values()):
        parts += [f"## Units of {REFERENCE} that one unit replaces, at equal loss", _table_of_bought(content)]
    return "\n\n".join([*parts, HOW.rstrip()])


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(header)
    lines = [titles, ["---"] * len(titles), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _table_of_runs(content: Ladder) -> str:
    rows = []
    for name, rung in content["sizes"].items():
        epochs = "" if rung["epochs"] is None else f"{rung['epochs']:.2g}"
        for row in rung["methods"].values():
            loss, perplexity = "diverged", ""
            if row["loss_mean"] is not None:
                spread = "" if row["loss_stdev"] is None else f" ± {row['loss_stdev']:.4f}"
                loss, perplexity = f"{row['loss_mean']:.4f}{spread}", f"{math.exp(row['loss_mean']):.2f}"
            rows.append(
                [
                    name,
                    _short(rung["tokens"]),
                    epochs,
                    row["label"],
                    _short(row["parameters_without_embeddings"]),
                    _short(row["flops_per_token"] * rung["tokens"]),
                    f"{sum(row['peak_memory_bytes'].values()) / 2**20:,.0f} MiB",
                    f"{row['seconds']:,.0f}",
                    str(len(row["losses"])),
                    loss,
                    perplexity,
                ]
            )
    return _table(
        [
            *("size", "tokens", "epochs", "method", "parameters without embeddings", "FLOPs", "peak memory"),
            *("seconds", "seeds", "validation loss", "perplexity"),
        ],
        rows,
    )


def _table_of_ratios(content: Ladder) -> str:
    rows = []
    for method, ratio in content["findings"]["ratios"].items():
        label = label_of(method)
        for name, found in ratio["sizes"].items():
            count = content["sizes"][name]["dense_parameters"]
            since = "the start" if found["since"] is None else f"{found['since']:.2g}"
            rows.append([label, f"{name} ({_short(count)})", _shown(found["ratio"]), since])
        rows += [
            [label, words, _shown(found, digits), ""]
            for words, found, digits in (
                ("mean of the sizes", ratio["mean"], 3),
                ("factor of a doubling of the size", ratio["doubling"], 4),
                (_beyond(ratio["extrapolated_to"]), ratio["extrapolated"], 3),
            )
            if found is not None
        ]
    return _table(["method", "at", "perplexity ratio", "on that side of 1 since, tokens per parameter"], rows)


def _beyond(size: float | None) -> str:
    return "" if size is None else f"extrapolated to {_short(size)}, {FURTHER} times the largest"


def _table_of_laws(content: Ladder) -> str:
    rows = [
        [AXES[axis].words, label_of(method), f"{law['a']['value']:.4g}", _shown(law["b"], 4)]
        for axis, laws in content["findings"]["laws"].items()
        for method, law in laws.items()
    ]
    return _table(["x", "method", "a", "b"], rows)


def _table_of_irreducible(content: Ladder) -> str:
    rows = []
    for method, law in content["findings"]["irreducible"].items():
        irreducible: Estimate = {"value": law["E"], "low": law["E_low"], "high": law["E_high"]}
        rows.append([label_of(method), _shown(irreducible), f"{law['a']:.4g}", _shown(law["b"])])
    return _table(["method", "E", "a", "b"], rows)


def _table_of_crossings(content: Ladder) -> str:
    rows = []
    for crossing in content["findings"]["crossings"]:
        first, last = map(label_of, crossing["ahead"])
        at = crossing["at"]
        where = "not within the measured" if at is None else _shown(at, 3, short=True)
        ahead = first if at is None else f"{first} below, {last} above"
        rows.append([" and ".join(map(label_of, crossing["methods"])), AXES[crossing["axis"]].words, where, ahead])
    return _table(["methods", "against", "cross at", "lower loss"], rows)


def _table_of_bought(content: Ladder) -> str:
    sizes = [*content["sizes"], "all sizes"]
    rows = []
    for method, axes in content["findings"]["bought"].items():
        for axis in COSTS:
            if axis in axes:
                cells = [_shown_bought(axes[axis].get(name)) for name in sizes]
                rows.append([label_of(method), AXES[axis].words, *cells])
    return _table(["method", "unit of", *sizes], rows)


def _shown_bought(found: Bought | None) -> str:
    if found is None:
        return ""
    return _shown(found["times"]) + (" (extrapolated)" if found["is_extrapolated"] else "")


def _shown(found: Estimate | None, digits: int = 3, *, short: bool = False) -> str:
    """1.02 (1.01 to 1.03)"""
    if found is None:
        return ""

    def text(value: float | None) -> str:
        if value is None:
            return "?"
        return _short(value) if short else f"{value:.{digits}f}" if 0.001 <= abs(value) < 1000 else f"{value:.2g}"

    if found["low"] is None and found["high"] is None:
        return text(found["value"])
    return f"{text(found['value'])} ({text(found['low'])} to {text(found['high'])})"


def _short(value: float) -> str:
    """297k, 2.57M, 1.2e13"""
    if value >= 1e12:
        return f"{value:.3g}".replace("e+", "e")
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def draw_ladder(content: Ladder, path: Path) -> bool:
    """Loss against size and against FLOPs with the laws, a dot a seed; the ratio to dense with its trend.

    False, and no file, without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    findings, rungs = content["findings"], content["sizes"]
    figure = Figure(figsize=(12.0, 4.4), dpi=130, layout="constrained")
    panels = figure.subplots(1, 3)
    methods = list(dict.fromkeys(name for rung in rungs.values() for name in rung["methods"]))
    for axes, axis in zip(panels, ("size", "flops"), strict=False):
        for method in methods:
            _draw_losses(axes, rungs, axis, method, findings["laws"][axis].get(method))
        axes.set_xlabel(AXES[axis].words)
    panels[0].set_ylabel("validation loss (nats per token)")
    for method, ratio in findings["ratios"].items():
        _draw_ratio(panels[2], rungs, method, ratio)
    panels[2].axhline(1.0, color=COLOURS[REFERENCE], lw=1.0)
    panels[2].set_xlabel(AXES["size"].words)
    panels[2].set_ylabel(f"perplexity over {REFERENCE}'s, 95 % intervals")
    for axes in panels:
        _logarithmic(axes)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=max(1, len(names)), frameon=False)
    figure.savefig(path)
    return True


def _draw_losses(axes: Any, rungs: dict[str, Rung], axis: str, method: str, law: Law | None) -> None:
    name, _, optimizer = method.partition("+")
    x, y = [], []
    for rung in rungs.values():
        losses = rung["methods"][method]["losses"] if method in rung["methods"] else []
        known = [loss for loss in losses if loss is not None]
        x += [AXES[axis].of(rung, rung["methods"][method])] * len(known) if known else []
        y += known
    axes.plot(x, y, "o", color=COLOURS[name], ms=4, mfc="none" if optimizer else None, label=label_of(method))
    if law is not None and x:
        low, high = min(x), max(x)
        line = [low * (high / low) ** (step / 50) for step in range(51)]
        fitted = [law["a"]["value"] * at ** -law["b"]["value"] for at in line]
        axes.plot(line, fitted, STYLES[optimizer], color=COLOURS[name], lw=1.2)


def _draw_ratio(axes: Any, rungs: dict[str, Rung], method: str, ratio: Ratio) -> None:
    name, _, optimizer = method.partition("+")
    x = [rungs[size]["dense_parameters"] for size in ratio["sizes"]]
    found = [at_size["ratio"] for at_size in ratio["sizes"].values()]
    below, above = (
        [abs(each["value"] - end) if (end := each[side]) is not None else 0.0 for each in found]
        for side in ("low", "high")
    )
    values = [each["value"] for each in found]
    axes.errorbar(x, values, yerr=[below, above], fmt="o", color=COLOURS[name], ms=4, capsize=3, lw=1.0)
    if ratio["mean"] is not None and ratio["doubling"] is not None:
        centre = statistics.mean(map(math.log2, x))
        trend = [ratio["mean"]["value"] * ratio["doubling"]["value"] ** (math.log2(at) - centre) for at in x]
        axes.plot(x, trend, STYLES[optimizer], color=COLOURS[name], lw=1.2)


def _logarithmic(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 50 * low else (1.0,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.grid(alpha=0.3)
