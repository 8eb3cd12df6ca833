"""A plan as people read it, on 80 columns: the recommendation first, then what it was chosen from."""

from collections.abc import Callable, Iterable

import yaml
from rich.console import Console
from rich.table import Table

from ..accounting.changes import in_words
from ..accounting.plan import MemoryPlan, Recommendation, Setting
from ..accounting.planner import fastest, show_bytes

SPLIT = "TP FSDP DDP"
"""Header of a split: devices that split each layer x that share weights x replicas."""


def show(plan: MemoryPlan, everything: bool = False) -> None:
    """The model and the devices, the recommendation with its recipe lines, and tables of what stood beside it."""
    console = Console(highlight=False)
    best = plan.recommended
    _show_model(console, plan)
    _show_changes(console, plan)
    _show_recommended(console, best)
    if everything:
        console.print(_settings(plan.settings), "")
    else:
        alike = [setting for setting in plan.settings if setting.sharding == best.setting.sharding]
        console.print(_settings(_best_of_each(alike, lambda setting: setting.label)), "")
        splits = _best_of_each(plan.settings, lambda setting: str(setting.sharding))
        if len(splits) > 1:
            console.print(_settings(splits), "")
    console.print(_beside({plan.method: best, **plan.beside}))
    for reason in (other for other in plan.beside.values() if isinstance(other, str)):
        console.print(reason)
    console.print(f"\n{_assumptions(plan)}", style="dim")


def _show_model(console: Console, plan: MemoryPlan) -> None:
    rank = f", rank {plan.rank}" if plan.rank else ""
    trained = f", {plan.trainable / 1e6:,.2f}M trained" if plan.trainable != plan.parameters else ""
    console.print(f"{plan.model}, {plan.method}{rank}: {plan.parameters / 1e6:,.2f}M parameters{trained}")
    console.print(
        f"{describe_devices(plan, plan.gpus)}; {plan.precision}, sequences of {plan.sequence:,} tokens; "
        f"{_in_billions(plan.tokens)} tokens {describe_speed(plan)}\n"
    )


def _in_billions(tokens: float) -> str:
    return f"{tokens / 1e9:,.0f}B" if tokens >= 1e11 else f"{tokens / 1e9:.3g}B"


def describe_speed(plan: MemoryPlan) -> str:
    """What times rest on."""
    peak = f"{plan.peak_flops / 1e12:,.3g} TFLOP/s"
    if plan.utilisation is not None:
        return f"at {plan.utilisation:.0%} of {peak}"
    return f"by a roofline per operation, {'as measured' if plan.is_measured else 'by data sheet'}, peak {peak}"


def describe_devices(plan: MemoryPlan, gpus: int) -> str:
    """So many of which, and their memory."""
    sizes = f"{show_bytes(plan.gpu_memory_bytes)} each, {show_bytes(plan.usable_bytes)} to use"
    return f"{gpus} x {plan.device}, {sizes}"


def _show_changes(console: Console, plan: MemoryPlan) -> None:
    """What is not as asked."""
    if not plan.changes:
        return
    tokens = plan.recommended.setting.tokens_per_step
    fewer = f"; a step has {tokens:,} tokens" if "gradient_release" in plan.changes else ""
    console.print(
        f"as asked it does not fit: the smallest setting needs {show_bytes(plan.needed_bytes)} with the reserve\n"
        f"the fewest changes with which it does: {in_words(plan.changes)}{fewer}\n"
    )


def _show_recommended(console: Console, best: Recommendation) -> None:
    setting = best.setting
    axes = (("TP", setting.tensor_parallel), ("FSDP", setting.fsdp), ("replicas", setting.replicas))
    split = "".join(f", {name} {size}" for name, size in axes if size > 1)
    console.print(f"recommended: recompute {setting.label}, micro-batch {setting.micro_batch}{split}")
    console.print(f"because it is {best.reason}")
    parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in setting.memory_bytes.items())
    console.print(f"GB on each device: {setting.peak_bytes / 1e9:.1f} = {parts}")
    if setting.kernel_seconds:
        shares = ", ".join(f"{part} {seconds:.2f}" for part, seconds in setting.kernel_seconds.items())
        console.print(f"seconds of a step, {setting.step_seconds:.2f}: {shares}")
    if sum(setting.sent_bytes.values()):
        sent = ", ".join(f"{axis} {size / 1e9:,.1f}" for axis, size in setting.sent_bytes.items() if size)
        console.print(f"GB sent by each device in a step: {sent}")
        console.print(f"{setting.waiting_seconds:.2f} s of a step of {setting.step_seconds:.2f} s are waiting for it")
    console.print()
    if best.recipe:
        console.print(yaml.safe_dump(best.recipe, sort_keys=False))


def _best_of_each(settings: Iterable[Setting], kind: Callable[[Setting], str]) -> list[Setting]:
    """Of each kind, in the order of their first: the fastest that fits, else the smallest."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(kind(setting), []).append(setting)
    return [fastest(group) or min(group, key=lambda s: s.peak_bytes) for group in groups.values()]


def make_table(left: Iterable[str], right: Iterable[str]) -> Table:
    """Without lines: titles of what stands at the left of its column, and at the right."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for title in left:
        table.add_column(title)
    for title in right:
        table.add_column(title, justify="right")
    return table


def _settings(settings: Iterable[Setting]) -> Table:
    table = make_table((SPLIT, "recompute", "fits"), ("batch", "GB", "sent GB", "tokens/s", "days"))
    for setting in settings:
        table.add_row(
            str(setting.sharding),
            setting.label,
            "yes" if setting.fits else "no",
            f"{setting.micro_batch} x {setting.accumulation}",
            f"{setting.peak_bytes / 1e9:,.1f}",
            f"{sum(setting.sent_bytes.values()) / 1e9:,.0f}",
            f"{setting.tokens_per_s:,.0f}",
            f"{setting.days:,.1f}",
        )
    return table


def _beside(plans: dict[str, Recommendation | str]) -> Table:
    table = make_table(("method", SPLIT, "recompute"), ("parameters", "GB", "tokens/s", "days"))
    for name, other in plans.items():
        if not isinstance(other, str):
            setting = other.setting
            table.add_row(
                name,
                str(setting.sharding),
                setting.label,
                f"{other.parameters / 1e6:,.0f}M",
                f"{setting.peak_bytes / 1e9:,.1f}",
                f"{setting.tokens_per_s:,.0f}",
                f"{setting.days:,.1f}",
            )
    return table


def _assumptions(plan: MemoryPlan) -> str:
    time = "each operation has the time of its shape (docs/roofline.md)"
    if plan.utilisation is not None:
        time = "all operations run at one share of the peak"
    text = (
        "batch: sequences x accumulation on each device. GB: peak on each device; --json has its parts. All of it is "
        f"arithmetic: {time}."
    )
    if plan.gpus == 1:
        return text
    beside = "beside the computation" if plan.overlap else "after the computation"
    return (
        f"{text} Links: {plan.links.within / 1e9:,.0f} GB/s within a node of {plan.links.node}, "
        f"{plan.links.between / 1e9:,.1f} GB/s to others, from each device; FSDP and DDP send {beside}, tensor "
        "parallelism is waited for (docs/scale.md)."
    )


__all__ = ["describe_devices", "describe_speed", "make_table", "show"]
