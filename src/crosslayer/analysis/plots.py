"""Figures of the analyses, as PNG on white; the caller has matplotlib (extra `plots`).

Layers are counted from 0, as in module names. One colour a kind, the same in every figure.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .ranks import SuggestedRanks
from .spectra import LinearSpectra, Spectra

COLOURS = {"output": "#1b5e9e", "least_squares": "#d1660a", "unit": "#5a8f3a", "learned": "#7a3fa0"}
LABELS = {
    "output": r"$Y_l$",
    "least_squares": r"$Y_l - b_0 Y_{l-1}$, least squares",
    "unit": r"$Y_l - Y_{l-1}$",
    "learned": r"$Y_l - b\,Y_{l-1}$, the model's own $b$",
}
DPI = 130
FEW_LAYERS = 16


def draw_curves(spectra: Spectra, path: Path, title: str) -> None:
    """Relative error against rank, a panel a position: mean over the layers that have one below, range shaded."""
    figure, panels = _grid(spectra, title)
    for axes, position in panels:
        for kind in spectra.kinds:
            _curve(axes, spectra, position.name, kind, label=LABELS[kind])
        axes.axvline(spectra.quarter, color="0.6", linewidth=0.8, linestyle=":")
    _finish_grid(figure, panels, spectra)
    _save(figure, path)


def draw_maps(spectra: Spectra, path: Path, title: str) -> None:
    """Heat maps over layers and positions: errors at a quarter of the width, cosines, factors, effective ranks."""
    r = spectra.quarter
    maps: list[tuple[str, Callable[[LinearSpectra], float | None], dict[str, Any]]] = [
        (f"relative error of $Y_l$\nat rank {r}", lambda x: x.relative_error("output", r), SHARE),
        (f"error of $Y_l - b_0 Y_{{l-1}}$\nover that of $Y_l$, rank {r}", lambda x: x.ratio("least_squares", r), RATIO),
        (f"error of $Y_l - Y_{{l-1}}$\nover that of $Y_l$, rank {r}", lambda x: x.ratio("unit", r), RATIO),
        ("cosine of $Y_l$ and $Y_{l-1}$\n", lambda x: x.cosine, SIGNED),
        ("least-squares factor $b_0$\n", lambda x: x.b0, FACTOR),
        (
            "effective rank of $Y_l$\n(share of the width)",
            lambda x: x.effective_rank("output") / min(x.width, x.tokens),
            SHARE,
        ),
    ]
    figure = _figure(2.4 + 0.52 * len(spectra.positions) * 3, 2.6 + 2 * _map_height(spectra.layers), title)
    all_axes = figure.subplots(2, 3).flat
    for axes, (label, value, style) in zip(all_axes, maps, strict=True):
        _map(axes, spectra, value, label, style)
    _save(figure, path)


def draw_comparison(before: Spectra, after: Spectra, path: Path, title: str) -> None:
    """Before and after in one figure: curves by position (before dashed), and maps of what changed."""
    figure = _figure(13.0, 0.0, title)
    columns, rows = _shape(len(before.positions))
    height = 2.5 * rows
    map_height = 1.4 + _map_height(before.layers)
    figure.set_size_inches(13.0, height + map_height + 1.2)
    upper, lower = figure.subfigures(2, 1, height_ratios=[height + 0.6, map_height])
    panels = list(zip(upper.subplots(rows, columns, squeeze=False).flat, before.positions, strict=False))
    for axes, position in panels:
        for kind in ("output", "least_squares"):
            _curve(axes, before, position.name, kind, label=f"{LABELS[kind]}, before", linestyle="--", shaded=False)
            _curve(axes, after, position.name, kind, label=f"{LABELS[kind]}, after", shaded=False)
    _finish_grid(upper, panels, before)
    r = before.quarter
    maps: list[tuple[str, Callable[[LinearSpectra], float | None], dict[str, Any]]] = [
        (f"error of $Y_l$ at rank {r}:\nafter minus before", lambda x: x.relative_error("output", r), CHANGE),
        ("cosine of neighbours:\nafter minus before", lambda x: x.cosine, CHANGE),
        (
            f"error ratio of $Y_l - b_0 Y_{{l-1}}$, rank {r}:\nafter minus before",
            lambda x: x.ratio("least_squares", r),
            CHANGE,
        ),
    ]
    for axes, (label, value, style) in zip(lower.subplots(1, 3).flat, maps, strict=True):

        def change(x: LinearSpectra, value=value) -> float | None:
            other = before.at(x.layer, x.position)
            now, then = value(x), None if other is None else value(other)
            return None if now is None or then is None else now - then

        _map(axes, after, change, label, style)
    _save(figure, path)


def draw_ranks(spectra: Spectra, suggested: SuggestedRanks, path: Path, title: str) -> None:
    """Suggested ranks over layers and positions."""
    figure = _figure(1.8 + 0.75 * len(spectra.positions), 1.8 + _map_height(spectra.layers), title)
    label = f"rank ({suggested.parameters:,} parameters in A and B)"
    style = {"cmap": "YlGnBu", "vmin": 0, "vmax": max(suggested.ranks.values()), "format": "{:.0f}"}
    _map(figure.subplots(), spectra, lambda x: suggested.ranks.get((x.layer, x.position)), label, style)
    _save(figure, path)


def draw_health(health: Sequence[dict[str, Any]], log: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """A CR-Net run over time: b, increments and gradients by layer and position; loss, gradient norm and drift."""
    from matplotlib.colors import LogNorm, TwoSlopeNorm

    tokens = np.array([line["tokens"] for line in health]) / 1e6
    names = list(health[0]["b"])
    tables = {
        # [layers, logs], not a number where a position does not build on the layer below
        what: {p: np.array([line[what][p] for line in health], dtype=float).T for p in names}
        for what in ("b", "increment_ratio", "gradient_norm")
    }
    spread = max(0.05, max(np.nanmax(np.abs(table - 1)) for table in tables["b"].values()))
    norms = {
        "b": TwoSlopeNorm(1.0, 1.0 - spread, 1.0 + spread),
        "increment_ratio": LogNorm(*_log_range(tables["increment_ratio"])),
        "gradient_norm": LogNorm(*_log_range(tables["gradient_norm"])),
    }
    labels = {
        "b": ("b", "RdBu_r"),
        "increment_ratio": (r"$|XAB|\,/\,|b\,Y_{l-1}|$", "viridis"),
        "gradient_norm": ("gradient norm of A, B\n(after clipping)", "magma"),
    }
    figure = _figure(14.0, 10.0, title)
    upper, lower = figure.subfigures(2, 1, height_ratios=[3.1, 1.25])
    grid = upper.subplots(3, len(names), sharex=True, sharey=True, squeeze=False)
    for row, (what, (label, colours)) in zip(grid, labels.items(), strict=True):
        for axes, position in zip(row, names, strict=True):
            table = tables[what][position]
            image = axes.pcolormesh(
                tokens, np.arange(1, len(table) + 1), table, cmap=colours, norm=norms[what], shading="nearest"
            )
            axes.invert_yaxis() if not axes.yaxis_inverted() else None
            if what == "b":
                axes.set_title(position)
        _whole_ticks(row[0], len(table))
        row[0].set_ylabel("layer")
        upper.colorbar(image, ax=list(row), label=label, pad=0.01, aspect=12)
    for axes in grid[-1]:
        axes.set_xlabel("tokens (millions)")
        axes.locator_params(axis="x", nbins=3)
    _draw_run(lower.subplots(1, 3), health, log, tables["b"])
    _save(figure, path)


def _draw_run(axes, health, log, b: dict[str, np.ndarray]) -> None:
    """Loss, gradient norm and drift of a run, against tokens."""
    loss, gradient, drift = axes

    def series(key: str, lines=log) -> tuple[list[float], list[float]]:
        found = [(line["num_input_tokens_seen"] / 1e6, line[key]) for line in lines if key in line]
        return [x for x, _ in found], [y for _, y in found]

    loss.plot(*series("loss"), color="#1b5e9e", linewidth=1.2, label="training")
    loss.plot(*series("eval_loss"), color="#d1660a", linewidth=1.2, marker="o", markersize=3, label="validation")
    loss.set_ylabel("loss (nats per token)")
    gradient.plot(*series("grad_norm"), color="#1b5e9e", linewidth=1.2, label="all parameters, before clipping")
    gradient.set_ylabel("gradient norm")
    gradient.set_yscale("log")
    tokens = [line["tokens"] / 1e6 for line in health]
    # What one rounding error of the last layer's Y has grown to when inversion has reached the first: prod 1/|b|.
    growth = [max(float(np.nanprod(1 / np.abs(table[:, i]))) for table in b.values()) for i in range(len(tokens))]
    drift.plot(tokens, np.array(growth) * 6e-8, color="0.5", linewidth=1.2, label="estimate: 6e-8 · largest Π 1/|b|")
    if any("recompute_drift" in line for line in log):
        drift.plot(*series("recompute_drift"), color="#1b5e9e", linewidth=1.2, label="measured (recompute_drift)")
    drift.set_ylabel("relative error of rebuilt states")
    drift.set_yscale("log")
    for panel in axes:
        panel.set_xlabel("tokens (millions)")
        panel.grid(alpha=0.3)
        if panel.get_lines():
            panel.legend(fontsize=8, framealpha=0.8, edgecolor="none")


SHARE = {"cmap": "viridis_r", "vmin": 0.0, "vmax": 1.0, "format": "{:.2f}"}
RATIO = {"cmap": "RdBu_r", "vmin": 0.0, "vmax": 2.0, "format": "{:.2f}"}
SIGNED = {"cmap": "RdBu_r", "vmin": -1.0, "vmax": 1.0, "format": "{:.2f}"}
FACTOR = {"cmap": "RdBu_r", "vmin": -2.0, "vmax": 2.0, "format": "{:.2f}"}
CHANGE = {"cmap": "RdBu_r", "symmetric": True, "format": "{:+.2f}"}


def _curve(axes, spectra: Spectra, position: str, kind: str, *, label: str, linestyle="-", shaded=True) -> None:
    linears = [x for x in spectra.of(position, kind) if "least_squares" in x.squares]
    if not linears:
        return
    errors = np.stack([x.relative_errors(kind).numpy() for x in linears])[:, 1:]
    ranks = np.arange(1, errors.shape[1] + 1)
    wide = {"linewidth": 3.2, "alpha": 0.45} if kind == "output" else {"linewidth": 1.4}  # others may lie on top of it
    axes.plot(ranks, errors.mean(0), color=COLOURS[kind], linestyle=linestyle, label=label, **wide)
    if shaded:
        axes.fill_between(ranks, errors.min(0), errors.max(0), color=COLOURS[kind], alpha=0.13, linewidth=0)


def _shape(count: int) -> tuple[int, int]:
    columns = min(4, count)
    return columns, -(-count // columns)


def _grid(spectra: Spectra, title: str):
    columns, rows = _shape(len(spectra.positions))
    figure = _figure(3.2 * columns, 2.6 * rows + 1.3, title)
    return figure, list(zip(figure.subplots(rows, columns, squeeze=False).flat, spectra.positions, strict=False))


def _finish_grid(figure, panels, spectra: Spectra) -> None:
    columns, _ = _shape(len(panels))
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    for index, (axes, position) in enumerate(panels):
        axes.set_xscale("log", base=2)
        axes.set_xlim(1, position.width)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{position.name} ({position.width} wide)", fontsize=10)
        axes.grid(alpha=0.3)
        if index % columns == 0:
            axes.set_ylabel(r"relative error, in $|Y_l|_F$")
        if index >= len(panels) - columns:
            axes.set_xlabel("rank r")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


def _map(axes, spectra: Spectra, value: Callable, label: str, style: dict[str, Any]) -> None:
    names = [position.name for position in spectra.positions]
    table = np.full((spectra.layers, len(names)), np.nan)
    for linear in spectra.linears:
        found = value(linear)
        if found is not None:
            table[linear.layer, names.index(linear.position)] = found
    if style.get("symmetric"):
        bound = max(0.01, float(np.nanmax(np.abs(table), initial=0.0)))
        low, high = -bound, bound
    else:
        low, high = style["vmin"], style["vmax"]
    image = axes.imshow(table, cmap=style["cmap"], vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) < 6 else 60)
    _whole_ticks(axes, spectra.layers, first=0)
    axes.set_ylabel("layer")
    axes.set_title(label, fontsize=10)
    axes.figure.colorbar(image, ax=axes, pad=0.02)
    if spectra.layers > FEW_LAYERS:
        return
    for (layer, column), number in np.ndenumerate(table):
        if not math.isnan(number):
            red, green, blue, _ = image.cmap(image.norm(number))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text = style["format"].format(number)
            axes.text(column, layer, text, ha="center", va="center", fontsize=6.5, color="white" if dark else "black")


def _map_height(layers: int) -> float:
    return max(1.8, min(0.27 * layers, 7.0))


def _whole_ticks(axes, layers: int, first: int = 1) -> None:
    step = -(-layers // 12)
    axes.set_yticks(range(first, first + layers, step))


def _log_range(table: dict[str, np.ndarray]) -> tuple[float, float]:
    values = np.concatenate([row[row > 0] for row in table.values()])
    if not values.size:
        return 1e-8, 1.0
    low, high = np.quantile(values, [0.01, 0.999])
    return float(low), float(max(high, low * 1.01))


def _figure(width: float, height: float, title: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height or 1.0), dpi=DPI, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=12)
    return figure


def _save(figure, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


__all__ = ["draw_comparison", "draw_curves", "draw_health", "draw_maps", "draw_ranks"]
