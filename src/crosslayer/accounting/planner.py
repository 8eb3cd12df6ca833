"""Which setting to train in: memory policy, micro-batch and sharding that fit a device, and the fastest of them.

Arithmetic alone: memory by `estimate_memory`, time by `predict_step`, operation by operation, and what is waited for
links (communication.py). With a `utilisation` it is instead, for all operations,

    seconds per token and device = (forward + backward + recompute operations) / (utilisation x peak of the device)

What that leaves out: what starting a collective takes, the loader, evaluation.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..crnet.policies import POLICIES_OF
from ..errors import ConfigError
from .changes import SPLIT, changed_requests, changes_between, in_words
from .communication import AXES, Links, count_collectives, step_seconds
from .flops import Operations, count_operations, optimizer_operations
from .memory import estimate_memory
from .methods import OPTIMIZERS, TRAININGS, Adapter, Method, can_release, named_method, optimized, policy_of
from .parameters import count_parameters, count_trainable
from .plan import LINK_UTILISATION, MemoryPlan, Recommendation, Request, Setting
from .rates import device_and_rates
from .recipe_lines import recipe_lines
from .roofline import predict_step
from .shapes import SIZES, Shape, named_shape
from .splits import list_splits
from .steps import PRECISIONS, Precision, Sharding, Step
from .units import parse_bytes, parse_tokens, show_bytes

AS_FAST = 0.98
"""Settings within so much of the fastest count as equals: less than a prediction is worth. Our choice."""
WIDEST_INTERVAL = 24
"""Layers between kept states of `reversible` that plans propose at most. Our choice, measured at 48 and 80 layers:
gradients are then as close to exact ones as plain autograd's, with bf16 weights too (docs/benchmarks.md, exactness)."""
TOKENS_PER_PARAMETER = 20
"""Token budget where none is given: so many per parameter of the dense model (arXiv 2203.15556)."""


def make_plan(
    model: str | Mapping[str, Any] | Shape,
    method: str = "crnet",
    *,
    device: str | None = None,
    gpu_memory: float | None = None,
    bandwidth: float | None = None,
    network: float | None = None,
    gpus_per_node: int = 8,
    rank: int | None = None,
    tokens_per_step: float = 1e6,
    tokens: float | None = None,
    beside: Iterable[str] = ("dense", "cola", "galore"),
    add_gpus: bool = False,
    name: str | None = None,
    **request: Any,
) -> MemoryPlan:
    """Plan a training.

    Args:
        model: a name of `SIZES`, a `Shape`, or the fields of a configuration.
        method: a name of `TRAININGS`; "crnet" tries all memory policies, others with and without checkpointing.
        device: a name of `DEVICES`, or a file that `crosslayer bench device` wrote; h100 by default.
        gpu_memory: bytes of each device; the device's own by default.
        bandwidth, network: bytes per second that a device sends within its node and to others; 0.8 of the device's data
            sheet by default.
        gpus_per_node: devices of a node.
        rank: of the low-rank linears, of GaLore's and APOLLO's projections, of adapters; hidden_size // 4 (8 for
            adapters) by default.
        tokens: budget; 20 per parameter of the dense model by default.
        beside: other methods to plan for in the same place.
        add_gpus: plan for more devices where nothing else makes it fit.
        request: further fields of `Request`.

    Where nothing fits as asked the plan is made with the fewest changes on the same devices with which something does
    (changes.py); `MemoryPlan.changes` has them. Raises ConfigError for an unknown model, method or device, for a rank
    that does not fit, and when these do not help either: the message says what the smallest setting needs, and what
    would.
    """
    base = named_shape(model) if isinstance(model, str) else Shape.of(model)
    chosen, rates = device_and_rates(device or "h100")
    tokens = (
        TOKENS_PER_PARAMETER * sum(count_parameters(base.factorized("dense")).values()) if tokens is None else tokens
    )
    asked = Request(
        device=chosen,
        rates=rates,
        gpu_memory=chosen.memory if gpu_memory is None else gpu_memory,
        tokens_per_step=tokens_per_step,
        tokens=tokens,
        links=Links(
            node=gpus_per_node,
            within=LINK_UTILISATION * chosen.link if bandwidth is None else bandwidth,
            between=LINK_UTILISATION * chosen.network if network is None else network,
        ),
        **request,
    )
    shape, candidates = _candidates(base, method, rank)
    _check_optimizer(method, shape, candidates[0], asked)
    settings = list_settings(shape, candidates, asked)
    needed = min(setting.peak_bytes for setting in settings) / (1 - asked.reserve)
    used = _fitting_request(shape, candidates, settings, asked, add_gpus)
    settings = settings if used == asked else list_settings(shape, candidates, used)
    recommended = recommend(method, shape, candidates, settings, used)
    others: dict[str, Recommendation | str] = {}
    for other in beside:
        if other == method:
            continue
        try:
            other_shape, others_candidates = _candidates(base, other, rank)
            of_other = list_settings(other_shape, others_candidates, used)
            others[other] = recommend(other, other_shape, others_candidates, of_other, used)
        except ConfigError as error:
            others[other] = str(error)
    return MemoryPlan(
        model=name or (model if isinstance(model, str) else "the given model"),
        method=method,
        rank=_rank_of(shape, candidates[0], rank),
        parameters=sum(count_parameters(shape).values()),
        trainable=count_trainable(shape, candidates[0]),
        changes=changes_between(asked, used),
        needed_bytes=needed,
        device=chosen.name,
        peak_flops=used.peak_flops,
        utilisation=used.utilisation,
        is_measured=rates is not None,
        gpus=used.gpus,
        gpu_memory_bytes=used.gpu_memory,
        usable_bytes=used.usable,
        links=used.links,
        overlap=used.overlap,
        precision=used.precision,
        optimizer=optimized(candidates[0], used.optimizer).optimizer,
        gradient_release=used.gradient_release,
        sequence=used.sequence,
        tokens=round(used.tokens),
        settings=settings,
        recommended=recommended,
        beside=others,
    )


