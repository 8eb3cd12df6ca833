"""Training throughput on a CPU against transformers' Llama of the same shape, and where the time goes.

    python benchmarks/throughput.py

One step is forward, backward and AdamW on the same tokens. The contenders take turns within one process, so that a
change of the machine's speed meets all of them; the figure is the median of the steps after a warm-up, as a ratio to
transformers' Llama. Every contender takes its loss the same way, by vocabulary chunks. A step has 8 rows of 256 tokens,
as in the default recipe; `--batch` takes another number.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from crosslayer.bench.contenders import LOSS, Contenders
from crosslayer.bench.speed import matrix_operations, take_turns, training_rows, training_step
from crosslayer.crnet import CrossLayerLinear
from crosslayer.methods import METHODS
from crosslayer.provenance import describe_run, script_command

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
}
# Operators by what they do; what is in no group is "other".
GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear"),
    "attention": ("flash_attention", "scaled_dot_product"),
    "optimizer": ("Optimizer", "_fused_adamw", "_foreach"),
    "norms": ("rms_norm", "aten::rsqrt", "aten::pow", "aten::mean"),
    "loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous", "aten::fill_", "aten::zero_"),
    "elementwise": ("aten::mul", "aten::add", "aten::silu", "aten::neg", "aten::sum", "aten::dot", "aten::where"),
}


def plain_forward(self, x, previous):
    """CR-Net's linear in one line of ordinary autograd."""
    return self.b() * previous + self.B(self.A(x))


def build(shape: dict) -> dict[str, torch.nn.Module]:
    models = {METHODS[m]: Contenders(shape, [m]).model(m) for m in ("llama", "dense", "crnet", "cola")}
    plain = Contenders(shape, ["crnet"]).model("crnet")
    plain.model._uses_tape = lambda *_: False  # ordinary autograd throughout
    for module in plain.modules():
        if isinstance(module, CrossLayerLinear):
            module.forward = plain_forward.__get__(module)
    cola = models.pop("CoLA")
    return {**models, "CR-Net written plainly": plain, "CoLA": cola}


def where_time_goes(step) -> dict[str, float]:
    """Share of the operators' own time by group, over three steps."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            step()
    seconds = dict.fromkeys([*GROUPS, "other"], 0.0)
    for event in profiler.key_averages():
        group = next((g for g, names in GROUPS.items() if any(name in event.key for name in names)), "other")
        seconds[group] += event.self_cpu_time_total / 1e6 / 3
    return {group: round(value, 4) for group, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="counted steps of each contender")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "throughput_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    ids = torch.randint(SHAPE["vocab_size"], (options.batch, options.sequence))
    models = build(SHAPE)
    steps = {name: training_step(model, ids) for name, model in models.items()}
    operations = {name: matrix_operations(model, ids) for name, model in models.items()}
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    reference = METHODS["llama"]
    rows = training_rows(take_turns(steps, options.steps), operations, parameters, ids.numel(), reference)
    content = {
        "what": "training throughput (forward, backward, AdamW), float32, interleaved in one process",
        "shape": {**SHAPE, "batch": options.batch, "sequence": options.sequence, "rank": SHAPE["hidden_size"] // 4},
        "steps": options.steps,
        "threads": options.threads,
        "loss": LOSS,
        "run": describe_run(script_command()),
        "contenders": rows,
        "seconds_per_step_by_operator": {name: where_time_goes(steps[name]) for name in (reference, "CR-Net", "CoLA")},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print("| | tokens/s | over Llama | by operations alone |\n|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['tokens_per_s']:,.0f} | {row['speed_over_llama']:.2f} | "
            f"{row['speed_if_operations_decided']:.2f} |"
        )
    for name, groups in content["seconds_per_step_by_operator"].items():
        print(name, groups)


if __name__ == "__main__":
    main()
