"""Step time and peak memory of LoR2C and LoRA at r = 8, in one interleaved run.

    python benchmarks/lor2c_cost.py --model FOLDER          # of all-MiniLM-L6-v2; a tiny Llama is made here

Whole training steps (forward, backward, AdamW) on random tokens; after a warm-up the methods take turns step by step,
so that a busy machine slows both alike. Time: median, 20th and 80th percentile of the steps, and the median of the
ratios of neighbouring steps. Memory: what a forward saves for its backward, counted, and the growth of the resident
set over five steps, each method in a process of its own (Linux). Inference: forwards with the adapter beside the base,
against the base alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
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


def saved_bytes(model, inputs) -> int:
    """Bytes that a forward keeps for its backward: every storage once, parameters not counted."""
    import torch

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(kept.values())


def inference(name: str, options) -> dict:
    """CPU seconds of a forward without gradients: the batch of a step, and one token as in decoding."""
    import torch

    models = {"base": base_model(name, options.model).eval()}
    models |= {method: contender(name, method, options.model)[0].eval() for method in METHODS}
    shapes = {"batch": (options.batch, options.length, 1), "one_token": (1, 1, 40)}
    found: dict[str, dict] = {}
    for what, (batch, length, repeats) in shapes.items():
        inputs = {key: value for key, value in make_inputs(batch, length).items() if key != "labels"}
        seconds: dict[str, list[float]] = {key: [] for key in models}
        for turn in range(options.steps + 2):
            for key, model in models.items():
                started = time.process_time()
                with torch.no_grad():
                    for _ in range(repeats):
                        model(**inputs)
                if turn >= 2:
                    seconds[key].append((time.process_time() - started) / repeats)
        found[what] = {f"{key}_cpu_s": statistics.median(times) for key, times in seconds.items()}
        for method in METHODS:
            ratios = [a / b for a, b in zip(seconds[method], seconds["base"], strict=True)]
            found[what][f"{method}_over_base"] = statistics.median(ratios)
    return found


def peak_rss_above_model(name: str, method: str, options) -> int:
    """Growth of the largest resident set over five steps in a process of its own, the model already loaded."""
    command = [sys.executable, __file__, "--one", name, method, "--batch", str(options.batch)]
    command += ["--length", str(options.length), *(["--model", str(options.model)] if options.model else [])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def one_process(name: str, method: str, options) -> None:
    model, optimizer = contender(name, method, options.model)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew, without that of loading
    before = resident_peak()
    for _ in range(5):
        step(model, optimizer, make_inputs(options.batch, options.length))
    print(resident_peak() - before)


def resident_peak() -> int:
    """VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def make_inputs(batch: int, length: int) -> dict:
    import torch

    ids = torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(batch) % 2}


def measure(name: str, options) -> dict:
    contenders = {method: contender(name, method, options.model) for method in METHODS}
    inputs = make_inputs(options.batch, options.length)
    saved = {method: saved_bytes(model, inputs) for method, (model, _) in contenders.items()}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for turn in range(options.steps + 2):
        for method in METHODS if turn % 2 else METHODS[::-1]:
            started = time.process_time()
            step(*contenders[method], inputs)
            if turn >= 2:
                seconds[method].append(time.process_time() - started)
    ratios = [a / b for a, b in zip(seconds["lor2c"], seconds["lora"], strict=True)]
    row = {"model": name, "batch": options.batch, "length": options.length, "steps": options.steps}
    for method, (model, _) in contenders.items():
        times = sorted(seconds[method])
        row[method] = {
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "step_cpu_s": statistics.median(times),
            "step_cpu_s_p20": times[len(times) // 5],
            "step_cpu_s_p80": times[-1 - len(times) // 5],
            "saved_activation_bytes": saved[method],
            "peak_rss_above_model_bytes": peak_rss_above_model(name, method, options),
        }
    row["time_ratio"] = statistics.median(ratios)
    for memory in ("saved_activation_bytes", "peak_rss_above_model_bytes"):
        row[f"{memory.removesuffix('_bytes')}_ratio"] = row["lor2c"][memory] / row["lora"][memory]
    row["inference"] = inference(name, options)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of all-MiniLM-L6-v2; without it only the Llama is measured")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lor2c_cost.json")
    options = parser.parse_args()
    if options.model is not None and not (options.model / "config.json").is_file():
        parser.error(f"{options.model} holds no config.json")
    import torch

    from crosslayer.cli.common import quiet_libraries
    from crosslayer.provenance import describe_run
    from crosslayer.train.run_folder import write_json

    torch.set_num_threads(1)
    quiet_libraries()
    if options.one is not None:
        one_process(*options.one, options)
        return
    names = ["llama"] if options.model is None else ["minilm", "llama"]
    rows = [measure(name, options) for name in names]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/lor2c_cost.py --model FOLDER"
    write_json(options.out, {"run": describe_run(command), "rows": rows})
    print(
        "| model | method | trained parameters | CPU seconds a step (p20 to p80) | saved, MiB | peak RSS above the "
        "model, MiB |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        for method in METHODS:
            r = row[method]
            saved, peak = (r[key] / 2**20 for key in ("saved_activation_bytes", "peak_rss_above_model_bytes"))
            print(
                f"| {row['model']} | {method} | {r['trained_parameters']:,} | {r['step_cpu_s']:.3f} "
                f"({r['step_cpu_s_p20']:.3f} to {r['step_cpu_s_p80']:.3f}) | {saved:.1f} | {peak:.1f} |"
            )
        print(json.dumps({name: value for name, value in row.items() if name == "model" or name.endswith("_ratio")}))
        for what, measured in row["inference"].items():
            ratios = (f"{method} {measured[f'{method}_over_base']:.3f}" for method in METHODS)
            print(f"inference without merging, {what}, over the base alone: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
