"""Writes docs/claims.md from the files in benchmarks/results, by the claims in docs/claims/.

python docs/make_claims.py

A claim is a decorated function in docs/claims/ that reads the files and returns the values of the row's texts and
whether the claim holds; where a file or a part of it is missing the row says "not run yet".
"""

from collections import Counter
from pathlib import Path

from claims import crnet, lor2c, package  # noqa: F401  they fill CLAIMS
from claims.claim import CANNOT, CLAIMS, FAILS, HOLDS, OPEN, PARTS, Claim, Results

PAGE = Path(__file__).with_name("claims.md")
INTRODUCTION = """\
# Claims

<!-- Written by docs/make_claims.py from benchmarks/results and docs/claims/: change those, then run it. -->

Every claim of both papers and of our own README, what was run here, and what came of it. Figures of the papers are
those that public reviews and notes give; CR-Net's code is not public, and LoR2C's does not run as published. "Here" is
small: models of 0.3 to 7 million parameters (23 million for LoR2C), far from converged.

| verdict | what it means |
|---|---|
| holds | by the rule beside it, which [docs/claims](claims) applies to the figures of the linked files |
| does not hold here | by the same rule |
| cannot be tested here | and why |
| not run yet | the command is there, its result is not |

Higher, lower and level are Welch's t-test over the seeds at 5 %. With three seeds only large differences count, so that
"not higher" is said sooner than "lower". Every figure under "run here" and "result" is read from the files, or counted
by `crosslayer.accounting` from a shape. `FILE`, `DIR`, `FOLDER` and `MODEL` stand for your own text, GLUE folder and
model.

"""
HEADER = "| claim | run here | result | verdict | command |\n|---|---|---|---|---|"


def row(claim: Claim, results: Results) -> tuple[str, str]:
    """(verdict, the line of the page)."""
    results.read.clear()
    verdict, run, result = claim.verdict(results)
    files = [f"[{Path(name).name}](../benchmarks/results/{name})" for name in results.read if run]
    cells = (
        f"{claim.text} ({claim.source})",
        ", ".join([run, *files]),
        result,
        f"**{verdict}**: {claim.cannot}" if claim.cannot else f"**{verdict}**. Rule: {claim.rule}",
        f"`{claim.command}`",
    )
    return verdict, "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page(results: Results | None = None) -> str:
    """All of it."""
    results = results or Results()
    parts, verdicts = [], Counter[str]()
    for part in PARTS:
        rows = [row(claim, results) for claim in CLAIMS if claim.part == part]
        verdicts.update(verdict for verdict, _ in rows)
        parts.append("\n".join([f"## {part}\n", HEADER, *(line for _, line in rows)]))
    counts = " | ".join(str(verdicts[verdict]) for verdict in (HOLDS, FAILS, CANNOT, OPEN))
    total = f"| claims | {HOLDS} | {FAILS} | {CANNOT} | {OPEN} |\n|---|---|---|---|---|\n"
    return INTRODUCTION + total + f"| {verdicts.total()} | {counts} |\n\n" + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
