"""Losses as functions of outputs and labels, summed over what counts and divided by how much counts.

    loss = (sum over the predictions of a micro-batch) / num_items_in_batch

`num_items_in_batch` counts the predictions of the whole optimizer step, over all micro-batches and processes, so that
the same rows give the same loss and gradient however they are divided. Where it is None (a batch on its own), the
predictions of the batch are counted. With label smoothing e and V classes, a prediction with log-probabilities log p
and label y costs (1 - e) (-log p_y) + e / V sum_v (-log p_v), as in torch and in transformers' LabelSmoother.
"""

from typing import Any

import torch
from torch import nn

IGNORE_INDEX = -100
"""Label of a token or a class that does not count, as in transformers. Scores that do not count are NaN."""


class NextTokenLoss:
    """Cross entropy of the next token; a `compute_loss_func` of the Trainer."""

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """`outputs.logits` [B, T, V], labels [B, T] -> the loss, a scalar in float32."""
        targets = labels[:, 1:].flatten()
        losses = nn.functional.cross_entropy(
            first_output(outputs)[:, :-1].flatten(0, 1).float(),
            targets.to(first_output(outputs).device),
            ignore_index=IGNORE_INDEX,
            label_smoothing=self.smoothing,
            reduction="sum",
        )
        return _divided(losses, num_items_in_batch, (targets != IGNORE_INDEX).sum())


class RowLoss:
    """Cross entropy of a class, or the squared error of a score; a `compute_loss_func` of the Trainer."""

    def __init__(self, is_regression: bool, smoothing: float = 0.0) -> None:
        self.is_regression = is_regression
        self.smoothing = smoothing

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """`outputs.logits` [B, classes] (or [B, 1]), labels [B] -> the loss, a scalar in float32."""
        losses = self.of_rows(first_output(outputs), labels, self.smoothing)
        return _divided(losses.sum(), num_items_in_batch, self.counts(labels).sum())

    def of_rows(self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        """[B, classes], [B] -> [B] in float32; 0 for rows that do not count."""
        logits, labels = logits.float(), labels.to(logits.device)
        if not self.is_regression:
            return nn.functional.cross_entropy(
                logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=smoothing, reduction="none"
            )
        counts = self.counts(labels)
        errors = logits.squeeze(-1) - torch.where(counts, labels.float(), 0.0)
        return torch.where(counts, errors.square(), 0.0)

    def counts(self, labels: torch.Tensor) -> torch.Tensor:
        """[B] -> [B]: whether a row counts."""
        return ~labels.isnan() if self.is_regression else labels != IGNORE_INDEX


def first_output(outputs: Any) -> torch.Tensor:
    """The logits of a model's output without a loss, be it a ModelOutput, a tuple (T5 has more in it) or a tensor."""
    if isinstance(outputs, dict):
        return outputs["logits"]
    return outputs[0] if isinstance(outputs, tuple | list) else outputs


def without_repeats(labels: torch.Tensor, first_row: int, rows: int) -> torch.Tensor:
    """Labels [B, ...] of one process, those of rows that stand there a second time set to "does not count".

    accelerate fills the last batch of several processes up with the first rows of the data; `rows` is how many rows of
    all processes are real, `first_row` the number of this process's first row among them.
    """
    is_repeat = first_row + torch.arange(len(labels), device=labels.device) >= rows
    nothing = float("nan") if labels.is_floating_point() else IGNORE_INDEX
    return labels.masked_fill(is_repeat.view(-1, *[1] * (labels.dim() - 1)), nothing)


def _divided(total: torch.Tensor, count: Any, count_here: torch.Tensor) -> torch.Tensor:
    if count is None:
        count = count_here.clamp(min=1)
    if not torch.is_tensor(count):
        return total / count
    # torch.nn.DataParallel: the count stands there once for each device, and the Trainer multiplies by their number,
    # as for losses of single devices.
    return total / (count.to(total.device).reshape(-1)[0] * count.numel())
