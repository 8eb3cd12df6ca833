"""How large should matrices be at the start, and factors where nothing is carried? Dense, CR-Net, CoLA, plain low rank.

    python benchmarks/starts.py --train train.jsonl.gz --validation valid.jsonl.gz
    python benchmarks/starts.py --write    puts the table of its result into docs/ablations.md

Each start is a comparison as `crosslayer compare` makes it: the shape of crnet_1m_text, 0.5M tokens, the learning rates
of every method searched anew, three seeds. Dense and CR-Net take other values of `initializer_range`, CoLA and plain
low rank of `low_rank_initializer_range`. Runs are files of the work folder, starts are sections of the result, so that
the script goes on where it stopped. About 20 minutes a start on one core, 2.5 hours in all.
"""

import math
import os
import statistics
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from ablations import begin, study_parser
from page_tables import filled, table
from result_file import ResultFile

PAGE = Path(__file__).parents[1] / "docs" / "ablations.md"
RESULTS = Path(__file__).parent / "results" / "starts.json"
COMMAND = "python benchmarks/starts.py --train FILE --validation FILE"
RECIPE = "crnet_1m_text"
LENGTH = {"per_device_train_batch_size": 4, "max_steps": 500, "warmup_steps": 50, "use_cpu": True}
SMOKE_LENGTH = {**LENGTH, "max_steps": 8, "warmup_steps": 1, "block_size": 32, "tokenizer_vocab_size": 300}
TUNING_RUNS, BLOCKS = 14, 64

FIELDS = {
    "low_rank_initializer_range": (("cola", "low_rank"), (0.02, "cola", 0.01, 0.04)),
    "initializer_range": (("dense", "crnet"), (0.02, 0.01, 0.04)),
}
"""Field -> (the methods that begin by it, its values)."""


def measure(field: str, value: float | str, options) -> dict[str, Any]:
    """The methods of a field with it at this value: of each what compare.json holds, curves aside."""
    from crosslayer.compare import Options, compare
    from crosslayer.train import load_recipe

    length = SMOKE_LENGTH if options.smoke else LENGTH
    texts = {"data": str(options.train), "validation_data": str(options.validation)}
    recipe = load_recipe(RECIPE, {**length, **texts, field: value})
    folder = options.work / f"{field}_{value}"
    how = Options(
        methods=FIELDS[field][0],
        seeds=1 if options.smoke else 3,
        tuning_runs=1 if options.smoke else TUNING_RUNS,
        validation_blocks=BLOCKS,
        workers=1,
    )
    found = compare(recipe, how, folder, resume=(folder / "recipe.yaml").is_file(), tell=print)
    methods = {name: {k: v for k, v in row.items() if k != "curves"} for name, row in found["methods"].items()}
    return {"field": field, "value": value, "tuning_steps": found["tuning"]["steps"], "methods": methods}


def starts(path: Path = RESULTS) -> str:
    """A row a start, the methods beside one another: what has been measured of it."""
    results = ResultFile(path, "")
    rows = []
    for field, (methods, values) in FIELDS.items():
        for value in sorted(values, key=str):
            section = f"{field} {value}"
            if section not in results:
                continue
            found = [results[section]["methods"][method] for method in methods]
            rows += [
                [row["label"], f"`{field}` {value}", losses(row), f"{perplexity(row):.1f}", rates(row)] for row in found
            ]
    header = ("method", "start", "validation loss", "perplexity", "rates: embeddings / full rank / factors")
    return table(header, sorted(rows, key=lambda row: row[0])) if rows else "Not measured yet."


def losses(row: dict[str, Any]) -> str:
    return f"{row['loss_mean']:.4f} ± {row['loss_stdev']:.4f}"


def perplexity(row: dict[str, Any]) -> float:
    return math.exp(statistics.mean(row["losses"]))


def rates(row: dict[str, Any]) -> str:
    kinds = ("embedding", "full_rank", "low_rank")
    return " / ".join(f"{row['rates'][kind]:g}" if kind in row["rates"] else "–" for kind in kinds)


TABLES = {"starts": starts}


def main() -> None:
    parser = study_parser(__doc__, "starts", RESULTS, rates=False)
    options = parser.parse_args()
    if options.write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), TABLES, PAGE.name), encoding="utf-8")
        return
    begin(parser, options)
    what = "validation loss (nats per token) of methods by the size of matrices and factors at the start"
    results = ResultFile(options.out, what, command=COMMAND)
    for field, (_, values) in FIELDS.items():
        for value in values:
            results.section(f"{field} {value}", partial(measure, field, value, options))


if __name__ == "__main__":
    main()
