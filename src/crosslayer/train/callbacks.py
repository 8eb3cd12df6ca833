"""Callbacks of every run: it logs, evaluates and saves as often as it was asked to."""

from transformers import TrainerCallback


class OwnIntervals(TrainerCallback):
    """A resumed run logs, evaluates and saves as often as it was asked to; the Trainer does as its checkpoint says."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        state.compute_steps(args, state.max_steps)


class EvaluateAtTheEnd(TrainerCallback):
    """Evaluates after the last step, whatever `eval_steps` says, while trackers still listen."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