def policies_of(factorization: str, layers: int) -> list[Method]:
    """What may be kept, fewest operations first."""
    allowed = POLICIES_OF.get(factorization, ("none",))
    found = [Method(recompute=name) for name in ("none", "replay", "invert", "reversible") if name in allowed]
    if "reversible" in allowed:
        return [*found, Method(recompute="reversible", interval=min(layers, WIDEST_INTERVAL))]
    return [*found, Method(recompute="layers")]


def list_settings(shape: Shape, candidates: list[Method], request: Request) -> list[Setting]:
    """Every split and policy with micro-batches 1, 2, 4, ..., up to the first that does not fit."""
    candidates = [optimized(method, request.optimizer) for method in candidates]
    return [
        setting
        for sharding in list_splits(shape, candidates[0], request)
        for method in candidates
        for setting in _micro_batches(shape, method, request, sharding)
    ]


def _micro_batches(shape: Shape, method: Method, request: Request, sharding: Sharding) -> Iterable[Setting]:
    if request.micro_batch is not None:
        yield make_setting(shape, method, request, sharding, request.micro_batch)
        return
    largest = max(1, round(request.tokens_per_step / (sharding.data * request.sequence)))
    micro_batch = 1
    while micro_batch <= largest:
        setting = make_setting(shape, method, request, sharding, micro_batch)
        yield setting
        if not setting.fits:
            return
        micro_batch *= 2


def make_setting(shape: Shape, method: Method, request: Request, sharding: Sharding, micro_batch: int) -> Setting:
    """One way to run a step, with its memory, operations, communication and time."""
    releases = request.gradient_release and can_release(method, shape.factorization)
    share = request.tokens_per_step / (sharding.data * request.sequence * micro_batch)
    accumulation = 1 if releases else max(1, round(share))
    step = Step(
        sequence=request.sequence,
        micro_batch=micro_batch,
        precision=PRECISIONS[request.precision],
        sharding=sharding,
        accumulates=accumulation > 1,
        releases_gradients=releases,
        fused_norms=request.speed.kind == "cuda",
    )
    memory = estimate_memory(shape, step, method)
    operations = count_operations(shape, request.sequence, method, tokens=step.tokens)
    compute, kernels = _compute_seconds(shape, method, request, step, operations)
    collectives = count_collectives(shape, step, method)
    seconds = step_seconds(compute, request.links.seconds(collectives, sharding), accumulation, request.overlap)
    computing = accumulation * (compute["forward"] + compute["backward"]) + compute["update"]
    tokens_per_step = sharding.data * step.tokens * accumulation
    sent = dict.fromkeys(AXES, 0.0)
    for collective in collectives:
        sent[collective.axis] += collective.sent(sharding) * (1 if collective.phase == "update" else accumulation)
    total = request.tokens / tokens_per_step * seconds
    return Setting(
        policy=method.recompute,
        interval=_interval(shape, method),
        micro_batch=micro_batch,
        accumulation=accumulation,
        tensor_parallel=sharding.tensor,
        fsdp=sharding.fsdp,
        replicas=sharding.replicas,
        tokens_per_step=tokens_per_step,
        memory_bytes=memory,
        fits=sum(memory.values()) <= request.usable,
        operations_per_token={
            "forward": sum(operations.forward.values()),
            "backward": sum(operations.backward.values()),
            "recompute": sum(operations.recompute.values()),
        },
        kernel_seconds={name: x * (1 if name == "update" else accumulation) for name, x in kernels.items()},
        sent_bytes=sent,
        step_seconds=seconds,
        waiting_seconds=max(0.0, seconds - computing),
        tokens_per_s=tokens_per_step / seconds,
        days=total / 86400,
        device_hours=total / 3600 * request.gpus,
    )


