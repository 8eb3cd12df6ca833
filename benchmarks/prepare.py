"""What `crosslayer prepare` takes, and whether the way from its folder into the model keeps up with training.

    python benchmarks/prepare.py --megabytes 1000 --workers 2        # the long form
    python benchmarks/prepare.py --megabytes 100 --workers 2

The text is the source of the running Python's library, again and again, every line numbered anew so that no document is
another's twin. `prepare` runs as a command of its own; its memory, workers included, is read four times a second. What
the system can take back at any time (pages of the files it reads) is counted apart. The input path is Trainer's loader
over the blocks, without a model; training is steps of the recipe's model on the same blocks.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from result_file import ResultFile

RECIPE = "crnet_5m_text"
SETTINGS = {"max_tokenizer_documents": 20_000, "max_validation_documents": 64}
LINES_A_DOCUMENT = 60


def write_text(path: Path, megabytes: int) -> int:
    """JSON lines of about so many MB of text. Returns the bytes of text."""
    from crosslayer.data import DataConfig, load_documents

    texts = load_documents(DataConfig(cache_dir=str(path.parent)))["text"]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for turn in count():
            for start in range(0, len(lines), LINES_A_DOCUMENT):
                numbered = enumerate(lines[start : start + LINES_A_DOCUMENT])
                text = "".join(f"{line}  # {turn}.{number}\n" for number, line in numbered)
                size += len(text.encode("utf-8"))
                file.write(json.dumps({"text": text}) + "\n")
                if size >= megabytes * 10**6:
                    return size
    raise AssertionError


def peak_of(process: psutil.Process) -> tuple[int, int]:
    """(resident, of that not backed by files) bytes of a process and its children, the most until it ends."""
    resident = own = 0
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        now = [0, 0]
        for each in [process, *process.children(recursive=True)]:
            try:
                memory = each.memory_info()
            except psutil.Error:
                continue
            now = [now[0] + memory.rss, now[1] + memory.rss - memory.shared]
        resident, own = max(resident, now[0]), max(own, now[1])
        time.sleep(0.25)
    return resident, own


def preparation(root: Path, megabytes: int, workers: int) -> dict[str, Any]:
    size = write_text(root / "text.jsonl", megabytes)
    command = [sys.executable, "-m", "crosslayer", "prepare", "--recipe", RECIPE, "--data", str(root / "text.jsonl")]
    command += ["--output", str(root / "ready"), "--workers", str(workers), "--json"]
    command += [f"--{name}={value}" for name, value in SETTINGS.items()]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--cache_dir", str(root)], stdout=subprocess.PIPE, text=True)
    resident, own = peak_of(psutil.Process(process.pid))
    said, _ = process.communicate()
    seconds = time.perf_counter() - started
    assert process.returncode == 0
    statistics = json.loads(said)
    tokens = statistics["train"]["tokens"] + statistics["validation"]["tokens"]
    return {
        "workers": workers,
        "text_bytes": size,
        "tokens": tokens,
        "prepare_s": round(seconds, 1),
        "tokens_per_s": round(tokens / seconds),
        "text_bytes_per_s": round(size / seconds),
        "peak_resident_bytes": resident,
        "peak_own_bytes": own,
    }


def input_path(root: Path, seconds: float = 10.0) -> dict[str, Any]:
    """Tokens per second of the loader alone, and of training on it."""
    from torch.utils.data import DataLoader, RandomSampler
    from transformers import default_data_collator

    from crosslayer.data import prepare_data
    from crosslayer.train import load_recipe
    from crosslayer.train.run import build_arguments, pretrain

    given = {"data": str(root / "ready"), "cache_dir": str(root), "use_cpu": True, **SETTINGS}
    steps = {"max_steps": 12, "logging_steps": 4, "save_strategy": "no", "eval_strategy": "no", "bf16": False}
    recipe = load_recipe(RECIPE, {**given, **steps})
    batch = build_arguments(recipe, root / "run").train_batch_size
    blocks = prepare_data(recipe.data).train
    loader = DataLoader(blocks, batch, sampler=RandomSampler(blocks), collate_fn=default_data_collator)
    tokens, started = 0, time.perf_counter()
    for rows in loader:
        tokens += rows["input_ids"].numel()
        if time.perf_counter() - started > seconds:
            break
    read = tokens / (time.perf_counter() - started)
    trained = pretrain(recipe, root / "run").tokens_per_s
    return {
        "recipe": RECIPE,
        "read_tokens_per_s": round(read),
        "trained_tokens_per_s": round(trained),
        "ratio": round(read / trained, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--redo", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "prepare.json")
    given = parser.parse_args()
    results = ResultFile(given.output, "crosslayer prepare: speed and memory, and the input path", redo=given.redo)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        measure = lambda: preparation(root, given.megabytes, given.workers) | {"input": input_path(root)}  # noqa: E731
        print(results.section(f"{given.megabytes} MB, {given.workers} workers", measure))


if __name__ == "__main__":
    main()
