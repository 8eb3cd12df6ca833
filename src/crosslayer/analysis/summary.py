"""Spectra in words: one page that says what was measured, what it means and how far it goes."""

import statistics
from collections.abc import Iterable

from ..errors import ConfigError
from .ranks import SuggestedRanks
from .spectra import LinearSpectra, Spectra

DEFINITIONS = (
    "Errors are Frobenius norms relative to |Y_l|, so a ratio below 1 says that a low-rank increment on top of the "
    "layer before (CR-Net, arXiv 2509.18993) fits better than a low-rank output alone. b0 is the least-squares factor "
    "over all tokens; the cosine is that of the two outputs as whole matrices, and sqrt(1 - cosine^2) is the error at "
    "rank 0."
)


def summarise(spectra: Spectra, what: dict[str, str], suggested: SuggestedRanks | None = None) -> str:
    """Markdown. `what` is {line label: value} about model, text and command."""
    r = spectra.quarter
    gains = ratios(spectra, "least_squares")
    lines = [f"# Cross-layer spectra of {what['model']}", ""]
    lines += [f"- {label}: {value}" for label, value in what.items() if label != "model"]
    lines += [f"- {spectra.layers} layers, {spectra.tokens:,} tokens, rank {r} (a quarter of the width)", ""]
    lines += ["## Finding", "", finding(spectra), ""]
    if "learned" in spectra.kinds:
        own = [x.relative_error("learned", x.rank or r) for x in spectra.linears if "learned" in x.squares]
        lines += [
            f"With the model's own b the difference is low rank by construction: what is left at the model's rank is "
            f"at most {max(own):.1e} of |Y_l| (float32 sums leave about 1e-4 to 1e-3).",
            "",
        ]
    lines += ["## By position", "", *table(spectra), ""]
    if gains:
        best, worst = min(gains, key=lambda pair: pair[0]), max(gains, key=lambda pair: pair[0])
        lines += [
            f"The lowest ratio is {best[0]:.2f} ({_name(best[1])}), the highest {worst[0]:.2f} ({_name(worst[1])}).",
            "",
        ]
    if suggested is not None:
        lines += ["## Suggested ranks", "", *ranks_in_words(suggested), ""]
    lines += ["## How to read it", "", DEFINITIONS]
    widest = max(position.width for position in spectra.positions)
    if spectra.tokens < 4 * widest:
        lines += [
            "",
            f"Careful: {spectra.tokens:,} tokens are fewer than four times the widest output ({widest}); a sample that "
            "small looks closer to low rank than the layer is. Raise max_tokens.",
        ]
    return "\n".join(lines) + "\n"


def compare(before: Spectra, after: Spectra, what: dict[str, str]) -> str:
    """Markdown on two models of one shape. Raises ConfigError where their positions or layers differ."""
    shapes = [[(p.name, p.width, s.layers) for p in s.positions] for s in (before, after)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"{what['before']} and {what['after']} cannot be compared: their layers, positions or widths differ; give "
            "two models of one shape"
        )
    r = before.quarter
    lines = [f"# Cross-layer spectra of {what['before']} and {what['after']}", ""]
    lines += [f"- {label}: {value}" for label, value in what.items()]
    lines += [f"- {before.layers} layers, {before.tokens:,} tokens, rank {r} (a quarter of the width)", ""]
    lines += ["## Before", "", finding(before), "", "## After", "", finding(after), "", "## What changed", ""]
    header = ["position", "cosine", f"error of Y_l, r={r}", "error of Y_l - b0 Y_{l-1}", "effective rank of Y_l"]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for position in before.positions:
        pairs = [s.of(position.name, "least_squares") for s in (before, after)]
        values = (
            ("{:.2f}", [[x.cosine or 0.0 for x in xs] for xs in pairs]),
            ("{:.3f}", [[x.relative_error("output", r) for x in xs] for xs in pairs]),
            ("{:.3f}", [[x.relative_error("least_squares", r) for x in xs] for xs in pairs]),
            ("{:.0f}", [[x.effective_rank("output") for x in xs] for xs in pairs]),
        )
        cells = [f"{form} to {form}".format(*(statistics.mean(xs) for xs in two)) for form, two in values]
        lines.append("| " + " | ".join([position.name, *cells]) + " |")
    return "\n".join([*lines, "", "Means over the layers that have one below.", "", DEFINITIONS]) + "\n"


