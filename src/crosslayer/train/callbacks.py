"""Callbacks of runs: one logs, evaluates and saves as often as it was asked to."""

from typing import Any

from transformers import TrainerCallback

from .gradient_release import release_gradients


class ReleaseGradients(TrainerCallback):
    """Steps within the backward (gradient_release.py), once the run's own optimizer is there."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        release_gradients(self.trainer.own_optimizer())


class OwnIntervals(TrainerCallback):
    """A resumed run logs, evaluates and saves as often as it was asked to; the Trainer does as its checkpoint says."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        state.compute_steps(args, state.max_steps)


class EvaluateAtTheEnd(TrainerCallback):
    """Evaluates after the last step, whatever `eval_steps` says, while trackers still listen."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
