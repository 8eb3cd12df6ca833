"""A long run on a CPU: whether memory stays flat and speed steady.

    python benchmarks/soak.py --hours 1

`crosslayer pretrain` runs with --max_hours, logging, evaluating and saving often; its resident memory is read every few
seconds from outside. Memory is flat if its trend after the first tenth adds less than a hundredth to it by the end.
Speed is steady if the medians of the first and the last third are within a tenth of each other, once divided by the
machine's own pace: the evaluations in between, whose work stays the same, tell whether other programs were busy.
"""

import argparse
import json
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from result_file import ResultFile
from small_run import COMMAND, write_recipe

MODEL = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "rank": 16}
STOPPED = 75


def watch(command: list[str], log: Path, every_s: float) -> list[tuple[float, int]]:
    """[(seconds since the start, resident bytes)] of a command, to its end. Raises RuntimeError where it fails."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    started, found = time.monotonic(), []
    while process.poll() is None:
        try:
            found.append((round(time.monotonic() - started, 1), psutil.Process(process.pid).memory_info().rss))
        except psutil.Error:  # over by now
            break
        time.sleep(every_s)
    if process.wait() != STOPPED:
        raise RuntimeError(f"ended with {process.returncode}: {log.read_text()[-3000:]}")
    return found


def trend(memory: list[tuple[float, int]]) -> float:
    """What the slope of a line through the last nine tenths adds, as a share of their mean."""
    rest = memory[len(memory) // 10 :]
    times, sizes = zip(*rest, strict=True)
    slope = statistics.linear_regression(times, sizes).slope
    return slope * (times[-1] - times[0]) / statistics.fmean(sizes)


def last_over_first_third(values: list[float]) -> float:
    """Of their medians."""
    third = max(len(values) // 3, 1)
    return round(statistics.median(values[-third:]) / statistics.median(values[:third]), 3)


def measure(root: Path, hours: float, every_s: float) -> dict[str, Any]:
    recipe = write_recipe(
        root / "soak",
        4000,
        MODEL,
        {"block_size": 128, "max_validation_documents": 50},
        max_steps=10**7,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        logging_steps=50,
        eval_steps=500,
        save_steps=500,
    )
    log, folder = root / "soak" / "output.log", root / "soak" / "run"
    command = [*COMMAND, "--recipe", str(recipe), "--output_dir", str(folder), "--max_hours", str(hours)]
    memory = watch(command, log, every_s)
    said = log.read_text()
    speeds = [float(number.replace(",", "")) for number in re.findall(r"([\d,]+) tokens/s", said)]
    last = json.loads((max(folder.glob("checkpoint-*"), key=_step) / "trainer_state.json").read_text())
    return {
        "hours": hours,
        "steps": last["global_step"],
        "memory_bytes": memory,
        "memory_trend": round(trend(memory), 5),
        "tokens_per_s": speeds,
        "speed_last_over_first_third": last_over_first_third(speeds),
        "log": last["log_history"],
    }


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks at the memory")
    parser.add_argument("--redo", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    options = parser.parse_args()
    results = ResultFile(options.out, "a long run on a CPU: memory and speed", redo=options.redo)
    with tempfile.TemporaryDirectory() as root:
        found = results.section("soak", lambda: measure(Path(root), options.hours, options.every))
    is_flat = abs(found["memory_trend"]) < 0.01
    pace = 1 / last_over_first_third([line["eval_runtime"] for line in found["log"] if "eval_runtime" in line])
    speed = found["speed_last_over_first_third"]
    is_steady = abs(speed / pace - 1) < 0.1
    print(f"{found['steps']:,} steps in {found['hours']:g} h")
    print(f"memory: {found['memory_trend']:+.2%} over the run, {'flat' if is_flat else 'NOT flat'}")
    steady = "steady" if is_steady else "NOT steady"
    print(f"speed: last third over first {speed:.2f}, of evaluations {pace:.2f}, {steady}")


if __name__ == "__main__":
    main()