def _compute_seconds(
    shape: Shape, method: Method, request: Request, step: Step, own: Operations
) -> tuple[dict[str, float], dict[str, float]]:
    """Of a micro-batch on one device by phase, and of the update; and of its kernels by what they are."""
    if request.utilisation is None:
        time = predict_step(shape, step, request.speed, method)
        phases = time.by_phase
        phases["backward"] += phases.pop("recompute")
        return phases, time.by_part
    if step.sharding.tensor > 1:
        own = count_operations(shape, request.sequence, method, tokens=step.tokens, tensor=step.sharding.tensor)
    speed = request.utilisation * request.peak_flops
    phases = {
        "forward": step.tokens * sum(own.forward.values()) / speed,
        "backward": step.tokens * (sum(own.backward.values()) + sum(own.recompute.values())) / speed,
        "update": optimizer_operations(shape, method) / speed,
    }
    return phases, {}


def _interval(shape: Shape, method: Method) -> int | None:
    """As asked, or the policy's own; None where no state is kept at regular distances."""
    policy = policy_of(method, shape.factorization)
    if policy is None or method.recompute == "none":
        return method.interval
    return policy.interval(method.interval, shape.num_hidden_layers)


def fastest(settings: Iterable[Setting]) -> Setting | None:
    """The fastest that fits; of its equals (`AS_FAST`) the simplest split, then the fastest policy and micro-batch."""
    fitting = [setting for setting in settings if setting.fits]
    best = max((setting.tokens_per_s for setting in fitting), default=0.0)
    equals = [setting for setting in fitting if setting.tokens_per_s >= AS_FAST * best]
    return max(equals, key=lambda s: (-s.tensor_parallel, -s.fsdp, s.tokens_per_s, s.micro_batch), default=None)


def recommend(
    method: str, shape: Shape, candidates: list[Method], settings: list[Setting], request: Request
) -> Recommendation:
    """The fastest that fits. Raises ConfigError when nothing does, with the smallest that would and what to change."""
    best = fastest(settings)
    if best is None:
        smallest = min(settings, key=lambda s: s.peak_bytes)
        needed = smallest.peak_bytes / (1 - request.reserve)
        raise ConfigError(
            f"{method} does not fit in {show_bytes(request.gpu_memory)} on each of {request.gpus}: the smallest "
            f"setting (recompute {smallest.label}, micro-batch {smallest.micro_batch}{_split_in_words(smallest)}) "
            f"needs {show_bytes(needed)} with {request.reserve:.0%} in reserve; {_advice(shape, candidates, request)}"
        )
    return Recommendation(
        method=method,
        parameters=sum(count_parameters(shape).values()),
        setting=best,
        reason=_reason(best, settings),
        recipe=recipe_lines(shape, candidates[0], best, request),
    )


def _split_in_words(setting: Setting) -> str:
    axes = (("tensor_parallel", setting.tensor_parallel), ("fsdp", setting.fsdp))
    return "".join(f", {name}={size}" for name, size in axes if size > 1)


def _fitting_request(
    shape: Shape, candidates: list[Method], settings: list[Setting], asked: Request, add_gpus: bool
) -> Request:
    """As asked where that fits or nothing would; else with the fewest changes that leave devices and split alone."""
    if fastest(settings) is not None:
        return asked
    changed, _ = _cheapest(shape, candidates, asked) or (asked, None)
    moves = changes_between(asked, changed).keys() & {"gpus", *SPLIT}
    return asked if moves and not add_gpus else changed


