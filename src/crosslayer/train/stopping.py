"""Runs that are asked to end: by a signal of the scheduler, or by their own time limit.

SIGTERM and SIGUSR1 are noted; the step under way is finished, a checkpoint saved, and the run ends with
RunStoppedError. All processes of a run stop at the same step, whichever of them was asked.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainerCallback

from ..workers import hear_parent_alone

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
EVALUATION_DUE = "crosslayer_evaluation_due"
"""In trainer_state.json of a checkpoint that was saved in place of an evaluation: its resumption evaluates first."""

_is_listening = False


class StopEarly(TrainerCallback):
    """Ends a run between two steps, with a checkpoint."""

    def __init__(self, max_hours: float | None = None) -> None:
        self.max_hours = max_hours
        self.started = time.monotonic()
        self.reason: str | None = None
        self.is_stopping = False  # agreed among the processes
        self._can_stop = False
        self._evaluates_at_start = False

    def count_from(self, started: float) -> None:
        """When the hours began, by `time.monotonic`."""
        self.started = started

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In here a run can be asked to stop. Signals need the main thread of a process, and forked workers leave them
        to it."""
        global _is_listening
        is_main_thread = threading.current_thread() is threading.main_thread()
        before = {each: signal.signal(each, self._on_signal) for each in SIGNALS if is_main_thread}
        self._can_stop, _is_listening = True, is_main_thread
        try:
            yield
        finally:
            self._can_stop, _is_listening = False, False
            for each, handler in before.items():
                signal.signal(each, handler)

    def _on_signal(self, signum, frame) -> None:
        self.reason = signal.Signals(signum).name

    def is_asked(self) -> bool:
        """Whether this process has been asked to stop."""
        if not self._can_stop:
            return False
        if self.max_hours is not None and time.monotonic() >= self.started + 3600 * self.max_hours:
            self.reason = self.reason or f"max_hours={self.max_hours:g}"
        return self.reason is not None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._evaluates_at_start = args.eval_on_start
        if state.stateful_callbacks.pop(EVALUATION_DUE, None):
            args.eval_on_start = True

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        args.eval_on_start = self._evaluates_at_start

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if not self.is_stopping or state.global_step >= state.max_steps:
            return
        control.should_save = control.should_training_stop = True
        if control.should_evaluate and args.metric_for_best_model is None:  # no checkpoint and no rate hangs on it
            state.stateful_callbacks[EVALUATION_DUE] = True
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if self.is_stopping and state.epoch % 1:  # the Trainer calls this one wherever it stops
            control.should_log = control.should_evaluate = control.should_save = False


def _in_child() -> None:
    if _is_listening:
        hear_parent_alone(SIGNALS)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)

__all__ = ["SIGNALS", "StopEarly"]
