"""The paper's grid: 0 to 6 fuses against 0 to 6 injections (arXiv 2503.00572 shows it for MRPC).

    python benchmarks/lor2c_grid.py --model FOLDER --task mrpc --data DIR [--auto]

Each cell is one `imlor2c` run with its own numbers, everything else equal. Every cell is written at once, so that the
sweep goes on where it stopped. `--auto` adds one run that decides both numbers from the spectra. Cells that a model of
few blocks cannot have (more changes than modules) are left out.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
MOST = 6


def run_cell(fuses: int | str, injections: int | str, options) -> dict:
    from crosslayer.train import build_finetune_recipe
    from crosslayer.train.finetune import train_once
    from crosslayer.train.methods import count_trained

    recipe = build_finetune_recipe(
        {
            "name": "lor2c_grid",
            "model": str(options.model),
            "data": {
                "task": options.task,
                "data": None if options.data is None else str(options.data),
                "max_train_rows": options.rows,
                "max_length": options.max_length,
            },
            "adapter": {
                "method": "imlor2c",
                "r": options.r,
                "max_fuses": fuses,
                "max_injections": injections,
                "interval_unit": "steps",
            },
            "training": {
                "num_train_epochs": options.epochs,
                "learning_rate": options.learning_rate,
                "seed": options.seed,
                "eval_strategy": "no",
                "disable_tqdm": True,
            },
        }
    )
    measured = train_once(recipe)
    history = measured.attached.history
    done = [entry["action"] for entry in history]
    return {
        "fuses": fuses,
        "injections": injections,
        "done": {"fuses": done.count("fuse"), "injections": done.count("inject")},
        "metrics": measured.metrics,
        "adapter_parameters": count_trained(measured.attached.model)["adapter"],
        "structure": [{name: entry[name] for name in ("step", "action", "blocks")} for entry in history],
    }


def possible(fuses: int, injections: int, blocks: int) -> bool:
    """Whether so many changes fit: a fused module keeps a block from being injected."""
    return fuses + injections <= blocks - (1 if fuses else 0)


def print_table(cells: list[dict]) -> None:
    """Deciding metric in percent: fuses down, injections across."""
    found = {(cell["fuses"], cell["injections"]): next(iter(cell["metrics"].values())) for cell in cells}
    print("| fuses \\ injections | " + " | ".join(str(i) for i in range(MOST + 1)) + " |")
    print("|---|" + "---|" * (MOST + 1))
    for fuses in range(MOST + 1):
        row = [f"{100 * found[fuses, i]:.1f}" if (fuses, i) in found else "-" for i in range(MOST + 1)]
        print(f"| {fuses} | " + " | ".join(row) + " |")
    if ("auto", "auto") in found:
        auto = next(cell for cell in cells if cell["fuses"] == "auto")
        print(f"auto: {100 * found['auto', 'auto']:.1f} with {auto['done']}, {auto['adapter_parameters']:,} parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, or a name on the hub")
    parser.add_argument("--task", default="mrpc")
    parser.add_argument("--data", type=Path, help="local folder of the task")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning_rate", type=float, default=4e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=MOST, help="largest number of fuses and of injections")
    parser.add_argument("--auto", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lor2c_grid.json")
    options = parser.parse_args()
    if options.most > MOST:
        parser.error(f"--most {options.most} is above {MOST}")

    from transformers import AutoConfig

    from crosslayer.cli.common import quiet_libraries
    from crosslayer.provenance import describe_run
    from crosslayer.train.run_folder import read_json, write_json
    from result_file import command_of, describe_model

    quiet_libraries()
    settings = {
        name: str(value)
        for name, value in vars(options).items()
        if name not in ("out", "auto", "data", "most", "model")
    }
    content = read_json(options.out)
    if content is not None and content["settings"] != settings:
        parser.error(f"{options.out} holds a grid with other settings {content['settings']}; give another --out")
    cells = [] if content is None else content["cells"]
    blocks = AutoConfig.from_pretrained(options.model).num_hidden_layers
    numbers = range(options.most + 1)
    wanted = [(f, i) for f in numbers for i in numbers if possible(f, i, blocks)]
    wanted += [("auto", "auto")] if options.auto else []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for fuses, injections in wanted:
        if any((cell["fuses"], cell["injections"]) == (fuses, injections) for cell in cells):
            continue
        cells.append(run_cell(fuses, injections, options))
        run = describe_run(f"{command_of('lor2c_grid.py', settings)} --auto")
        content = {"model": describe_model(options.model), "settings": settings, "run": run, "cells": cells}
        write_json(options.out, content)
        print(
            json.dumps(cells[-1]["metrics"] | {"fuses": fuses, "injections": injections}), file=sys.stderr, flush=True
        )
    print_table(cells)


if __name__ == "__main__":
    main()
