"""What is shown of a run under way: a bar with the loss, or one log line a loss."""

import logging
import sys

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

_log = logging.getLogger(__name__)


def shows_bars() -> bool:
    """Whether progress goes to a terminal, where a bar can move; in a file or a pipe it is lines."""
    return sys.stderr.isatty()


class Progress(ProgressCallback):
    """The Trainer's bar, with loss and tokens/s beside its ETA instead of a line per log."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Loss and tokens/s go beside the bar, an evaluation on a line above it; in the first process alone."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            shown = {"loss": f"{logs['loss']:.3f}"}
            if "tokens_per_s" in logs:
                shown["tokens/s"] = f"{logs['tokens_per_s']:,.0f}"
            self.training_bar.set_postfix(shown)
        elif "eval_loss" in logs:
            self.training_bar.write(_in_words(state, logs))


class LogLines(TrainerCallback):
    """One log line for each loss, for runs without a bar (`disable_tqdm`)."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Logs a loss or an evaluation, in the first process alone."""
        if state.is_world_process_zero and logs and ("loss" in logs or "eval_loss" in logs):
            _log.info(_in_words(state, logs))


def _in_words(state, logs: dict[str, float]) -> str:
    if "eval_loss" in logs:
        found = [
            f"{name.removeprefix('eval_').replace('_', ' ')} {logs[name]:.{digits}f}"
            for name, digits in _SHOWN.items()
            if name in logs
        ]
        return f"step {state.global_step}: validation {', '.join(found)}"
    speed = f", {logs['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in logs else ""
    return f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}{speed}"


_SHOWN = {
    "eval_loss": 4,
    "eval_perplexity": 2,
    "eval_accuracy": 4,
    "eval_f1": 4,
    "eval_matthews_correlation": 4,
    "eval_pearson": 4,
    "eval_spearman": 4,
    "eval_mean_token_accuracy": 4,
}
"""What is said about an evaluation, with digits."""
