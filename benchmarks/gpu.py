"""All that matters on one GPU in under nine minutes: training, memory and decode at 350M and 1B.

    python benchmarks/gpu.py                                 goes on where it stopped; --redo starts anew
    python benchmarks/gpu.py --device cpu --smoke --out smoke.json

Dense, dense + checkpointing, CoLA and CR-Net's four policies, transformers' Llama beside them; eager first, then
compiled; sequences of 1024, bf16, fused attention (torch's sdpa). One contender at a time, so that each has the whole
memory; times are CUDA events around whole steps (forward, loss on the logits, backward, fused AdamW), medians after a
warm-up. Memory is the allocator's peak over whole steps; in eager mode by part as well. MFU counts the operations of
the forward three times, recomputation not at all, against the dense bf16 peak of the data sheet. Decode is eager, one
forward for each token, without CUDA graphs: at batch 1 it is bound by launches, not by memory, and says so.

What no longer fits the time is skipped and printed; run the command again for the rest.
"""

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch

from crosslayer.accounting import peak_flops
from crosslayer.analysis import measure_peak_memory
from crosslayer.bench.contenders import Contenders
from crosslayer.bench.speed import matrix_operations, measure_generation, summarize, take_turns, training_step
from crosslayer.methods import METHODS
from result_file import ResultFile

SIZES = {
    "350M": {"hidden_size": 1024, "intermediate_size": 2736, "num_hidden_layers": 24, "num_attention_heads": 16},
    # The published 1B shape has an MLP of 5461, an odd number that no tensor core likes: rounded up for everyone.
    "1B": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 32},
}
SMOKE_SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 2},
}
EAGER = ["dense", "crnet", "crnet_invert", "crnet_reversible", "crnet_replay", "dense_checkpointing", "cola", "llama"]
COMPILED = ["dense", "crnet", "cola", "crnet_invert", "crnet_reversible", "dense_checkpointing"]
"""In order of importance. Where layers are not compiled (every policy but `none`), the rest of the model is."""
DECODE = ["llama", "dense", "cola", "crnet"]
COMPILE_SECONDS = 60  # what a compiled cell may take; it is not begun with less


class Bench:
    """The contenders of one size, and how one cell of the table is measured."""

    def __init__(self, options: argparse.Namespace, size: dict[str, int]) -> None:
        self.options = options
        vocabulary = 128 if options.smoke else 32000
        self.shape = {**size, "vocab_size": vocabulary, "max_position_embeddings": max(1024, options.sequence)}
        self.shape |= {"bos_token_id": None, "eos_token_id": None}

    def contenders(self, methods: list[str]) -> Contenders:
        return Contenders(self.shape, methods, device=self.options.device, dtype=self.options.dtype)

    def train(self, name: str, compiled: bool) -> dict[str, Any]:
        """Training of one method: speed, MFU, peak memory."""
        options = self.options
        contenders = self.contenders([name])
        try:
            model = contenders.model(name)
            ids = contenders.tokens(options.batch, options.sequence)
            operations = matrix_operations(model, ids)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            found: dict[str, Any] = {"label": METHODS[name], "parameters": model.num_parameters()}
            if not compiled:
                with contenders.precision():
                    found["peak_bytes_by_part"] = measure_peak_memory(model, ids, optimizer).to_dict()
            else:
                torch.compiler.reset()
                model.compile(backend=options.backend)
            step = training_step(model, ids, optimizer, contenders.precision)
            take_turns({name: step}, 0, warm_up=3, device=options.device)
            restart_peak(options.device)
            seconds = take_turns({name: step}, options.turns, warm_up=0, device=options.device)[name]
            found |= summarize(seconds, ids.numel())
            found["peak_allocated_bytes"], found["matrix_operations"] = peak_allocated(options.device), operations
            peak = peak_flops(torch.cuda.get_device_name()) if is_cuda(options.device) else None
            found["mfu"] = round(operations / found["step_s"]["median"] / peak, 4) if peak else None
            return found
        except torch.OutOfMemoryError:
            return {"label": METHODS[name], "out_of_memory": True}

    def decode(self, name: str) -> dict[str, Any]:
        found = {}
        contenders = self.contenders([name])
        length = {"prompt": 8, "new_tokens": 4} if self.options.smoke else {"prompt": 128, "new_tokens": 32}
        for batch in (1, 32):
            rows = measure_generation(contenders, batch=batch, **length, turns=3, warm_up=1)[name]
            found[f"batch {batch}"] = {part: row for part, row in rows.items() if part != "weight_bytes"}
            found["weight_bytes"] = rows["weight_bytes"]
            for part in ("prefill", "decode"):
                del found[f"batch {batch}"][part]["speed_over_llama"]  # of this process alone: itself
        return found


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def restart_peak(device: str) -> None:
    if is_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)