def _cheapest(shape: Shape, candidates: list[Method], asked: Request) -> tuple[Request, Setting] | None:
    """The first changed request under which something fits, with one sequence on each device where none is given."""

    def fit(changed: Request) -> Setting | None:
        return fastest(list_settings(shape, candidates, replace(changed, micro_batch=changed.micro_batch or 1)))

    for alike in changed_requests(shape, candidates[0], asked):
        if fit(alike[-1]) is not None:
            return next((changed, found) for changed in alike if (found := fit(changed)) is not None)
    return None


def _advice(shape: Shape, candidates: list[Method], asked: Request) -> str:
    """What to give instead."""
    cheapest = _cheapest(shape, candidates, asked)
    if cheapest is None:
        return "give more memory, a shorter sequence or a smaller model: more gpus would not help"
    changed, found = cheapest
    changes = {name: value for name, value in changes_between(asked, changed).items() if name not in SPLIT}
    if changes and changed.gpus == asked.gpus:
        return f"it fits with {in_words(changes)}"
    words = f"{in_words(changes)}, " if changes else ""
    split = f"tensor_parallel={found.tensor_parallel}, fsdp={found.fsdp}"
    return f"give {words}{split} and micro_batch=1 (recompute {found.label})"


def _check_optimizer(name: str, shape: Shape, trained: Method, asked: Request) -> None:
    """Raises ConfigError for an optimizer, or a step within the backward, that the method does not have."""
    used = optimized(trained, asked.optimizer)
    if asked.optimizer is not None and used.optimizer != asked.optimizer:
        raise ConfigError(f"optimizer={asked.optimizer!r}: {name} is trained by {trained.optimizer}; leave it out")
    if asked.gradient_release and not can_release(used, shape.factorization):
        what = name if asked.optimizer is None else f"{name} with optimizer={asked.optimizer!r}"
        raise ConfigError(
            f"gradient_release=True: it is not known for {what}, only for AdamW or Muon on all weights; leave it out"
        )


def _reason(best: Setting, settings: list[Setting]) -> str:
    policies = {s.label: s for s in settings if s.micro_batch == 1}
    faster = [s for s in policies.values() if not s.fits and s.tokens_per_s > best.tokens_per_s * (1 + 1e-9)]
    reason = f"the fastest that fits, with the largest micro-batch of {best.micro_batch}"
    if not faster:
        return f"{reason}: nothing has to be run again" if best.operations_per_token["recompute"] == 0 else reason
    missed = ", ".join(
        f"{s.label} would need {show_bytes(s.peak_bytes)} at micro-batch {s.micro_batch}" for s in faster
    )
    return f"{reason}; {missed}"


def _candidates(base: Shape, name: str, rank: int | None) -> tuple[Shape, list[Method]]:
    """The model of a method, and what it may keep."""
    factorization, trained = named_method(name)
    density = 0.03 if factorization == "sltrain" else 0.0  # SLTrain's scripts
    is_its_own = base.factorization == factorization and rank is None and base.rank is not None
    of_layers = rank if factorization in ("cross_layer", "low_rank", "cola", "sltrain") else None
    shape = base if is_its_own else base.factorized(factorization, of_layers, density)
    if trained.adapter is not None and rank is not None:
        trained = replace(trained, adapter=replace(trained.adapter, rank=rank))
    if trained.optimizer not in OPTIMIZERS and rank is not None:
        trained = replace(trained, optimizer_rank=rank)
    if trained.recompute != "none":
        return shape, [trained]
    policies = policies_of(factorization, shape.num_hidden_layers)
    return shape, [replace(trained, recompute=policy.recompute, interval=policy.interval) for policy in policies]


def _rank_of(shape: Shape, trained: Method, asked: int | None) -> int | None:
    if trained.adapter is not None:
        return trained.adapter.rank
    if shape.factorization != "dense":
        return shape.rank
    if trained.optimizer in OPTIMIZERS:
        return None
    return asked or trained.optimizer_rank or shape.hidden_size // 4


__all__ = [
    "SIZES",
    "TRAININGS",
    "Adapter",
    "MemoryPlan",
    "Precision",
    "Recommendation",
    "Request",
    "Setting",
    "fastest",
    "list_settings",
    "make_plan",
    "make_setting",
    "parse_bytes",
    "parse_tokens",
    "policies_of",
    "recommend",
    "show_bytes",
]
