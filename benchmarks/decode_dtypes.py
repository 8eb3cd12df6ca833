"""Decode in bfloat16 against float32 on one CPU thread, by batch.

    python benchmarks/decode_dtypes.py
    ONEDNN_MAX_CPU_ISA=AVX512_CORE python benchmarks/decode_dtypes.py    # as on a CPU without bfloat16 products
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python benchmarks/decode_dtypes.py

Random weights and tokens: time depends on shapes alone. Both dtypes take turns within one process, a decoded text each.
Seconds are of the process, so that other work on the machine counts less. A section of the result for each instruction
set that oneDNN may use.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch

from crosslayer.crnet import CRNetConfig, CRNetForCausalLM
from crosslayer.private import model_from_config
from result_file import ResultFile

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 2752,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "rank": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}


def models() -> dict[str, CRNetForCausalLM]:
    """The same weights in both dtypes; beta stays in float32."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = model_from_config(CRNetForCausalLM, CRNetConfig(**SHAPE), dtype=dtype)
        found[str(dtype).removeprefix("torch.")] = model.eval()
    return found


@torch.inference_mode()
def seconds_per_step(model: CRNetForCausalLM, ids: torch.Tensor, steps: int) -> float:
    """Of greedy decoding after a prompt [B, T]."""
    output = model(ids, use_cache=True, logits_to_keep=1)
    started = time.process_time()
    for _ in range(steps):
        output = model(output.logits.argmax(-1), past_key_values=output.past_key_values, use_cache=True)
    return (time.process_time() - started) / steps


def measure(batches: list[int], turns: int, steps: int) -> dict:
    """{batch: median milliseconds of a step in each dtype, and the median of the turns' ratios}."""
    contenders, rows = models(), {}
    for batch in batches:
        ids = torch.randint(3, SHAPE["vocab_size"], (batch, 16), generator=torch.Generator().manual_seed(1))
        taken: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(turns + 1):
            for name, model in contenders.items():
                seconds = seconds_per_step(model, ids, steps)
                if turn > 0:
                    taken[name].append(seconds)
        ratios = [a / b for a, b in zip(taken["float32"], taken["bfloat16"], strict=True)]
        rows[str(batch)] = {
            "step_ms": {name: round(statistics.median(seconds) * 1e3, 2) for name, seconds in taken.items()},
            "bfloat16_over_float32": round(statistics.median(ratios), 2),
            "ratio_of_turns": [round(ratio, 2) for ratio in sorted(ratios)],
        }
    return {"shape": SHAPE, "threads": 1, "turns": turns, "steps": steps, "batches": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 32])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--redo", action="store_true", help="measure again what is in the file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decode_dtypes_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "all there is")
    result = ResultFile(options.out, "CR-Net's decode in bfloat16 and float32, one CPU thread", redo=options.redo)
    found = result.section(isa, lambda: measure(options.batches, options.turns, options.steps))
    print("| batch | float32, ms | bfloat16, ms | speed over float32 |\n|---|---|---|---|")
    for batch, row in found["batches"].items():
        step = row["step_ms"]
        print(f"| {batch} | {step['float32']} | {step['bfloat16']} | {row['bfloat16_over_float32']} |")


if __name__ == "__main__":
    main()
