"""What a fine-tuning run leaves behind for people: a table, sample answers, a picture of the structure."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..analysis.structure_plot import draw_structure
from ..provenance import Provenance


@dataclass(kw_only=True, frozen=True)
class FinetuneReport:
    """Everything a run measured."""

    recipe: dict[str, Any]
    run: Provenance
    plan: dict[str, Any]
    seed: int
    before: dict[str, Any] | None
    after: dict[str, Any]
    steps: int
    best_step: int | None
    trained: dict[str, int]
    """Parameters that train: adapter (in use at the end), head, base."""
    structure: list[dict[str, Any]]
    """Decisions of the structure callback."""
    blocks: int | None
    peak_memory_bytes: int
    seconds: float
    history: list[dict[str, Any]]
    samples: list[dict[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """The final table, as (what, value)."""
        plan = self.plan
        parts = ", ".join(f"{count:,} {name}" for name, count in self.trained.items() if count)
        share = sum(self.trained.values()) / plan["parameters"]
        rows = [
            ("method", plan["method"]),
            ("trainable parameters", f"{parts} ({share:.2%} of {plan['parameters']:,})"),
        ]
        for metric in dict.fromkeys([*plan["metrics"], "loss"]):
            after = self.after.get(f"eval_{metric}")
            if after is not None:
                before = (self.before or {}).get(f"eval_{metric}")
                start = "" if before is None else f"{before:.4f} before, "
                rows.append((f"validation {metric.replace('_', ' ')}", f"{start}{after:.4f} after"))
        if self.best_step is not None:
            rows.append(("best checkpoint", f"step {self.best_step} of {self.steps}"))
        for entry in self.structure:
            blocks = ", ".join(str(block) for block in entry["blocks"])
            plural = "s" if len(entry["blocks"]) > 1 else ""
            is_later = self.best_step is not None and entry["step"] > self.best_step
            note = " (after the best checkpoint)" if is_later else ""
            rows.append((f"step {entry['step']}", f"{entry['action']} block{plural} {blocks}{note}"))
        rows.append(("peak memory", f"{self.peak_memory_bytes / 2**20:,.0f} MiB"))
        rows.append(("time", f"{self.seconds:,.0f} s on {plan['device']}"))
        return rows


def write_finetune_report(output_dir: Path, report: FinetuneReport) -> None:
    """report.json, report.md, log.jsonl, and structure.png where the structure changed and matplotlib is installed."""
    (output_dir / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in report.history), encoding="utf-8")
    table = "\n".join(f"| {what} | {value} |" for what, value in report.rows())
    answers = "".join(f"\n**{s['prompt'].strip()}**\n\n{s['answer'].strip()}\n" for s in report.samples)
    (output_dir / "report.md").write_text(
        f"# {report.recipe['name']}\n\n{report.recipe['description']}\n\n{report.plan['task']} with "
        f"{report.plan['model']}\n\n| | |\n|---|---|\n{table}\n"
        + (f"\n## Sample answers\n{answers}" if answers else ""),
        encoding="utf-8",
        errors="backslashreplace",
    )
    if report.structure and report.blocks:
        draw_structure(output_dir / "structure.png", report.structure, report.blocks, report.steps)
    # Last: a folder with this file holds a finished run.
    (output_dir / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