def finding(spectra: Spectra) -> str:
    """One paragraph: does subtracting the layer before help, at rank h / 4?"""
    r = spectra.quarter
    gains = [value for value, _ in ratios(spectra, "least_squares")]
    unit = [value for value, _ in ratios(spectra, "unit")]
    if not gains:
        return f"At rank {r} every output is exactly low rank already; there is nothing left to compare."
    cosines = [x.cosine for x in spectra.linears if x.cosine is not None]
    middle, better = statistics.median(gains), sum(value < 0.98 for value in gains)
    if middle < 0.9:
        verdict = "Yes: outputs of neighbouring layers are close enough for a low-rank increment to pay"
    elif middle < 0.98:
        verdict = "A little: a low-rank increment on the layer before fits slightly better than a low-rank output"
    elif middle <= 1.02:
        verdict = "No: subtracting the layer before changes next to nothing"
    else:
        verdict = "No: subtracting the layer before makes the outputs harder to approximate"
    return (
        f"{verdict}. With b0 the error at rank {r} is {middle:.2f} times that of the output alone (median over "
        f"{len(gains)} linears, {min(gains):.2f} to {max(gains):.2f}; more than 2 % lower in {better} of them); with "
        f"b = 1 it is {statistics.median(unit):.2f} times ({min(unit):.2f} to {max(unit):.2f}). The cosine of "
        f"neighbours has the median {statistics.median(cosines):.2f} ({min(cosines):.2f} to {max(cosines):.2f})."
    )


def table(spectra: Spectra) -> list[str]:
    """Means over the layers that have one below, a row a position."""
    r = spectra.quarter
    learned = "learned" in spectra.kinds
    header = ["position", "width", "cosine", "b0", f"Y_l, r={r}", "Y_l - b0 Y_{l-1}", "Y_l - Y_{l-1}"]
    header += ["own b"] if learned else []
    header += ["effective rank of Y_l", "rank for 99 % of the energy"]
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for position in spectra.positions:
        linears = spectra.of(position.name, "least_squares")

        def mean(values: Iterable[float | None]) -> float:
            return statistics.mean(value for value in values if value is not None)

        cells = [position.name, str(position.width)]
        cells += [f"{mean(x.cosine for x in linears):.2f}", f"{mean(x.b0 for x in linears):.2f}"]
        kinds = ["output", "least_squares", "unit"] + (["learned"] if learned else [])
        cells += [f"{mean(x.relative_error(kind, r) for x in linears):.3f}" for kind in kinds]
        cells += [f"{mean(x.effective_rank('output') for x in linears):.0f}"]
        cells += [f"{mean(float(x.energy_rank('output', 0.99)) for x in linears):.0f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def ranks_in_words(suggested: SuggestedRanks) -> list[str]:
    """Suggested ranks for people, a line each."""
    patterns = ", ".join(f"'{pattern}': {rank}" for pattern, rank in suggested.rank_pattern.items())
    basis = {"learned": "the increments of the model itself", "least_squares": "Y_l - b0 Y_{l-1}"}[suggested.basis]
    return [
        f"{suggested.parameters:,} of {suggested.budget:,} parameters in A and B, ranks in steps of "
        f"{suggested.multiple}, from the singular values of {basis}. As a field of CRNetConfig or of a recipe's model "
        "section:",
        "",
        f"    rank_pattern: {{{patterns}}}",
    ]


def ratios(spectra: Spectra, kind: str) -> list[tuple[float, LinearSpectra]]:
    """(error of the kind over that of Y_l at a quarter of the width, linear), where the latter is not nothing."""
    found = [(x.ratio(kind, spectra.quarter), x) for x in spectra.linears]
    return [(value, x) for value, x in found if value is not None]


def _name(linear: LinearSpectra) -> str:
    return f"layers.{linear.layer}.{linear.position}"


__all__ = ["compare", "finding", "summarise", "table"]
