"""What an analysis leaves in its folder: spectra.json, summary.md and, where matplotlib is installed, figures."""

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..provenance import Provenance
from .ranks import SuggestedRanks
from .spectra import Spectra
from .summary import compare, summarise


def write_analysis(
    folder: Path, spectra: Spectra, what: dict[str, str], run: Provenance, suggested: SuggestedRanks | None = None
) -> tuple[dict[str, Any], str]:
    """One model: curves.png, maps.png and, with suggested ranks, ranks.png. Returns the JSON and the summary."""
    content = {**what, **spectra.to_dict(), "suggested": suggested.to_dict() if suggested else None, "run": run}
    words = summarise(spectra, what, suggested)
    _write(folder, content, words)
    if has_matplotlib():
        from . import plots

        title = f"{what['model']}, {spectra.tokens:,} tokens of {what['text']}"
        plots.draw_curves(spectra, folder / "curves.png", f"Best rank-r approximation, mean over layers: {title}")
        plots.draw_maps(spectra, folder / "maps.png", f"Layers and positions: {title}")
        if suggested is not None:
            plots.draw_ranks(spectra, suggested, folder / "ranks.png", f"Suggested ranks: {what['model']}")
    return content, words


def write_comparison(
    folder: Path, before: Spectra, after: Spectra, what: dict[str, str], run: Provenance
) -> tuple[dict[str, Any], str]:
    """Two models: comparison.png. Returns the JSON and the summary. Raises ConfigError where they do not match."""
    words = compare(before, after, what)
    content = {**what, "before_spectra": before.to_dict(), "after_spectra": after.to_dict(), "run": run}
    _write(folder, content, words)
    if has_matplotlib():
        from .plots import draw_comparison

        title = f"{what['before']} (before) and {what['after']} (after), {before.tokens:,} tokens of {what['text']}"
        draw_comparison(before, after, folder / "comparison.png", title)
    return content, words


def make_folder(folder: Path) -> None:
    """Raises CheckpointError where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}; choose another output_dir") from None


def has_matplotlib() -> bool:
    """Whether pictures can be drawn."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def _write(folder: Path, content: dict[str, Any], words: str) -> None:
    make_folder(folder)
    for name, text in (("spectra.json", json.dumps(rounded(content), indent=1) + "\n"), ("summary.md", words)):
        temporary = folder / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)


def rounded(content: Any) -> Any:
    """Floats to six significant digits: more than float32 sums give."""
    if isinstance(content, float):
        return float(f"{content:.6g}")
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    return [rounded(value) for value in content] if isinstance(content, list | tuple) else content


__all__ = ["has_matplotlib", "make_folder", "rounded", "write_analysis", "write_comparison"]
