"""Time and peak memory of `crosslayer analyze` against a plain forward of the same model over the same tokens.

    python benchmarks/analyze.py MODEL --data text.jsonl.gz --max_tokens 100000

Both run as processes of their own, one after the other, and read the text the same way; peak memory is the largest
resident set, so this is for a CPU. Writes benchmarks/results/analyze_cost.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PLAIN = """
import sys
import torch
from crosslayer.cli.analyze import Text
from crosslayer.cli.common import quiet_libraries
quiet_libraries()
from crosslayer.loading import load_body
from crosslayer.data import DataConfig
name, data, tokens, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = load_body(name)
text = Text(DataConfig(data=data), tokenizer=None, max_tokens=tokens, block_size=None, batch_size=size)
with torch.no_grad():
    for batch in text.batches(name, model):
        model(**batch)
"""


def measure(arguments: list[str], threads: int) -> dict:
    """Wall and processor seconds and peak resident bytes of a process. Ends this one where it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(arguments[:3])} ... failed")
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_bytes": usage.ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="python-library")
    parser.add_argument("--max_tokens", type=int, default=100_000)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--output_dir", help="Keep the analysis here [default: throw it away].")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "analyze_cost.json")
    options = parser.parse_args()
    tokens, size = str(options.max_tokens), str(options.batch_size)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output_dir or temporary
        plain = measure(["-c", PLAIN, options.model, options.data, tokens, size], options.threads)
        arguments = ["-m", "crosslayer", "analyze", options.model, "--data", options.data, "--max_tokens", tokens]
        analysis = measure([*arguments, "--batch_size", size, "--output_dir", folder], options.threads)
        spectra = json.loads((Path(folder) / "spectra.json").read_text())
    from crosslayer.provenance import describe_run

    command = f"python benchmarks/analyze.py MODEL --data FILE --max_tokens {tokens} --batch_size {size}"
    content = {
        "what": "crosslayer analyze against a plain forward: wall and processor seconds, peak resident bytes",
        "model": spectra["model"],
        "tokens": spectra["tokens"],
        "batch_size": options.batch_size,
        "passes": spectra["passes"],
        "plain_forward": plain,
        "analyze": analysis,
        "memory_ratio": round(analysis["peak_memory_bytes"] / plain["peak_memory_bytes"], 3),
        "run": {**describe_run(), "threads": options.threads, "command": f"{command} --threads {options.threads}"},
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps({key: content[key] for key in ("plain_forward", "analyze", "memory_ratio")}, indent=1))


if __name__ == "__main__":
    main()
