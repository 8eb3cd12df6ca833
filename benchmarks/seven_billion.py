"""A 7B-shaped model under a 24 GiB cap: the largest micro-batch that trains, and how fast.

    python benchmarks/seven_billion.py                       on a GPU; goes on where it stopped
    python benchmarks/seven_billion.py --expect              the arithmetic below, on any machine
    python benchmarks/seven_billion.py --device cpu --smoke --out smoke.json

Hidden 4096, MLP 11008, 32 layers, vocabulary 32,000. bf16 weights, 8-bit AdamW (bitsandbytes, extra `baselines`; where
it is not installed torch's AdamW, whose states are bf16 like the weights, and the section says so), loss by vocabulary
chunks, no offload. Gradient release (train/gradient_release.py): every parameter has an optimizer of its own that steps
and drops the gradient as soon as it is complete, so that never more than one layer's gradients exist; one micro-batch
is then one step. Each contender runs in a process of its own, capped by `torch.cuda.set_per_process_memory_fraction`.
What no longer fits the time, or fails, is printed; run the command again for it.

The target: every CR-Net trains under the cap (`targets` in the result).

Why it fits (GB = 1e9 bytes; CR-Net, r = 1024 and 512)

    weights      2 bytes each                                   5.89   3.41
    8-bit AdamW  2 bytes each, 2 x 4 bytes per block of 256     5.98   3.46
    gradients    2 bytes of the largest layer, the first        0.40   0.40
    per token    live state h + 7 Y and the gradients of Y, float32: (11 D + 4 F) x 4 bytes = 0.36 MB, and what the
                 backward of one layer makes; `--expect` measures it on a CPU at 1/32 of the width, where every width,
                 rank and vocabulary is divided by 32 and the number of layers is not, and scales it back

The dense model does not fit: 6.74e9 x (2 + 2.03) bytes are 27.2 GB before the first token.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_bitsandbytes_available

from crosslayer.accounting import count_parameters
from crosslayer.analysis import measure_peak_memory
from crosslayer.bench.speed import summarize, take_turns
from crosslayer.crnet import CRNetConfig, CRNetForCausalLM
from crosslayer.train.gradient_release import release_gradients
from on_device import is_cuda, largest, make_states, measure_in_order, peaks, restart_peak, runs
from result_file import ResultFile

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
WIDTHS = tuple(SHAPE)
LAYERS, SCALE, HEAD_DIM = 32, 32, 128
CAP_GIB = 24.0
ELSEWHERE_GIB = 0.8  # CUDA context, workspaces, fragmentation: an allowance
STATE_BYTES = 2 + 2 * 4 / 256  # two 8-bit moments, a float32 maximum for each block of 256 of both
SEARCH_SECONDS = 30  # of a search for the largest micro-batch
CASE_SECONDS = 90  # what a contender may take; it is not begun with less

CONTENDERS: dict[str, dict[str, Any]] = {
    "crnet_invert": {"recompute": "invert"},
    "crnet_reversible": {"recompute": "reversible"},
    "dense": {"factorization": "dense"},
    "dense_checkpointing": {"factorization": "dense", "checkpointing": True},
    "crnet_reversible_16": {"recompute": "reversible", "recompute_interval": 16},
    "crnet_reversible_whole": {"recompute": "reversible", "recompute_interval": LAYERS},
    "cola_invert": {"factorization": "cola", "recompute": "invert"},
    "cola": {"factorization": "cola"},
    "cola_checkpointing": {"factorization": "cola", "checkpointing": True},
}


def cases() -> list[tuple[str, int]]:
    """(contender, rank), the headline first. Dense has no rank."""
    return [(name, rank) for name in CONTENDERS for rank in ((0,) if name.startswith("dense") else (512, 1024))]


def configuration(name: str, rank: int, scale: int = 1) -> CRNetConfig:
    """The 7B shape with every width divided by `scale`; heads of 128 at any scale."""
    options = {key: value for key, value in CONTENDERS[name].items() if key != "checkpointing"}
    shape = {key: SHAPE[key] // scale for key in WIDTHS}
    ranks = {"rank": max(1, rank // scale)} if rank else {}
    return CRNetConfig(**shape, **options, **ranks, num_hidden_layers=LAYERS, max_position_embeddings=2048)


def build(name: str, rank: int, device: str, scale: int = 1) -> CRNetForCausalLM:
    config = configuration(name, rank, scale)
    torch.manual_seed(0)
    with torch.device(device):
        model = CRNetForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16).train()
    model.fused_loss = True
    if CONTENDERS[name].get("checkpointing"):
        model.activation_checkpointing_enable()
    return model


# What is to be expected


def expect(name: str, rank: int, cap_gib: float = CAP_GIB) -> dict[str, Any]:
    """Bytes by arithmetic, those per token by a measurement at 1/32 of the width, and the micro-batch that follows."""
    config = configuration(name, rank)
    parameters = sum(count_parameters(config).values())
    widest = max(count_parameters(configuration_of_one_layer(config)).values())
    fixed = 2 * parameters + STATE_BYTES * parameters + 2 * widest
    left = (cap_gib - ELSEWHERE_GIB) * 2**30 - fixed
    found = {
        "parameters": parameters,
        "weights_gb": round(2 * parameters / 1e9, 2),
        "optimizer_gb": round(STATE_BYTES * parameters / 1e9, 2),
        "gradients_gb": round(2 * widest / 1e9, 2),
        "fits": left > 0,
    }
    if left > 0:
        per_token = SCALE * bytes_per_token(name, rank)
        found |= {"mb_per_token": round(per_token / 1e6, 3), "tokens_per_micro_batch": int(left / per_token)}
    return found


def configuration_of_one_layer(config: CRNetConfig) -> CRNetConfig:
    """The first layer alone, without embeddings: the one whose gradients are largest."""
    one = {"num_hidden_layers": 1, "vocab_size": 1, "bos_token_id": None, "eos_token_id": None}
    return CRNetConfig.from_dict(config.to_dict() | one | {"recompute": "none", "recompute_interval": None})


def bytes_per_token(name: str, rank: int) -> float:
    """What one more token adds to the peak of a step, at 1/32 of the width: the slope between two batches.

    Gradients of weights do not grow with tokens, so it makes no difference here that they are not released.
    """
    model = build(name, rank, "cpu", SCALE)
    peaks = []
    for rows in (16, 32):  # so many that weights' gradients do not decide where the peak is
        ids = torch.randint(SHAPE["vocab_size"] // SCALE, (rows, 128), generator=torch.Generator().manual_seed(1))
        parts = measure_peak_memory(model, ids).phases
        peaks.append(max(phase["activations"] + phase["temporary"] for phase in parts.values()))
    return (peaks[1] - peaks[0]) / (16 * 128)


# What is measured


def make_optimizer(parameters: list, eight_bits: bool) -> torch.optim.Optimizer:
    if not eight_bits:
        return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-4, weight_decay=0.0)


def measure(name: str, rank: int, options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own. Out of memory is an answer: no weights, no optimizer, or no token fits."""
    device, eight_bits = options.device, is_bitsandbytes_available() and not options.plain_optimizer
    found: dict[str, Any] = {"optimizer": "8-bit AdamW" if eight_bits else "AdamW, bf16 states"}
    if is_cuda(device):
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, options.cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)
        )
    try:
        model = build(name, rank, device, SCALE if options.smoke else 1)
        for parameter in model.parameters():
            optimizer = make_optimizer([parameter], eight_bits)
            make_states(optimizer)
            release_gradients(optimizer)
    except torch.OutOfMemoryError:
        return {**found, "tokens_per_micro_batch": 0, "out_of_memory": "weights and optimizer states alone do not fit"}

    def step(rows: int, sequence: int) -> None:
        ids = torch.randint(model.config.vocab_size, (rows, sequence), device=device)
        model(ids, labels=ids, use_cache=False).loss.backward()

    def search(sequence: int, limit: int) -> tuple[int, int | None]:
        def fits(rows: int) -> bool:
            return runs(lambda: step(rows, sequence), model, times=2)  # the second with all states there

        return largest(fits, limit=limit, seconds=SEARCH_SECONDS)

    sequence = options.sequence
    rows, fails = search(sequence, options.limit)
    while rows == 0 and sequence > 64:  # not a whole sequence: shorter ones
        sequence //= 2
        rows, fails = search(sequence, 2)
    found |= {"parameters": model.num_parameters(), "sequence": sequence, "rows": rows, "fails_with_rows": fails}
    found["tokens_per_micro_batch"] = rows * sequence
    if rows:
        restart_peak(device)
        run = {"step": lambda: step(rows, sequence)}
        seconds = take_turns(run, options.turns, warm_up=1, device=device)["step"]
        found |= summarize(seconds, rows * sequence) | peaks(device)
    return found


