"""The Trainer of classification and regression tasks."""

from typing import Any

import torch
from torch import nn

from ..data.tasks import Task
from ..evaluate.task_metrics import measure_task
from .losses import RowLoss, first_output
from .methods import head_parameters
from .trainer import SafeTrainer


class TaskTrainer(SafeTrainer):
    """SafeTrainer with three differences.

    - the loss is the mean over the rows of a whole step (losses.py): most models' own losses are means over a batch,
      whatever transformers infers from the arguments of their `forward`;
    - `eval_loss` is the mean over the validation rows, without label smoothing, whatever the batches and processes;
    - the new head may take a learning rate of its own.
    """

    def __init__(self, *args, task: Task, head_lr_factor: float = 1.0, **kwargs) -> None:
        self.row_loss = RowLoss(task.kind == "regression", kwargs["args"].label_smoothing_factor)
        super().__init__(
            *args,
            compute_loss_func=self.row_loss,
            compute_metrics=lambda prediction: _measure(task, prediction.predictions, prediction.label_ids),
            preprocess_logits_for_metrics=self._for_metrics,
            **kwargs,
        )
        self.head_lr_factor = head_lr_factor

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """SafeTrainer's, made once; the head gets groups of its own if `head_lr_factor` is not 1."""
        had_none = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if had_none and self.head_lr_factor != 1.0:
            split_off_head(optimizer, self.model, self.args.learning_rate * self.head_lr_factor)
        return optimizer

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> Any:
        """The Trainer's, with the mean over the rows as its loss."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # The Trainer's is the mean of batch means, each weighted by how many rows a batch should have.
        output.metrics[f"{metric_key_prefix}_loss"] = output.metrics.pop(f"{metric_key_prefix}_mean_of_rows")
        return output

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        # Rows that count, told apart from scores of -100. As `shift_labels`, since labels of rows are not shifted.
        counted = [self.row_loss.counts(batch["labels"]).long() - 1 for batch in batch_samples]
        labels = [count.masked_fill(count < 0, -100) for count in counted]
        return super()._get_num_items_in_batch([{"labels": row, "shift_labels": row} for row in labels], device)

    def _for_metrics(self, output: Any, labels: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes] -> [B, 2]: the predicted class or score, and the loss of the row."""
        logits = first_output(output)
        predicted = logits.squeeze(-1) if self.row_loss.is_regression else logits.argmax(dim=-1)
        return torch.stack([predicted.double(), self.row_loss.of_rows(logits, labels).double()], dim=1)


def _measure(task: Task, predictions: Any, labels: Any) -> dict[str, float]:
    predicted, losses = predictions[:, 0], predictions[:, 1]
    if task.kind == "classification":
        predicted = predicted.astype(int)
    return {**measure_task(task.metrics, predicted, labels), "mean_of_rows": float(losses.mean())}


def split_off_head(optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float) -> None:
    """Give the head's parameters groups of their own with another learning rate; before the first step."""
    is_peft = hasattr(model, "peft_config")
    names = set() if is_peft else head_parameters(model)
    head = {id(p) for name, p in model.named_parameters() if "modules_to_save." in name or name in names}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in head]
        rest = [parameter for parameter in group["params"] if id(parameter) not in head]
        if own and rest:
            group["params"] = rest
            optimizer.add_param_group({**group, "params": own, "lr": learning_rate})
        elif own:
            group["lr"] = learning_rate
