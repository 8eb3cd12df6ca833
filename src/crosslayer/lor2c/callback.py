"""Fuse and inject while a `Trainer` trains: when, which, and the record of it.

At an event (the end of an epoch, or of an optimizer step) at most one pair is fused, then at most one module injected,
before that moment's evaluation and checkpoint. Everything a decision needs is read off the model, whose state carries
the structure through checkpoints: a resumed run decides as the uninterrupted one.
"""

import sys
from collections.abc import Callable
from typing import Any, Literal

import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging

from ..errors import ConfigError
from .blocks import AdaptedBlocks
from .structure import (
    CRITERIA,
    SURVIVORS,
    Criterion,
    Span,
    Survivor,
    choose_fuse,
    choose_inject,
    choose_owner,
    joint_sfs,
    paper_interval,
    sfs,
)

logger = logging.get_logger(__name__)

Count = int | Literal["auto"]


class LoR2CStructureCallback(TrainerCallback):
    """Runs MergeLoR2C, InjectLoR2C or, with both, IMLoR2C (arXiv 2503.00572) inside any `Trainer`.

    `max_fuses="auto"` and `max_injections="auto"` replace the paper's grid search over both numbers by a rule (ours).
    At an event in the first half of training,

    - the best pair by `criterion` is fused if a single module of rank r could carry the sum of both: the singular
      values of W + W' beyond the r-th hold at most `auto_threshold` of their sum;
    - the best module is injected if half its rank is enough: SFS <= `auto_threshold`;
    - nothing more is fused once the adapter has `parameter_budget` parameters or fewer;
    - nothing more is changed once an evaluation after a change is worse than the one before it by more than
      `validation_budget` (in units of the metric for the best model, or of the evaluation loss).

    Without a budget the spectra alone decide.

    Args:
        max_fuses: number of fuses over the whole training, or "auto".
        max_injections: number of injections, or "auto".
        interval: epochs or steps between two events; None = the paper's schedule, int(total / 4 / count) + 1 for fuses
            and injections each, with a count of a quarter of the blocks where it is "auto".
        interval_unit: "epochs" or "steps" (optimizer steps).
        criterion: structure.py says what each one does.
        survivor: whose weights a fused module keeps.
        max_span: blocks that a fused module covers at most; None = no limit, as published.
        parameter_budget: for "auto".
        validation_budget: for "auto".
        auto_threshold: for "auto"; 0.1 keeps nine tenths of the singular values' sum (our choice).
        adapter_name: None = the active adapter.

    Attributes:
        history: one dict per decision: step, epoch, action ("fuse" or "inject"), blocks (numbers of all blocks that
            the module covers), names, owner (fuse: the block whose weights live on), scores (list of
            {"blocks", "score"} of every module before), joint_scores of all pairs where `criterion` or "auto" judges
            pairs, adapter_parameters (after). The same dicts, with an "lor2c_" before each key, stand in the Trainer's
            `log_history`, through which a resumed run gets them back.
        log: called with a dict of numbers after each decision, for example `trainer.log`; None.
    """

    def __init__(
        self,
        max_fuses: Count = 0,
        max_injections: Count = 0,
        interval: int | None = None,
        interval_unit: Literal["steps", "epochs"] = "epochs",
        criterion: Criterion = "sfs",
        survivor: Survivor = "first",
        max_span: int | None = None,
        parameter_budget: int | None = None,
        validation_budget: float | None = None,
        auto_threshold: float = 0.1,
        adapter_name: str | None = None,
    ) -> None:
        for name, count in (("max_fuses", max_fuses), ("max_injections", max_injections)):
            if count != "auto" and (not isinstance(count, int) or count < 0):
                raise ConfigError(f"{name}={count!r} must be 0, a positive integer or 'auto'.")
        for name, value, allowed in (
            ("interval_unit", interval_unit, ("steps", "epochs")),
            ("criterion", criterion, CRITERIA),
            ("survivor", survivor, SURVIVORS),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is none of {', '.join(allowed)}.")
        if interval is not None and interval < 1:
            raise ConfigError(f"interval={interval!r} must be at least 1, or None for the paper's schedule.")
        if max_span is not None and max_span < 2:
            raise ConfigError(f"max_span={max_span!r} must be at least 2, or None for no limit.")
        self.max_fuses = max_fuses
        self.max_injections = max_injections
        self.interval = interval
        self.interval_unit = interval_unit
        self.criterion = criterion
        self.survivor = survivor
        self.max_span = max_span
        self.parameter_budget = parameter_budget
        self.validation_budget = validation_budget
        self.auto_threshold = auto_threshold
        self.adapter_name = adapter_name
        self.history: list[dict[str, Any]] = []
        self.log: Callable[[dict[str, float]], Any] | None = None

    # Moments of the training

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Checks the counts against the adapter, and reads `history` of a resumed run from its log.

        Raises ConfigError for injections without pairs, epochs that never end, and more changes than the blocks allow.
        """
        blocks = AdaptedBlocks(model, self.adapter_name)
        if self.max_injections and not blocks.can_be_injected:
            raise ConfigError(
                f"max_injections={self.max_injections!r}, but the adapter has no pairs to inject: create it with "
                "LoR2CConfig(injectable=True)."
            )
        if self.interval_unit == "epochs" and state.num_train_epochs >= sys.maxsize:
            raise ConfigError("The training data has no length, so epochs never end: choose interval_unit='steps'.")
        structure = blocks.structure
        for name, count, most in (
            ("max_fuses", self.max_fuses, len(structure.places) - 1),
            ("max_injections", self.max_injections, len(structure.places)),
        ):
            if count != "auto" and count > most:
                raise ConfigError(f"{name}={count} is more than an adapter of {len(structure.places)} blocks allows.")
        self.history = [
            {key.removeprefix("lor2c_"): value for key, value in entry.items() if key not in ("step", "epoch")}
            | {"step": entry["step"], "epoch": entry["epoch"]}
            for entry in state.log_history
            if "lor2c_action" in entry
        ]

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        """An event, where the interval is in epochs."""
        if self.interval_unit == "epochs" and state.epoch % 1 == 0:  # not one that max_steps broke off
            self._event(args, state, model, now=int(state.epoch), total=state.num_train_epochs)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """An event, where the interval is in steps."""
        if self.interval_unit == "steps":
            self._event(args, state, model, now=state.global_step, total=state.max_steps)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Warns where fewer fuses or injections came about than were asked for."""
        structure = AdaptedBlocks(model, self.adapter_name).structure
        for what, wanted, done in (
            ("fuses", self.max_fuses, structure.fuses),
            ("injections", self.max_injections, structure.injections),
        ):
            if wanted != "auto" and done < wanted:
                logger.warning(
                    f"{done} of {wanted} {what} came about: training ended before the next event, or no module was "
                    "left to choose from. See interval, interval_unit and max_span."
                )

    # Decisions

    def _event(self, args: TrainingArguments, state: TrainerState, model: nn.Module, now: int, total: float) -> None:
        blocks = AdaptedBlocks(model, self.adapter_name)
        structure = blocks.structure
        auto_may = now <= total / 2 and not self._costs_too_much(args, state)
        for count, done, change in (
            (self.max_fuses, structure.fuses, self._fuse),
            (self.max_injections, structure.injections, self._inject),
        ):
            if auto_may if count == "auto" else done < count:
                expected = max(1, len(blocks.layers) // 4) if count == "auto" else count
                if now % (self.interval or paper_interval(total, expected)) == 0:
                    change(blocks, state)

    def _fuse(self, blocks: AdaptedBlocks, state: TrainerState) -> None:
        structure = blocks.structure
        pairs = structure.neighbours(self.max_span)
        scores = blocks.scores(self.criterion)
        alignments = blocks.alignments(pairs) if self.criterion == "alignment" else None
        joint = None
        if self.max_fuses == "auto":
            joint = [joint_sfs(blocks.factors(lower), blocks.factors(upper)) for lower, upper in pairs]
        choice = choose_fuse(pairs, scores, self.criterion, alignments)
        if choice is not None and joint is not None:
            over_budget = self.parameter_budget is None or blocks.num_parameters() > self.parameter_budget
            if not over_budget or joint[choice] > self.auto_threshold:
                choice = None
        owner = choose_owner(*pairs[choice], scores, self.survivor) if choice is not None else None
        choice, owner = _of_first_process((choice, owner))
        if choice is None:
            return
        lower, upper = pairs[choice]
        blocks.structure = structure.fuse(lower, upper, owner)
        judged = alignments if alignments is not None else joint
        of_pairs = None if judged is None else _listed(pairs, judged)
        self._record(state, blocks, "fuse", Span(lower.first, upper.last, owner), scores, of_pairs)

    def _inject(self, blocks: AdaptedBlocks, state: TrainerState) -> None:
        structure = blocks.structure
        scores = blocks.scores(self.criterion)
        choice = choose_inject(structure, scores, self.criterion)
        if choice is not None and self.max_injections == "auto" and sfs(blocks.spectrum(choice)) > self.auto_threshold:
            choice = None
        choice = _of_first_process(choice)
        if choice is None:
            return
        blocks.structure = structure.inject(choice.first)
        self._record(state, blocks, "inject", choice, scores)

    def _costs_too_much(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether the evaluation after some change was worse than the one before it by more than the budget."""
        if self.validation_budget is None:
            return False
        name = args.metric_for_best_model or "loss"
        name = name if name.startswith("eval_") else f"eval_{name}"
        sign = 1 if args.greater_is_better or (args.greater_is_better is None and not name.endswith("loss")) else -1
        before, changed = None, False
        for entry in state.log_history:
            changed = changed or "lor2c_action" in entry
            if name in entry:
                value = sign * entry[name]
                if changed and before is not None and before - value > self.validation_budget:
                    return True
                before, changed = value, False
        return False

    def _record(
        self,
        state: TrainerState,
        blocks: AdaptedBlocks,
        action: str,
        span: Span,
        scores: dict[Span, float],
        of_pairs: list[dict] | None = None,
    ) -> None:
        covered = list(range(span.first, span.last + 1))
        entry: dict[str, Any] = {
            "step": state.global_step,
            "epoch": state.epoch,
            "action": action,
            "blocks": covered,
            "names": [blocks.names[block] for block in covered],
            "scores": _listed([(module, module) for module in scores], list(scores.values())),
            "adapter_parameters": blocks.num_parameters(),
        }
        if action == "fuse":
            entry["owner"] = span.owner
        if of_pairs is not None:
            entry["joint_scores"] = of_pairs
        self.history.append(entry)
        state.log_history.append(
            {key if key in ("step", "epoch") else f"lor2c_{key}": value for key, value in entry.items()}
        )
        if self.log is not None:
            structure = blocks.structure
            numbers = {"fuses": structure.fuses, "injections": structure.injections}
            numbers["adapter_parameters"] = entry["adapter_parameters"]
            self.log({f"lor2c_{name}": float(value) for name, value in numbers.items()})


def _listed(pairs: list[tuple[Span, Span]], scores: list[float]) -> list[dict]:
    return [
        {"blocks": list(range(lower.first, upper.last + 1)), "score": score}
        for (lower, upper), score in zip(pairs, scores, strict=True)
    ]


def _of_first_process(decision: Any) -> Any:
    """The decision of process 0 for all of them, so that equal spectra rounded differently cannot part them."""
    if not (dist.is_available() and dist.is_initialized()):
        return decision
    box = [decision]
    dist.broadcast_object_list(box, src=0)
    return box[0]
