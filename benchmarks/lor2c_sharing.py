"""An A shared within groups of neighbouring blocks, against one A for all and none shared, at equal parameters.

    python benchmarks/lor2c_sharing.py --glue DIR            # DIR/sst2/train.jsonl.gz and so on; about 60 CPU minutes
    python benchmarks/lor2c_sharing.py --glue DIR --smoke    # 32 rows a run, one task, one seed; writes nothing

The encoder, rows, order, tokens and steps are those of benchmarks/lor2c_minilm.py. Ranks make the contenders equal in
trained parameters: 384 numbers for each direction of an A and of the B's of six blocks, 72 of them in all (70 with
one A for all, whose rank cannot be cut finer).

    none shared     r = 6     12 a direction
    three groups    r = 8      9
    two groups      r = 9      8
    one A for all   r = 10     7

Which blocks share is decided by crosslayer.analysis.sharing from a run of its own for each task, on the tuning seed:
one A for all at a larger rank. Another, with an A in each block, is looked at beside it. Controls: groups of equal
length; all other cuts into two groups on SST-2; one more cut into three. Rates: three a factor of four apart for each
number of groups (equal ones), tried on SST-2 with a seed of their own.
"""

import argparse
import random
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from lor2c_minilm import (
    ADAPTER_RATES,
    SEEDS,
    TUNING_SEED,
    TUNING_TASK,
    deciding,
    fetch_model,
    make_key,
    mean_and_spread,
    measure,
)
from result_file import ResultFile

TASKS = ("sst2", "mrpc")
BLOCKS = 6
RANKS = {0: 6, 3: 8, 2: 9, 1: 10}
"""Number of groups (0: none shared) -> rank."""
PROBE_RANK = 64
PROBE_ALPHA = 16 * PROBE_RANK / RANKS[1]
"""The scaling alpha / r of the contender with one A for all, whose rate the probe takes."""
EQUAL = {1: [0], 2: [0, 3], 3: [0, 2, 4]}


def cuts(groups: int) -> list[list[int]]:
    """All ways to cut the blocks into so many groups of neighbours, by the first block of each."""
    return [[0, *rest] for rest in combinations(range(1, BLOCKS), groups - 1)]


def adapter_of(starts: list[int] | None, rank: int) -> dict[str, Any]:
    """`adapter` of a recipe; None: no A is shared."""
    return {"method": "lor2c" if starts is None else "sharelor2c", "r": rank, "share_A": starts}


def name_of(starts: list[int] | None) -> str:
    return "none shared" if starts is None else f"A begins at {','.join(map(str, starts))}"


class Study:
    """The runs, each a section of the results' file."""

    def __init__(self, file: ResultFile | None, model: Path | None, options: argparse.Namespace) -> None:
        self.file, self.model, self.options = file, model, options

    def section(self, name: str, measure_it) -> dict[str, Any] | None:
        """From the file, or measured; None where neither may be."""
        if self.file is None:
            return measure_it()
        if name in self.file or self.model is not None:
            return self.file.section(name, measure_it)
        return None

    def key(self, task: str, rate: float, seed: int) -> dict[str, Any]:
        key = {name: value for name, value in make_key("", task, rate, seed).items() if name != "method"}
        return key | ({"rows": 32, "epochs": 1} if self.options.smoke else {})

    def run(self, starts: list[int] | None, task: str, rate: float, seed: int, label: str) -> dict[str, Any] | None:
        rank = RANKS[len(starts or [])]

        def once() -> dict[str, Any]:
            key = self.key(task, rate, seed)
            found, _ = measure(key, adapter_of(starts, rank), self.model, self.options.glue, self.options.work)
            return {"starts": starts, "r": rank, **found}

        found = self.section(f"{label}: {task}, {name_of(starts)}, rate {rate:g}, seed {seed}", once)
        if found is not None:
            print(f"  {100 * deciding(found):.1f}", file=sys.stderr, flush=True)
        return found

    def probe(self, task: str, rate: float, starts: list[int] | None) -> dict[str, Any] | None:
        """What every cut loses, by the updates of a run of a larger rank."""

        def once() -> dict[str, Any]:
            from crosslayer.analysis.sharing import share_groups, sharing_loss

            key = self.key(task, rate, TUNING_SEED)
            adapter = adapter_of(starts, PROBE_RANK) | {"alpha": PROBE_ALPHA}
            found, trained = measure(key, adapter, self.model, self.options.glue, self.options.work)
            if trained is None:
                sys.exit(f"the probe on {task} diverged at rate {rate:g}: there are no spectra to choose by")
            groupings = [cut for groups in (1, 2, 3) for cut in cuts(groups)]
            lost = {name_of(cut): sharing_loss(trained, cut, RANKS[len(cut)]).lost for cut in groupings}
            lost[name_of(None)] = sharing_loss(trained, range(BLOCKS), RANKS[0]).lost
            chosen = {str(groups): share_groups(trained, groups, RANKS[groups]).starts for groups in (2, 3)}
            return {"probe_rank": PROBE_RANK, "lost": lost, "chosen": chosen, **found}

        return self.section(f"probe: {task}, {name_of(starts)}", once)

    def rates(self) -> dict[int, float]:
        """Number of groups -> the best of three rates."""
        best = {}
        for groups in RANKS:
            starts = EQUAL.get(groups)
            runs = [self.run(starts, TUNING_TASK, rate, TUNING_SEED, "tuning") for rate in self.options.rates]
            known = [run for run in runs if run is not None]
            best[groups] = max(known, key=deciding)["learning_rate"] if known else self.options.rates[0]
        return best