def targets(results: ResultFile, cap: float) -> list[dict[str, Any]]:
    """What was aimed at ahead of the first run, beside what came of it."""
    tokens = {name: row["tokens_per_micro_batch"] for name, row in results.content["sections"].items()}
    return [
        {"what": f"{name} trains under {cap:g} GiB, tokens", "measured": found, "at_least": 1, "holds": found >= 1}
        for name, found in tokens.items()
        if name.startswith("crnet")
    ]


def in_a_process(name: str, rank: int) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--one", json.dumps([name, rank])]
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    output = subprocess.run(command, capture_output=True, text=True, env=environment)
    if output.returncode:
        raise RuntimeError(output.stderr.strip()[-300:] or f"exit code {output.returncode}")
    return json.loads(output.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cap", type=float, default=CAP_GIB, help="GiB that the process may allocate")
    parser.add_argument("--sequence", type=int, help="[default: 1024]")
    parser.add_argument("--turns", type=int, default=3, help="counted steps at the largest micro-batch")
    parser.add_argument("--limit", type=int, help="most sequences tried [default: 256]")
    parser.add_argument("--minutes", type=float, default=8.5, help="nothing is begun that would end after that")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="some contenders")
    parser.add_argument("--expect", action="store_true", help="only the arithmetic")
    parser.add_argument("--plain-optimizer", action="store_true", help="torch's AdamW instead of the 8-bit one")
    parser.add_argument("--smoke", action="store_true", help="1/32 of the width, at most 3 short sequences")
    parser.add_argument("--redo", action="store_true", help="throw away what the file holds")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "seven_billion.json")
    options = parser.parse_args()
    options.sequence = options.sequence or (32 if options.smoke else 1024)
    options.limit = options.limit or (3 if options.smoke else 256)
    chosen = [(name, rank) for name, rank in cases() if not options.only or name in options.only]
    if options.one:
        print(json.dumps(measure(*options.one, options)))
        return
    if options.expect:
        print(
            "| | rank | weights GB | optimizer GB | MB per token | tokens per micro-batch |\n|---|---|---|---|---|---|"
        )
        for name, rank in chosen:
            row = expect(name, rank, options.cap)
            tokens = f"{row['tokens_per_micro_batch']:,}" if row["fits"] else "does not fit"
            print(
                f"| {name} | {rank or ''} | {row['weights_gb']} | {row['optimizer_gb']} | "
                f"{row.get('mb_per_token', '')} | {tokens} |",
                flush=True,
            )
        return
    if is_cuda(options.device) and not torch.cuda.is_available():
        parser.error("no CUDA device here; --expect needs none, --device cpu --smoke shows that the script runs")
    if options.redo:
        options.out.unlink(missing_ok=True)
    results = ResultFile(options.out, "7B shape, bf16 weights, gradient release, capped memory")
    results.content["setting"] = {"cap_gib": options.cap, "shape": SHAPE, "layers": LAYERS, "smoke": options.smoke}
    keys = {(name, rank): f"{name} r={rank}" if rank else name for name, rank in chosen}
    cells = {key: (CASE_SECONDS, partial(in_a_process, *case)) for case, key in keys.items()}
    left = measure_in_order(results, cells, options.minutes)
    results.content["targets"] = targets(results, options.cap)
    results.save()
    for key, row in results.content["sections"].items():
        speed = f", {row['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in row else ""
        print(f"{key}: {row['tokens_per_micro_batch']:,} tokens per micro-batch{speed}; {row['optimizer']}")
    for row in results.content["targets"]:
        print(f"target: {row['what']}: {row['measured']:,}, {'holds' if row['holds'] else 'does not hold'}")
    if left:
        print(left)


if __name__ == "__main__":
    main()
