"""What to run on 1 to 512 devices, by arithmetic: memory, communication and time of 7B, 13B and 70B.

python benchmarks/scale.py            prints the tables of docs/many-devices.md
python benchmarks/scale.py --write    puts them there, between its markers
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from crosslayer.accounting import Method, Shape, Sharding, Step, count_collectives, estimate_memory, named_shape
from crosslayer.accounting.plan import DEFAULT_RESERVE, MemoryPlan, Recommendation, Setting
from crosslayer.accounting.planner import WIDEST_INTERVAL, make_plan
from crosslayer.accounting.steps import PRECISIONS
from crosslayer.errors import ConfigError
from page_tables import run, table

PAGE = Path(__file__).parents[1] / "docs" / "many-devices.md"
MODELS = ("llama_7b", "llama_13b", "llama_70b")
DEVICES = (1, 8, 64, 512)
ASKED: dict[str, Any] = {"sequence": 4096, "tokens_per_step": 4e6, "beside": ()}
SPLIT = "TP x FSDP x DDP"
MICRO_BATCH = Step(sequence=4096, precision=PRECISIONS["bf16_autocast"], accumulates=True)
USABLE = 80e9 * (1 - DEFAULT_RESERVE)
KEPT = {
    "dense": ("dense", Method()),
    "dense, checkpointed": ("dense", Method(recompute="layers")),
    "none": ("cross_layer", Method()),
    "replay": ("cross_layer", Method(recompute="replay")),
    "invert": ("cross_layer", Method(recompute="invert")),
    "reversible": ("cross_layer", Method(recompute="reversible", interval=WIDEST_INTERVAL)),
}
"""What may be kept -> (factorization, method); the last four are CR-Net's."""


def title(model: str) -> str:
    return model.removeprefix("llama_").upper()


@cache
def planned(model: str, gpus: int, **more: Any) -> MemoryPlan | None:
    """A plan; None where nothing fits as asked."""
    try:
        plan = make_plan(model, gpus=gpus, **(ASKED | more))
        return None if plan.changes else plan
    except ConfigError as error:
        if "does not fit" not in str(error):
            raise
        return None


def best_of(found: MemoryPlan | Recommendation | str | None) -> Setting | None:
    if isinstance(found, MemoryPlan):
        return found.recommended.setting
    return found.setting if isinstance(found, Recommendation) else None


def what_to_run() -> str:
    """The fastest that fits."""
    rows = []
    for model in MODELS:
        for gpus in DEVICES:
            best = best_of(planned(model, gpus))
            row = [title(model), f"{gpus}"]
            if best is None:
                rows.append([*row, "does not fit", "", "", "", "", ""])
                continue
            row += [str(best.sharding), best.label, f"{best.micro_batch}", f"{best.peak_bytes / 1e9:.1f}"]
            rows.append([*row, f"{best.tokens_per_s:,.0f}", show_days(best)])
    return table(("", "devices", SPLIT, "recompute", "micro-batch", "GB", "tokens/s", "days"), rows)


def show_days(best: Setting | None) -> str:
    return "does not fit" if best is None else f"{best.days:,.1f}"


def days() -> str:
    """Of each method in its own fastest setting."""
    rows = []
    for model in MODELS:
        for gpus in DEVICES:
            plans = (planned(model, gpus, method=method) for method in ("crnet", "cola", "dense"))
            rows.append([title(model), f"{gpus}", *(show_days(best_of(plan)) for plan in plans)])
    return table(("", "devices", "CR-Net", "CoLA", "dense"), rows)


def memory() -> str:
    """Peak of each device with FSDP over all: one sequence of 4,096 tokens."""
    rows = []
    for model in MODELS:
        for gpus in (8, 64, 512):
            row = [title(model), f"{gpus}"]
            for factorization, method in KEPT.values():
                row.append(f"{peak(named_shape(model, factorization), method, Sharding(fsdp=gpus)) / 1e9:,.1f}")
            rows.append(row)
    return table(("GB", "devices", *KEPT), rows)


def peak(shape: Shape, method: Method, sharding: Sharding) -> int:
    step = replace(MICRO_BATCH, sharding=sharding)
    return sum(estimate_memory(shape, step, method).values())


