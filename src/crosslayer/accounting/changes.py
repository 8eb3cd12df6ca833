"""What to change where nothing fits as asked: the fewest changes, and of as many the first in this order.

    optimizer          moments of AdamW in 8 bits
    precision          weights, gradients and moments in bf16
    gradient_release   the optimizer steps within the backward; a step has then the tokens of one micro-batch
    gpus               twice as many devices, four times, ...; after all of the above, alone and with the first two

The order is our choice. It begins with what changes the training least: 8-bit moments leave it as it is but for their
rounding; bf16 weights lose updates below theirs; without accumulation a step has fewer tokens, and nothing is clipped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from .methods import Method, can_release, optimized
from .plan import Request
from .shapes import Shape

LIGHTER: tuple[dict[str, Any], ...] = (
    {"optimizer": "adamw_8bit"},
    {"precision": "bf16"},
    {"gradient_release": True},
)
"""Fields of `Request`, in order: what makes a step on the same devices smaller."""
SPLIT = ("tensor_parallel", "fsdp", "micro_batch")
MOST_DOUBLINGS = 10


def list_lighter(shape: Shape, trained: Method, request: Request) -> list[dict[str, Any]]:
    """Changes on the same devices, fewest first; without those that are asked for or not to be had."""
    is_possible = {
        "optimizer": optimized(trained, request.optimizer).optimizer == "adamw",
        "precision": request.precision != "bf16",
        "gradient_release": request.gpus == 1
        and not request.gradient_release
        and can_release(optimized(trained, request.optimizer), shape.factorization),
    }
    return combine([change for change in LIGHTER if is_possible[next(iter(change))]])


def combine(single: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One of them, two, ..., all."""
    return [
        {name: value for change in several for name, value in change.items()}
        for count in range(1, len(single) + 1)
        for several in combinations(single, count)
    ]


def changed_requests(shape: Shape, trained: Method, request: Request) -> Iterator[list[Request]]:
    """In the order of this page, and before all of it: another split or micro-batch than the one that is asked for.

    Requests of one list differ in the number of devices: where the last has no room the others have none.
    """
    free: dict[str, Any] = dict.fromkeys(SPLIT)
    yield [_with_gpus(request, request.gpus, **free)]
    lighter = list_lighter(shape, trained, request)
    for change in lighter:
        yield [replace(request, **change)]
    doubled = [request.gpus * 2**power for power in range(1, MOST_DOUBLINGS + 1)]
    yield [_with_gpus(request, gpus, **free, gradient_release=False) for gpus in doubled]
    on_many = [change for change in lighter if "gradient_release" not in change]
    if on_many:
        yield [_with_gpus(request, gpus, **free, **on_many[-1], gradient_release=False) for gpus in doubled]


def _with_gpus(request: Request, gpus: int, **fields: Any) -> Request:
    """Over so many devices, with a sequence for each."""
    return replace(request, gpus=gpus, tokens_per_step=max(request.tokens_per_step, request.sequence * gpus), **fields)


def changes_between(asked: Request, used: Request) -> dict[str, Any]:
    """Fields in which two requests differ, of those that a plan may change; None: whatever is fastest."""
    names = ("optimizer", "precision", "gradient_release", "gpus", *SPLIT)
    return {name: getattr(used, name) for name in names if getattr(used, name) != getattr(asked, name)}


def in_words(changes: Mapping[str, Any]) -> str:
    """Short, for people."""
    words = {"optimizer": "8-bit states", "precision": "bf16 weights", "gradient_release": "gradient release"}
    return ", ".join(
        words.get(name) or (f"{name} left open" if value is None else f"{value} {name}")
        for name, value in changes.items()
    )


__all__ = ["LIGHTER", "SPLIT", "changed_requests", "changes_between", "combine", "in_words"]