def contenders(chosen: dict[str, list[int]], task: str) -> dict[str, list[int] | None]:
    """{what it is: the first block of every group} for a task."""
    found: dict[str, list[int] | None] = {"none shared": None, "one A for all": EQUAL[1]}
    for groups, word in ((2, "two"), (3, "three")):
        found[f"{word} groups, by spectra"] = chosen[str(groups)]
        found[f"{word} groups, of equal length"] = EQUAL[groups]
        others = [cut for cut in cuts(groups) if cut not in (chosen[str(groups)], EQUAL[groups])]
        if groups == 3:
            found["three groups, at random"] = random.Random(0).choice(others)
        elif task == TUNING_TASK:
            found |= {f"two groups, {name_of(cut)}": cut for cut in others}
    return found


def print_table(rows: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Mean and standard deviation over the seeds, in percent."""
    print("| contender | " + " | ".join(f"{task} | groups begin at" for task in rows) + " | trained without head |")
    print("|---|" + "---|---|" * len(rows) + "---|")
    for what in dict.fromkeys(what for of_task in rows.values() for what in of_task):
        cells, trained = [], "-"
        for of_task in rows.values():
            runs = of_task.get(what, [])
            starts = runs[0]["starts"] if runs else None
            cells += [mean_and_spread([100 * deciding(run) for run in runs]), ", ".join(map(str, starts or ["-"]))]
            trained = f"{runs[0]['trained']['adapter']:,}" if runs else trained
        print(f"| {what} | {' | '.join(cells)} | {trained} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", type=Path, required=True, help="folder of task folders with train and validation")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/crosslayer/lor2c_minilm").expanduser())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lor2c_sharing.json")
    parser.add_argument("--model", type=Path, help="folder of an encoder of six blocks [default: the package's]")
    parser.add_argument("--smoke", action="store_true", help="tiny runs, to see that all works; writes nothing")
    parser.add_argument("--table", action="store_true", help="only show what there is")
    options = parser.parse_args()
    options.rates = ADAPTER_RATES[1:2] if options.smoke else ADAPTER_RATES
    tasks, seeds = (TASKS[:1], SEEDS[:1]) if options.smoke else (TASKS, SEEDS)

    what = "validation accuracy after the last step; learning rates tuned for each number of groups on SST-2"
    file = (
        None
        if options.smoke
        else ResultFile(options.out, what, command="python benchmarks/lor2c_sharing.py --glue DIR")
    )
    study = Study(file, None if options.table else options.model or fetch_model(options.work), options)
    rates = study.rates()
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for task in tasks:
        probes = {name: study.probe(task, rates[1], starts) for name, starts in (("one A", [0]), ("own A", None))}
        if probes["one A"] is None:
            continue
        for name, probe in probes.items():
            print(f"{task}, probe with {name}: {probe and probe['chosen']}", file=sys.stderr, flush=True)
        rows[task] = {name: [] for name in contenders(probes["one A"]["chosen"], task)}
        for seed in seeds:
            for name, starts in contenders(probes["one A"]["chosen"], task).items():
                run = study.run(starts, task, rates[len(starts or [])], seed, "table")
                rows[task][name] += [] if run is None else [run]
    print_table(rows)


if __name__ == "__main__":
    main()