def tensor_memory() -> str:
    """The same with tensor parallelism inside a node of eight."""
    rows = []
    for model in MODELS:
        for tensor in (1, 2, 4, 8):
            row = [title(model), f"{tensor} x {8 // tensor}"]
            for factorization, method in KEPT.values():
                sharding = Sharding(tensor=tensor, fsdp=8 // tensor)
                row.append(f"{peak(named_shape(model, factorization), method, sharding) / 1e9:,.1f}")
            rows.append(row)
    return table(("GB", "TP x FSDP", *KEPT), rows)


def sent() -> str:
    """By each device in a micro-batch of one sequence; DDP's once in a step."""
    rows = []
    for model in MODELS:
        for name, sharding in {
            "DDP over 8": Sharding(replicas=8),
            "FSDP over 8": Sharding(fsdp=8),
            "FSDP over 512": Sharding(fsdp=512),
            "tensor parallel 2": Sharding(tensor=2),
            "tensor parallel 8": Sharding(tensor=8),
        }.items():
            row = [title(model), name]
            for factorization in ("dense", "cola", "cross_layer"):
                row.append(f"{sent_by_one(named_shape(model, factorization), sharding, Method()) / 1e9:.1f}")
            for policy in ("replay", "reversible"):
                method = Method(recompute=policy)
                row.append(f"{sent_by_one(named_shape(model, 'cross_layer'), sharding, method) / 1e9:.1f}")
            rows.append(row)
    return table(("GB", "split", "dense", "CoLA", "CR-Net: none, invert", "replay", "reversible"), rows)


def sent_by_one(shape: Shape, sharding: Sharding, method: Method) -> float:
    step = replace(MICRO_BATCH, sharding=sharding)
    return sum(collective.sent(sharding) for collective in count_collectives(shape, step, method))


def depth() -> str:
    """A model as wide as 7B, of more layers, on eight devices with FSDP; and the deepest that fits on 80 GB."""
    rows = []
    for name, (factorization, method) in KEPT.items():
        peaks = [peak(deep(layers, factorization), method, Sharding(fsdp=8)) for layers in (32, 64, 128)]
        most = [deepest(factorization, method, Sharding(fsdp=devices)) for devices in (8, 64)]
        rows.append([name, *(f"{size / 1e9:,.1f}" for size in peaks), *map(str, most)])
    header = ("GB", "32 layers", "64 layers", "128 layers", "most layers on 8 devices", "on 64")
    return table(header, rows)


def deep(layers: int, factorization: str) -> Shape:
    """7B with another number of layers."""
    shape = named_shape("llama_7b", factorization)
    return replace(shape, layers=(shape.layers[0], *[shape.layers[1]] * (layers - 1)))


def deepest(factorization: str, method: Method, sharding: Sharding) -> int:
    fits, most = 1, 2
    while peak(deep(most, factorization), method, sharding) <= USABLE:
        fits, most = most, 2 * most
    while most - fits > 1:
        middle = (fits + most) // 2
        if peak(deep(middle, factorization), method, sharding) <= USABLE:
            fits = middle
        else:
            most = middle
    return fits


def links() -> str:
    """13B on 64 devices with slower and slower links between nodes."""
    rows = []
    for network in (40e9, 10e9, 2.5e9, 0.3e9):
        plan = planned("llama_13b", 64, network=network, beside=("dense",))
        assert plan is not None
        for name, best in (("CR-Net", best_of(plan)), ("dense", best_of(plan.beside["dense"]))):
            assert best is not None
            row = [f"{network / 1e9:g}", name, str(best.sharding), best.label]
            rows.append([*row, f"{best.waiting_seconds / best.step_seconds:.0%}", f"{best.tokens_per_s:,.0f}"])
    return table(("GB/s between nodes", "", SPLIT, "recompute", "of the time it waits", "tokens/s"), rows)


def other_devices() -> str:
    """7B on a node of eight of other devices."""
    rows = []
    for name in ("b200", "h200", "a100", "l40s", "rtx-4090"):
        plan = planned("llama_7b", 8, device=name, tokens_per_step=1e6)
        best = best_of(plan)
        assert plan is not None
        assert best is not None
        memory = (f"{best.peak_bytes / 1e9:.1f}", f"{plan.gpu_memory_bytes / 1e9:.0f}")
        row = [plan.device, str(best.sharding), best.label, f"{best.micro_batch}", *memory]
        rows.append([*row, f"{best.tokens_per_s:,.0f}", f"{best.days:,.1f}"])
    return table(("8 x", SPLIT, "recompute", "micro-batch", "GB", "of", "tokens/s", "days"), rows)


TABLES = {
    "what": what_to_run,
    "days": days,
    "memory": memory,
    "tensor-memory": tensor_memory,
    "sent": sent,
    "depth": depth,
    "links": links,
    "devices": other_devices,
}


if __name__ == "__main__":
    run(PAGE, TABLES, __doc__)
