"""What every step is looked at for before the optimizer takes it: numbers that are not finite, and spikes."""

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any, Literal

from transformers import TrainerCallback

from ..errors import ConfigError, TrainingError
from ..ranges import ABOVE_0, COUNT, one_of, out_of_range, whole
from .run_folder import is_main_process

_log = logging.getLogger(__name__)

RANGES = {
    "on_nonfinite": one_of(("stop", "skip")),
    "nonfinite_limit": COUNT,
    "spike_window": whole(2, 10_000, "a whole number from 2 to 10000"),
    "spike_threshold": ABOVE_0,
    "max_hours": ABOVE_0,
}
"""Field of `Monitor` -> what it may be."""

SCORE_STEPS = 10_000
"""A spike score is over so many steps: OLMo-core's StabilityMonitorCallback, as are window and threshold."""

LIMIT_STEPS = 1000
"""`nonfinite_limit` is for so many steps. Our choice."""

STATE = "crosslayer_monitor"
"""Where trainer_state.json keeps what is carried over a resumption."""


@dataclass(kw_only=True)
class Monitor:
    """What a run does about numbers that go wrong, and about its time.

    Raises ConfigError, naming every field that is wrong.
    """

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Where the loss or the gradient norm of a step is not finite: `stop` ends the run before the optimizer takes the
    step; `skip` leaves the step out and counts it (the schedule and the data go on)."""

    nonfinite_limit: int = 10
    """So many steps left out within 1000 stop the run after all. Our choice."""

    spike_window: int = 128
    """Steps whose mean and standard deviation a loss or gradient norm is held against. OLMo-core's."""

    spike_threshold: float = 6.0
    """Standard deviations above the mean that make it a spike. OLMo-core's."""

    max_hours: float | None = None
    """The run saves a checkpoint and ends with the first step that is done later than this after its start, reading of
    data included: choose it so far below a time limit that a step, an evaluation and a save still fit. None: no
    limit."""

    def __post_init__(self) -> None:
        problems = list(out_of_range(vars(self), RANGES))
        if problems:
            raise ConfigError("; ".join(problems))


class StepMonitor(TrainerCallback):
    """Loss and gradient norm of every step, the same numbers in every process.

    Args:
        last_good_checkpoint: words for an error message.
    """

    def __init__(self, settings: Monitor, last_good_checkpoint: Callable[[], str]) -> None:
        self.settings = settings
        self.last_good_checkpoint = last_good_checkpoint
        self.loss, self.gradient_norm = SpikeScore(settings), SpikeScore(settings)
        self.skipped: list[int] = []  # steps
        self._losses: list[float] = []  # of the steps since the last log, without those left out

    def look(self, step: int, loss: float, norm: float, wrong: str | None) -> bool:
        """Note a step. Whether it is to be left out.

        Args:
            wrong: what of it is not finite, in any process.

        Raises TrainingError where the run has to stop.
        """
        if wrong is not None:
            self._leave_out(step, wrong)
            return True
        self._losses.append(loss)
        for name, value, score in (("loss", loss, self.loss), ("gradient norm", norm, self.gradient_norm)):
            # A norm that is not finite is here with fp16 alone, whose scaler has seen it.
            if math.isfinite(value) and score.add(step, value) and is_main_process():
                _log.warning("step %d: the %s, %.4g, is a spike", step, name, value)
        return False

    def _leave_out(self, step: int, wrong: str) -> None:
        if self.settings.on_nonfinite == "stop":
            raise TrainingError(
                f"the {wrong} is not finite at step {step}; {self.last_good_checkpoint()}; lower learning_rate, or set "
                "max_grad_norm or on_nonfinite=skip"
            )
        self.skipped.append(step)
        recent = sum(skipped > step - LIMIT_STEPS for skipped in self.skipped)
        if recent >= self.settings.nonfinite_limit:
            raise TrainingError(
                f"the {wrong} is not finite at step {step}, one of {recent} within {LIMIT_STEPS} "
                f"(nonfinite_limit={self.settings.nonfinite_limit}); {self.last_good_checkpoint()}; lower learning_rate"
            )
        if is_main_process():
            _log.warning("step %d is left out: its %s is not finite", step, wrong)

    def metrics(self) -> dict[str, float]:
        """For the log: the mean loss since the last one, and the scores."""
        found: dict[str, float] = {}
        if self._losses:
            found["loss"] = math.fsum(self._losses) / len(self._losses)
        self._losses = []
        for name, score in (("loss", self.loss), ("grad_norm", self.gradient_norm)):
            if score.compared:
                found[f"{name}_spike_score"] = score.score()
        if self.skipped:
            found["skipped_steps"] = len(self.skipped)
        return found

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        kept = state.stateful_callbacks.get(STATE)
        if kept is not None:
            self.loss.restore(kept["loss"])
            self.gradient_norm.restore(kept["gradient_norm"])
            self.skipped, self._losses = list(kept["skipped"]), list(kept["losses"])

    def state(self) -> dict[str, Any]:
        """For trainer_state.json; `on_train_begin` takes it from there."""
        scores = {"loss": self.loss.state(), "gradient_norm": self.gradient_norm.state()}
        return {**scores, "skipped": self.skipped, "losses": self._losses}


class SpikeScore:
    """How often a number stands out from those before it.

    A spike lies more than `spike_threshold` standard deviations above the mean of the `spike_window` steps before; the
    score is the share of spikes among the last 10,000 steps that could be compared.
    """

    def __init__(self, settings: Monitor) -> None:
        self.threshold = settings.spike_threshold
        self.before: deque[float] = deque(maxlen=settings.spike_window)
        self.spikes: list[int] = []  # steps
        self.compared = 0  # steps, up to SCORE_STEPS

    def add(self, step: int, value: float) -> bool:
        """Whether the value of this step is a spike; it is one of those before the next."""
        is_spike = False
        if len(self.before) == self.before.maxlen:
            deviation = pstdev(self.before)
            # OLMo-core's bound too: what hardly moves has no spikes.
            is_spike = deviation > 1e-10 and value > fmean(self.before) + self.threshold * deviation
            self.compared = min(self.compared + 1, SCORE_STEPS)
        self.before.append(value)
        self.spikes = [spike for spike in self.spikes if spike > step - SCORE_STEPS] + [step] * is_spike
        return is_spike

    def score(self) -> float:
        """In [0, 1]."""
        return len(self.spikes) / max(self.compared, 1)

    def state(self) -> dict[str, Any]:
        """For JSON."""
        return {"before": list(self.before), "spikes": self.spikes, "compared": self.compared}

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave; with another window the last of it."""
        self.before.clear()
        self.before.extend(state["before"])
        self.spikes, self.compared = list(state["spikes"]), int(state["compared"])


__all__ = ["RANGES", "Monitor", "SpikeScore", "StepMonitor"]
