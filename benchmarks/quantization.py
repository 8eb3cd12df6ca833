"""Prefill and decode of a CR-Net with weights in float32, bfloat16, 8 and 4 bits, in one interleaved run on a CPU.

    python benchmarks/quantization.py
    python benchmarks/quantization.py --compile bfloat16 int8 --layers 2 --batches 1 --out compiled.json

The contenders are one model, loaded in each way, with random weights, since time depends on shapes alone; they take
turns within one process. Ratios are to bfloat16. Weights: bytes of all but the embeddings, as they lie in memory.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from crosslayer.bench.speed import summarize, take_turns
from crosslayer.crnet import CRNetConfig, CRNetForCausalLM
from crosslayer.provenance import describe_run, script_command
from crosslayer.quantization import quantized_loading

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "rank": 256,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
}
WAYS = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"quantize": "int8", "dtype": torch.bfloat16},
    "int4": {"quantize": "int4"},
}
KINDS = ("prefill", "decode")


def load(folder: str, quantize: str | None = None, **settings):
    """The model in evaluation mode, its quantized weights in bfloat16 terms."""
    settings |= quantized_loading(quantize, AutoConfig.from_pretrained(folder))
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def bytes_of(tensor: torch.Tensor) -> int:
    """What a tensor takes, a quantized one by its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(bytes_of(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


class Generation:
    """A prompt through a model into a static cache, and greedy tokens after it."""

    def __init__(self, model, ids: torch.Tensor, new: int, is_compiled: bool) -> None:
        self.model, self.ids, self.new = model, ids, new
        self.step = torch.compile(model, fullgraph=True, dynamic=False) if is_compiled else model

    def prefill(self) -> None:
        """Into a new cache."""
        self.cache = StaticCache(config=self.model.config, max_cache_len=self.ids.shape[1] + self.new)
        self.next = self.model(self.ids, past_key_values=self.cache, logits_to_keep=1).logits.argmax(-1)

    def decode(self) -> None:
        """`new` tokens, one after the other."""
        for _ in range(self.new):
            self.next = self.step(self.next, past_key_values=self.cache).logits.argmax(-1)


def measure(models: dict, compiled: list[str], batch: int, prompt: int, new: int, turns: int) -> dict:
    """{way: {"prefill": ..., "decode": ...}} for a batch; of `compiled` also with a step that is."""
    ids = torch.randint(3, SHAPE["vocab_size"], (batch, prompt), generator=torch.Generator().manual_seed(1))
    runs = {name: Generation(model, ids, new, False) for name, model in models.items()}
    runs |= {f"{name}, compiled step": Generation(models[name], ids, new, True) for name in compiled}
    with torch.no_grad():
        prefill = take_turns({name: run.prefill for name, run in runs.items()}, turns=turns, warm_up=1)
        steps = {name: run.decode for name, run in runs.items()}
        decode = take_turns(steps, turns=turns, warm_up=1, before=lambda name: runs[name].prefill())

    def row(seconds: dict, name: str, tokens: int) -> dict:
        ratio = statistics.median(seconds["bfloat16"]) / statistics.median(seconds[name])
        return {**summarize(seconds[name], tokens), "speed_over_bfloat16": round(ratio, 3)}

    return {
        name: {"prefill": row(prefill, name, batch * prompt), "decode": row(decode, name, batch * new)} for name in runs
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--compile", choices=list(WAYS), nargs="*", default=[], help="also with a compiled step")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quantization_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPE | {"num_hidden_layers": options.layers}
        CRNetForCausalLM(CRNetConfig(**shape)).save_pretrained(folder)
        models = {name: load(folder, **way) for name, way in WAYS.items()}
    weights = {
        name: sum(bytes_of(p) for p in model.parameters() if p is not model.get_input_embeddings().weight)
        for name, model in models.items()
    }
    lengths = {"prompt": options.prompt, "new": options.new, "turns": options.turns}
    content = {
        "what": "prefill and decode in tokens per second, interleaved in one process: medians",
        "run": describe_run(script_command()),
        "shape": shape,
        **lengths,
        "weight_bytes": weights,
        "batches": {str(batch): measure(models, options.compile, batch, **lengths) for batch in options.batches},
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    header = [f"{what}, batch {batch}" for batch in options.batches for what in KINDS]
    print("| weights | MB | " + " | ".join(header) + " |\n|---|---|" + "---|" * len(header))
    for name in content["batches"][str(options.batches[0])]:
        size = weights[name.partition(",")[0]]
        rows = [content["batches"][str(batch)][name][what] for batch in options.batches for what in KINDS]
        cells = [f"{row['tokens_per_s']:,.0f} ({row['speed_over_bfloat16']:.2f})" for row in rows]
        print(f"| {name} | {size / 1e6:,.1f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
