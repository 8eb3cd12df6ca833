"""What can be trained on given devices: the sizes of `SIZES`, each with the fewest changes with which it fits."""

from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError
from .changes import LIGHTER, combine
from .plan import MemoryPlan
from .planner import make_plan
from .shapes import SIZES


@dataclass(frozen=True, kw_only=True)
class SizePlans:
    """Plans of several sizes, the largest first and each with the fewest changes first.

    Args:
        gpus: that are asked for.
        refused: size -> why it has no plan.
    """

    gpus: int
    plans: list[MemoryPlan]
    refused: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: without the settings that were looked at."""
        plans = [{name: x for name, x in plan.to_dict().items() if name != "settings"} for plan in self.plans]
        return {"gpus": self.gpus, "plans": plans, "refused": self.refused}


def plan_sizes(method: str = "crnet", *, everything: bool = False, **given: Any) -> SizePlans:
    """Every size as asked, else with the fewest changes, more devices among them.

    Args:
        everything: beside that, with further changes on the same devices that make it faster.
        given: arguments of `make_plan`.

    Raises ConfigError where no size has a plan: the reason of the smallest.
    """
    plans, refused = [], {}
    for name in reversed(SIZES):
        try:
            least = make_plan(name, method, beside=(), add_gpus=True, **given)
        except ConfigError as error:
            refused[name] = str(error)
            continue
        plans.append(least)
        if everything:
            plans += _faster(least, method, given)
    if not plans:
        raise ConfigError(refused[next(iter(SIZES))])
    return SizePlans(gpus=given.get("gpus", 1), plans=plans, refused=refused)


def _faster(least: MemoryPlan, method: str, given: dict[str, Any]) -> list[MemoryPlan]:
    """With further changes on the same devices, as long as they make it faster."""
    if not least.changes.keys() <= {name for change in LIGHTER for name in change}:
        return []
    found = [least]
    for changes in combine([change for change in LIGHTER if not change.items() <= given.items()]):
        if not least.changes.items() < changes.items():
            continue
        try:
            plan = make_plan(least.model, method, beside=(), **given | changes)
        except ConfigError:  # what the method or the number of devices does not allow
            continue
        if plan.recommended.setting.tokens_per_s > 1.001 * max(p.recommended.setting.tokens_per_s for p in found):
            found.append(replace(plan, changes=changes))
    return found[1:]


__all__ = ["SizePlans", "plan_sizes"]