def peak_allocated(device: str) -> int | None:
    return torch.cuda.max_memory_allocated(device) if is_cuda(device) else None


def cells(sizes: dict) -> list[tuple[str, str, str]]:
    """(kind, size, method), the most important first."""
    order = [("eager", size, name) for size in sizes for name in EAGER]
    order += [("decode", size, name) for size in sizes for name in DECODE]
    return order + [("compiled", size, name) for size in sizes for name in COMPILED]


def ratios(results: ResultFile, sizes: dict) -> dict[str, Any]:
    """Tokens/s over the dense model, of the same size and kind."""
    found: dict[str, Any] = {}
    for kind, size, name in cells(sizes):
        key, dense = f"{kind} {size} {name}", f"{kind} {size} dense"
        if key not in results or dense not in results:
            continue
        if kind == "decode":
            for batch in ("batch 1", "batch 32"):
                speeds = [results[cell][batch]["decode"]["tokens_per_s"] for cell in (key, dense)]
                found[f"{key} {batch}"] = round(speeds[0] / speeds[1], 3)
        elif "tokens_per_s" in results[key] and "tokens_per_s" in results[dense]:
            found[key] = round(results[key]["tokens_per_s"] / results[dense]["tokens_per_s"], 3)
    return found


def show(results: ResultFile, sizes: dict) -> None:
    print("\n| | tokens/s | over dense | MFU | peak GB |\n|---|---|---|---|---|")
    over = results.content["speed_over_dense"]
    for kind, size, name in cells(sizes):
        key = f"{kind} {size} {name}"
        if key not in results:
            continue
        row = results[key]
        if row.get("out_of_memory"):
            print(f"| {key} | out of memory | | | |")
        elif kind == "decode":
            for batch in ("batch 1", "batch 32"):
                speed = row[batch]["decode"]["tokens_per_s"]
                print(f"| {key} {batch} | {speed:,.0f} | {over.get(f'{key} {batch}', '')} | | |")
        else:
            memory = "" if row["peak_allocated_bytes"] is None else f"{row['peak_allocated_bytes'] / 1e9:.1f}"
            print(f"| {key} | {row['tokens_per_s']:,.0f} | {over.get(key, '')} | {row['mfu'] or ''} | {memory} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "mixed", "float32"))
    parser.add_argument("--batch", type=int, help="sequences in a step [default: 8]")
    parser.add_argument("--sequence", type=int, help="[default: 1024]")
    parser.add_argument("--turns", type=int, default=10, help="counted steps of each contender")
    parser.add_argument("--minutes", type=float, default=8.5, help="nothing is begun after that")
    parser.add_argument("--backend", help="of torch.compile [default: inductor]")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--redo", action="store_true", help="throw away what the file holds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    options = parser.parse_args()
    if is_cuda(options.device) and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --smoke shows that the script runs")
    options.batch = options.batch or (2 if options.smoke else 8)
    options.sequence = options.sequence or (32 if options.smoke else 1024)
    options.backend = options.backend or ("aot_eager" if options.smoke else "inductor")
    if options.redo:
        options.out.unlink(missing_ok=True)

    sizes = SMOKE_SIZES if options.smoke else SIZES
    results = ResultFile(options.out, f"training, memory and decode on one device, {options.dtype}")
    results.content["setting"] = {
        "batch": options.batch,
        "sequence": options.sequence,
        "turns": options.turns,
        "dtype": options.dtype,
        "backend": options.backend,
        "sizes": sizes,
    }
    started = time.monotonic()
    skipped = []
    for kind, size, name in cells(sizes):
        key, left = f"{kind} {size} {name}", options.minutes * 60 - (time.monotonic() - started)
        if key not in results and left < (COMPILE_SECONDS if kind == "compiled" else 0):
            skipped.append(key)
            continue
        bench = Bench(options, sizes[size])
        if kind == "decode":
            results.section(key, lambda bench=bench, name=name: bench.decode(name))
        else:
            compiled = kind == "compiled"
            results.section(key, lambda bench=bench, name=name, compiled=compiled: bench.train(name, compiled))
        gc.collect()
        if is_cuda(options.device):
            torch.cuda.empty_cache()
    results.content["speed_over_dense"] = ratios(results, sizes)
    results.save()
    show(results, sizes)
    if skipped:
        print(f"\nNo time left for: {', '.join(skipped)}. Run the command again.")


if __name__ == "__main__":
    main()
