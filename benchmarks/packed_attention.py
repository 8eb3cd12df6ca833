"""A training step on packed rows, by length of the row: a mask over the whole row against one document at a time.

    python benchmarks/packed_attention.py

Random weights and tokens, documents of random length. Both attentions take turns within one process, on one CPU thread;
seconds are of the process, so that other work on the machine counts less.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

import crosslayer.train.attention  # noqa: F401, registers sdpa_documents
from crosslayer.crnet import CRNetConfig, CRNetForCausalLM
from crosslayer.private import model_from_config
from result_file import ResultFile

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "rank": 128,
    "max_position_embeddings": 4096,
}
ATTENTIONS = ("sdpa", "sdpa_documents")


def positions_of(length: int, mean: int) -> torch.Tensor:
    """Positions [1, T] of documents whose lengths are drawn from an exponential distribution."""
    generator, parts, left = torch.Generator().manual_seed(1), [], length
    while left:
        drawn = 1 + int(torch.empty(1).exponential_(1 / mean, generator=generator).item())
        parts.append(torch.arange(min(left, drawn)))
        left -= len(parts[-1])
    return torch.cat(parts)[None]


def measure(length: int, mean: int, turns: int) -> dict:
    """Median seconds of a step on one row with each attention, and the median of the turns' ratios."""
    positions = positions_of(length, mean)
    ids = torch.randint(3, SHAPE["vocab_size"], (1, length), generator=torch.Generator().manual_seed(2))
    models, taken = {}, {name: [] for name in ATTENTIONS}
    for name in ATTENTIONS:
        torch.manual_seed(0)
        models[name] = model_from_config(CRNetForCausalLM, CRNetConfig(**SHAPE), attn_implementation=name).train()
        models[name].fused_loss = True
    for turn in range(turns + 1):
        for name, model in models.items():
            started = time.process_time()
            model(ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
            if turn > 0:
                taken[name].append(time.process_time() - started)
    ratios = sorted(whole / apart for whole, apart in zip(*taken.values(), strict=True))
    return {
        "shape": SHAPE,
        "documents": int((positions == 0).sum()),
        "threads": 1,
        "step_s": {name: round(statistics.median(seconds), 4) for name, seconds in taken.items()},
        "faster_by": round(statistics.median(ratios), 2),
        "ratio_of_turns": [round(ratio, 2) for ratio in ratios],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--mean", type=int, default=300, help="tokens of a document, on average")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--redo", action="store_true", help="measure again what is in the file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "packed_attention_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = ResultFile(options.out, "a step on packed rows: a mask against one document at a time", redo=options.redo)
    print("| tokens of a row | documents | mask, s | by document, s | faster by |\n|---|---|---|---|---|")
    for length in options.lengths:
        row = result.section(str(length), lambda length=length: measure(length, options.mean, options.turns))
        seconds = " | ".join(f"{row['step_s'][name]:.2f}" for name in ATTENTIONS)
        print(f"| {length} | {row['documents']} | {seconds} | {row['faster_by']} |")


if __name__ == "__main__":
    main()
