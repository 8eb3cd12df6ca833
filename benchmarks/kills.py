"""Runs that are killed at random moments, again and again, against runs that are left alone.

    python benchmarks/kills.py --kills 50

A run is started, killed (SIGKILL, all of its processes at once) at a random moment of a kind, started again with
--resume, and so on, till it has been killed in every kind of moment and ends. Runs of one and of two processes take
turns. Looked at after each kill: the newest whole checkpoint is none that is older than before, and no more than
`save_steps` steps have to be taken again. At the end: losses and weights are those of the run that was left alone, bit
for bit.
"""

import argparse
import json
import os
import random
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from crosslayer.train.checkpoints import MANIFEST, checkpoints, damage, step_of
from result_file import ResultFile
from small_run import COMMAND, write_recipe

SAVE_STEPS, EVAL_STEPS, STEPS = 4, 10, 40
MODEL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "rank": 8}


class Run:
    """A run in a folder, and its processes while it is under way."""

    def __init__(self, recipe: Path, folder: Path, processes: int) -> None:
        self.recipe, self.folder, self.world = recipe, folder, processes
        self.output = folder.with_suffix(".log")
        self.under_way: list[subprocess.Popen] = []

    def start(self) -> None:
        command = [*COMMAND, "--recipe", str(self.recipe), "--output_dir", str(self.folder)]
        command += ["--per_device_train_batch_size", str(4 // self.world), "--resume"]
        if not (self.folder / "run.json").is_file():
            command.remove("--resume")
        shared = {**os.environ, "OMP_NUM_THREADS": "1"}
        if self.world > 1:
            shared |= {"WORLD_SIZE": str(self.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        with self.output.open("w") as output:
            self.under_way = [
                subprocess.Popen(command, stdout=output, stderr=output, env={**shared, **_rank(rank, self.world)})
                for rank in range(self.world)
            ]

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def has_ended(self) -> bool:
        """Raises RuntimeError with its last words where it failed."""
        codes = [process.poll() for process in self.under_way]
        if any(code not in (None, 0) for code in codes):
            self.kill()
            raise RuntimeError(f"{self.folder} ended with {codes}: {self.said()[-3000:]}")
        return all(code == 0 for code in codes)

    def wait(self) -> None:
        while not self.has_ended():
            time.sleep(0.05)

    def kill(self) -> None:
        for process in self.under_way:
            process.kill()
        for process in self.under_way:
            process.wait()

    def last_step(self) -> int:
        """The last one that it has said it took."""
        return max((int(step) for step in re.findall(r"step (\d+)/", self.said())), default=0)


def _rank(rank: int, world: int) -> dict[str, str]:
    return {} if world == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# ---------------------------------------------------------------------------------------------------- moments


def is_tokenising(run: Run, at_start: set[str]) -> bool:
    cache = run.recipe.parent / "cache"
    return cache.is_dir() and any(cache.iterdir()) and not (run.folder / "run.json").is_file()


def is_stepping(run: Run, at_start: set[str]) -> bool:
    return run.last_step() % SAVE_STEPS == 2 and bool(_finished(run.folder) - at_start)


def is_saving(run: Run, at_start: set[str]) -> bool:
    return any(f.name not in at_start and not (f / MANIFEST).is_file() for f in checkpoints(run.folder))


def is_evaluating(run: Run, at_start: set[str]) -> bool:
    step = run.last_step()
    return step > 0 and step % EVAL_STEPS == 0 and f"step {step}: validation" not in run.said()


def is_consolidating(run: Run, at_start: set[str]) -> bool:
    return (run.folder / "model").is_dir() and not (run.folder / "report.json").is_file()


MOMENTS: dict[str, tuple[Callable[[Run, set[str]], bool], float]] = {
    "tokenising": (is_tokenising, 0.5),
    "step": (is_stepping, 0.3),
    "save": (is_saving, 0.05),
    "evaluation": (is_evaluating, 0.05),
    "consolidation": (is_consolidating, 0.05),
}
"""Kind of moment -> (whether it has begun, seconds of a random delay)."""


def _finished(folder: Path) -> set[str]:
    return {checkpoint.name for checkpoint in checkpoints(folder) if (checkpoint / MANIFEST).is_file()}


def kill_in(run: Run, moment: str, rng: random.Random) -> dict[str, Any] | None:
    """Start the run, kill it in a moment; what it left, None where it had just ended. Raises RuntimeError where it has
    lost something."""
    has_begun, delay = MOMENTS[moment]
    before = _finished(run.folder)
    run.start()
    while not has_begun(run, before):
        if run.has_ended():
            raise RuntimeError(f"{run.folder} ended before a moment of kind {moment} came")
        time.sleep(0.002)
    time.sleep(rng.random() * delay)
    if run.has_ended():
        return None
    run.kill()
    # What is not whole was being written, or being removed since newer ones are.
    whole = [f for f in checkpoints(run.folder) if (f / MANIFEST).is_file() and damage(f) is None]
    newest = max((step_of(folder) for folder in whole), default=0)
    again = max(run.last_step() - newest, 0)
    if newest < max((int(name.rpartition("-")[2]) for name in before), default=0) or again > SAVE_STEPS:
        raise RuntimeError(f"{run.folder}, killed in {moment}: {newest} is the newest of {before}, {again} steps again")
    half = [folder.name for folder in checkpoints(run.folder) if folder not in whole]
    return {"moment": moment, "processes": run.world, "newest": newest, "steps_again": again, "not_whole": half}


# --------------------------------------------------------------------------------------------------------- runs


def differences(run: Run, left_alone: Run) -> list[str]:
    """What of a run's end is not as it would have been."""
    reports = [json.loads((each.folder / "report.json").read_text()) for each in (run, left_alone)]
    losses = [
        [
            (line["step"], name, line[name])
            for line in report["history"]
            for name in ("loss", "eval_loss")
            if name in line
        ]
        for report in reports
    ]
    weights = [load_file(each.folder / "model" / "model.safetensors") for each in (run, left_alone)]
    found = [str(line) for line in set(losses[0]) ^ set(losses[1])]
    found += [] if len(losses[0]) == len(losses[1]) else ["a loss twice"]
    found += [] if reports[0]["after"]["loss"] == reports[1]["after"]["loss"] else ["final loss"]
    same = weights[0].keys() == weights[1].keys()
    return found + [
        name for name, tensor in weights[0].items() if not same or not bool((tensor == weights[1][name]).all())
    ]


def measure(kills: int, root: Path, seed: int, processes: list[int]) -> dict[str, Any]:
    """Kill runs till `kills` kills are done, and let the last one end."""
    rng = random.Random(seed)
    settings = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "logging_steps": 2, "eval_steps": EVAL_STEPS}
    recipe = write_recipe(
        root / "kills",
        4000,
        MODEL,
        {"block_size": 32, "max_validation_documents": 200},
        eval_strategy="steps",
        **settings,
    )
    left_alone = {world: Run(recipe, root / "kills" / f"left_alone_{world}", world) for world in processes}
    for run in left_alone.values():
        run.start()
        run.wait()
    done: list[dict[str, Any]] = []
    runs = []
    while len(done) < kills:
        world = processes[len(runs) % len(processes)]
        run = Run(recipe, root / "kills" / f"run_{len(runs)}", world)
        shutil.rmtree(recipe.parent / "cache")
        for moment in list(MOMENTS)[: kills - len(done)]:
            kill = kill_in(run, moment, rng)
            done += [kill] if kill is not None else []
            print(f"{len(done)}/{kills}: {kill}", flush=True)
        if not (run.folder / "report.json").is_file():
            run.start()
            run.wait()
        runs.append({"processes": world, "differences": differences(run, left_alone[world])})
        if runs[-1]["differences"]:
            raise RuntimeError(f"{run.folder} ended otherwise: {runs[-1]['differences']}")
    kinds = {
        f"{moment}, {world}": sum(k["moment"] == moment and k["processes"] == world for k in done)
        for moment in MOMENTS
        for world in processes
    }
    return {
        "kills": len(done),
        "kinds": kinds,
        "left_some_not_whole": sum(bool(kill["not_whole"]) for kill in done),
        "most_steps_again": max(kill["steps_again"] for kill in done),
        "save_steps": SAVE_STEPS,
        "runs": runs,
        "each": done,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--redo", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kills.json")
    options = parser.parse_args()
    results = ResultFile(options.out, "runs killed at random moments against runs left alone", redo=options.redo)
    with tempfile.TemporaryDirectory() as root:
        found = results.section("kills", lambda: measure(options.kills, Path(root), options.seed, options.processes))
    print(
        f"{found['kills']} kills, {len(found['runs'])} runs: the losses and weights of runs left alone; at most "
        f"{found['most_steps_again']} steps taken again (save_steps={found['save_steps']})"
    )


if __name__ == "__main__":
    main()
