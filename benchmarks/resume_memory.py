"""Peak memory of a run that goes on from a checkpoint against one that starts at its first step, on a CPU.

    python benchmarks/resume_memory.py

Both take the same number of steps in processes of their own; the peak is the largest resident set. The model is large
beside its batch, so that weights, gradients and moments are what counts.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from result_file import ResultFile
from small_run import COMMAND, write_recipe

MODEL = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "rank": 192}
STEPS = 3


def peak_of(recipe: Path, folder: Path, *options: str) -> int:
    """Bytes, of one command."""
    command = [*COMMAND, "--recipe", str(recipe), "--output_dir", str(folder), *options]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads((folder / "report.json").read_text())["peak_memory_bytes"])


def measure(root: Path, repetitions: int, model: dict[str, Any]) -> dict[str, Any]:
    settings = {"save_steps": STEPS, "logging_steps": STEPS, "per_device_train_batch_size": 1, "save_total_limit": 1}
    data = {"block_size": 64, "max_validation_documents": 10}
    recipe = write_recipe(root / "resume_memory", 400, model, data, max_steps=STEPS, **settings)
    fresh, resumed = [], []
    for repetition in range(repetitions):
        folder = root / "resume_memory" / f"run_{repetition}"
        fresh.append(peak_of(recipe, folder))
        resumed.append(peak_of(recipe, folder, "--resume", "--max_steps", str(2 * STEPS)))
    parameters = sum(json.loads((folder / "report.json").read_text())["plan"]["parameters"].values())
    return {
        "parameters": parameters,
        "fresh_bytes": fresh,
        "resumed_bytes": resumed,
        "resumed_over_fresh": round(statistics.median(resumed) / statistics.median(fresh), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--model", type=json.loads, default=MODEL, help="fields of the model, as JSON")
    parser.add_argument("--redo", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "resume_memory.json")
    options = parser.parse_args()
    results = ResultFile(options.out, "peak memory of resumed runs over fresh ones, on a CPU", redo=options.redo)
    with tempfile.TemporaryDirectory() as root:
        found = results.section("peak", lambda: measure(Path(root), options.repetitions, options.model))
    for name in ("fresh", "resumed"):
        print(f"{name:8s} {', '.join(f'{size / 2**20:,.0f}' for size in found[f'{name}_bytes'])} MiB")
    print(f"resumed over fresh: {found['resumed_over_fresh']:.3f}, {found['parameters']:,} parameters")


if __name__ == "__main__":
    main()
