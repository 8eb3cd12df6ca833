"""Step time and peak memory of LoR2C and LoRA at r = 8, in one interleaved run.

    python benchmarks/lor2c_cost.py --model FOLDER          # of all-MiniLM-L6-v2; a tiny Llama is made here

Whole training steps (forward, backward, AdamW) on random tokens; after a warm-up the methods take turns step by step,
so that a busy machine slows both alike. Time: median, 20th and 80th percentile of the steps, and the median of the
ratios of neighbouring steps. Memory: the largest sum of live tensor bytes during a step (parameters, gradients,
activations, optimizer), counted by torch's MemTracker, so that it repeats exactly.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

METHODS = ("lor2c", "lora")
VOCABULARY = 20_000


def base_model(name: str, folder: Path | None):
    import torch
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    if name == "minilm":
        return AutoModelForSequenceClassification.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=4,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config)


def contender(name: str, method: str, folder: Path | None):
    """(model, optimizer) of one method, r = 8."""
    import torch

    from crosslayer.train import AdapterConfig, attach

    model = attach(base_model(name, folder), AdapterConfig(method=method, r=8), "classification").model.train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def step(model, optimizer, inputs) -> None:
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def peak_bytes(model, optimizer, inputs) -> int:
    """Peak of live tensor bytes over one step, the optimizer's state included."""
    from torch.distributed._tools.mem_tracker import MemTracker

    step(model, optimizer, inputs)  # the optimizer makes its state
    tracker = MemTracker()
    tracker.track_external(model, optimizer, *inputs.values())
    with tracker:
        step(model, optimizer, inputs)
    return sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())


def measure(name: str, folder: Path | None, batch: int, length: int, steps: int) -> dict:
    import torch

    contenders = {method: contender(name, method, folder) for method in METHODS}
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(batch) % 2}
    memory = {method: peak_bytes(*parts, inputs) for method, parts in contenders.items()}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for turn in range(steps + 2):
        for method in METHODS if turn % 2 else METHODS[::-1]:
            started = time.process_time()
            step(*contenders[method], inputs)
            if turn >= 2:
                seconds[method].append(time.process_time() - started)
    ratios = [a / b for a, b in zip(seconds["lor2c"], seconds["lora"], strict=True)]
    row = {"model": name, "batch": batch, "length": length, "steps": steps}
    for method, (model, _) in contenders.items():
        times = sorted(seconds[method])
        row[method] = {
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "step_cpu_s": statistics.median(times),
            "step_cpu_s_p20": times[len(times) // 5],
            "step_cpu_s_p80": times[-1 - len(times) // 5],
            "peak_memory_bytes": memory[method],
        }
    row["time_ratio"] = statistics.median(ratios)
    row["memory_ratio"] = memory["lor2c"] / memory["lora"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of all-MiniLM-L6-v2; without it only the Llama is measured")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lor2c_cost.json")
    options = parser.parse_args()
    if options.model is not None and not (options.model / "config.json").is_file():
        parser.error(f"{options.model} holds no config.json")
    import torch

    from crosslayer.cli.common import quiet_libraries
    from crosslayer.train.run_folder import describe_run, write_json

    torch.set_num_threads(1)
    quiet_libraries()
    names = ["llama"] if options.model is None else ["minilm", "llama"]
    rows = [measure(name, options.model, options.batch, options.length, options.steps) for name in names]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/lor2c_cost.py --model FOLDER"
    write_json(options.out, {"run": {**describe_run(), "command": command}, "rows": rows})
    print("| model | method | trained parameters | CPU seconds a step (p20 to p80) | peak memory, MiB |")
    print("|---|---|---|---|---|")
    for row in rows:
        for method in METHODS:
            r = row[method]
            print(
                f"| {row['model']} | {method} | {r['trained_parameters']:,} | {r['step_cpu_s']:.3f} "
                f"({r['step_cpu_s_p20']:.3f} to {r['step_cpu_s_p80']:.3f}) | {r['peak_memory_bytes'] / 2**20:.1f} |"
            )
        print(json.dumps({name: row[name] for name in ("model", "time_ratio", "memory_ratio")}))


if __name__ == "__main__":
    main()
