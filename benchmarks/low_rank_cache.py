"""What a cache that is put away takes, and what making it anew costs against reading the prompt again, on a CPU.

    python benchmarks/low_rank_cache.py

Random weights and tokens: bytes and time depend on shapes alone. For every length of the prompt the two take turns
within one process. Keys and values of a dense model of the same shape take as much as ours do when not put away.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from crosslayer.bench.speed import summarize, take_turns
from crosslayer.crnet import CRNetConfig, CRNetForCausalLM
from crosslayer.evaluate import LowRankCache
from crosslayer.provenance import describe_run, script_command

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "rank": 256,
    "max_position_embeddings": 4096,
    "eos_token_id": None,
    "bos_token_id": None,
}


@torch.no_grad()
def measure(model, prompt: int, turns: int) -> dict:
    """Bytes whole and put away, and tokens per second of a prefill and of `restore`."""
    ids = torch.randint(3, SHAPE["vocab_size"], (1, prompt), generator=torch.Generator().manual_seed(1))
    cache = LowRankCache(model)
    with cache.recording():
        model(ids, past_key_values=cache, logits_to_keep=1)
    whole = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    cache.compress()
    kept = sum(tensor.numel() * tensor.element_size() for tensor in cache.state_dict().values())

    def prefill() -> None:
        model(ids, use_cache=True, logits_to_keep=1)

    def restore() -> None:
        again = LowRankCache(model)
        again.load_state_dict(cache.state_dict())
        again.restore()

    seconds = take_turns({"prefill": prefill, "restore": restore}, turns=turns, warm_up=1)
    ratio = statistics.median(seconds["prefill"]) / statistics.median(seconds["restore"])
    rows = {name: summarize(taken, prompt) for name, taken in seconds.items()}
    sizes = {"bytes_whole": whole, "bytes_kept": kept, "smaller_by": round(whole / kept, 2)}
    return {**sizes, **rows, "restore_over_prefill": round(ratio, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "low_rank_cache_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = CRNetForCausalLM(CRNetConfig(**SHAPE)).eval()
    content = {
        "what": "a cache put away as X A: bytes, and tokens per second of making it anew and of a prefill; medians",
        "run": describe_run(script_command()),
        "shape": SHAPE,
        "turns": options.turns,
        "prompts": {str(prompt): measure(model, prompt, options.turns) for prompt in options.prompts},
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    header = ("prompt", "whole, MB", "put away, MB", "prefill, tokens/s", "anew, tokens/s", "faster by")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for prompt, row in content["prompts"].items():
        sizes = f"{row['bytes_whole'] / 1e6:,.1f} | {row['bytes_kept'] / 1e6:,.1f} ({row['smaller_by']:.1f})"
        speeds = f"{row['prefill']['tokens_per_s']:,.0f} | {row['restore']['tokens_per_s']:,.0f}"
        print(f"| {prompt} | {sizes} | {speeds} | {row['restore_over_prefill']:.1f} |")


if __name__ == "__main__":
    main()
