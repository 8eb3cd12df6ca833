"""What can be trained on given devices as people read it, on 80 columns: the largest size first."""

from rich.console import Console

from ..accounting.changes import in_words
from ..accounting.plan import MemoryPlan
from ..accounting.sizes import SizePlans
from .plan_tables import describe_devices, describe_speed, make_table

_BRIEF = {
    "optimizer": ("8-bit", "AdamW's states (--optimizer adamw_8bit)"),
    "precision": ("bf16", "weights, gradients and states (--precision bf16)"),
    "gradient_release": ("release", "of gradients within the backward (--gradient-release), no accumulation"),
}
"""Field of `Request` that is changed -> its word in the table, and what that means."""


def show_sizes(sizes: SizePlans) -> None:
    """A line for each size and set of changes, and which change the next larger size wants."""
    console = Console(highlight=False)
    some = sizes.plans[-1]
    console.print(
        f"{some.method} on {describe_devices(some, sizes.gpus)}; sequences of {some.sequence:,} tokens; "
        f"{describe_speed(some)}\n"
    )
    table = make_table(("model", "change", "recompute"), ("micro-batch", "GB", "tokens/s", "days"))
    for plan in sizes.plans:
        table.add_row(*_row(plan))
    console.print(table)
    if sizes.refused:
        console.print(f"\nno plan for {', '.join(sizes.refused)}; of the last, {[*sizes.refused.values()][-1]}")
    console.print(f"\n{_next_larger(sizes.plans)}")
    console.print(f"\n{_legend(sizes.plans)}", style="dim")


def _row(plan: MemoryPlan) -> tuple[str, ...]:
    setting, changes = plan.recommended.setting, plan.changes.items()
    return (
        plan.model,
        ", ".join(_BRIEF[name][0] if name in _BRIEF else in_words({name: value}) for name, value in changes)
        or "as asked",
        setting.policy,
        f"{setting.micro_batch}",
        f"{setting.peak_bytes / 1e9:,.1f}",
        f"{setting.tokens_per_s:,.0f}",
        f"{setting.days:,.1f}",
    )


def _next_larger(plans: list[MemoryPlan]) -> str:
    """The largest as asked, and what lets the next one fit."""
    as_asked = next((plan.model for plan in plans if not plan.changes), None)
    largest = f"largest as asked: {as_asked}" if as_asked else "no size fits as asked"
    least = {plan.model: plan for plan in reversed(plans)}  # the first of each is the one with the fewest changes
    larger = [plan for model, plan in least.items() if plan.changes and model != as_asked]
    if not larger:
        return largest
    return f"{largest}; {larger[0].model} fits with {in_words(larger[0].changes)}"


def _legend(plans: list[MemoryPlan]) -> str:
    shown = {name for plan in plans for name in plan.changes}
    words = "".join(f"{word}: {meaning}. " for name, (word, meaning) in _BRIEF.items() if name in shown)
    return (
        f"{words}Each size with the fewest changes that make it fit (docs/accounting.md); --all adds further ones that "
        "make it faster. GB: peak on each device. --model gives the recipe lines."
    )


__all__ = ["show_sizes"]
