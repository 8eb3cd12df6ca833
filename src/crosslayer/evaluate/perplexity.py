"""Perplexity and bits per byte over a whole split."""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from .documents import Reader, single_documents, try_out

_log = logging.getLogger(__name__)
IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Result of `measure_perplexity`.

    `loss` is the mean negative log-likelihood in nats over all predicted tokens of the split, each counted once;
    `perplexity` is exp(loss); `bits_per_byte` is the summed negative log-likelihood in bits over the UTF-8 bytes of the
    text (None where those are not known), which does not depend on the vocabulary. End-of-document tokens are predicted
    and counted, start tokens are not.

    `published_loss` is what GaLore, SLTrain, APOLLO and CoLA print: the sum of the batch means over (batches + 1). It
    is too low, the more so the fewer the batches, and is here only to set a result beside theirs.
    """

    loss: float
    tokens: int
    utf8_bytes: int | None
    batches: int
    published_loss: float

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return _exp(self.loss)

    @property
    def published_perplexity(self) -> float:
        """exp of the published loss."""
        return _exp(self.published_loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte; None where the bytes are not known."""
        if not self.utf8_bytes:
            return None
        return self.loss * self.tokens / math.log(2) / self.utf8_bytes

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON: the fields and what follows from them."""
        return {
            **asdict(self),
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "published_perplexity": self.published_perplexity,
        }


@torch.no_grad()
def measure_perplexity(
    model: nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    utf8_bytes: int | None = None,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows,
    on_batch: Callable[[], None] = lambda: None,
) -> Perplexity:
    """Negative log-likelihood of every label in `batches`.

    With `position_ids` that restart at 0, documents are kept apart: by the model where it does so (tried out before the
    first batch), by reading one document at a time where it does not.

    Args:
        model: a causal language model of transformers; put into evaluation mode and back.
        batches: each with `input_ids`, `labels` [B, T] (-100 where nothing is predicted) and what else the model takes.
        utf8_bytes: bytes of the text behind the batches, for bits per byte.
        gather: joins the rows [B, 2] of all processes; accelerate's `gather_for_metrics` in a distributed run.
        on_batch: called after each batch.

    Raises ValueError when no token is predicted at all, ConfigError for a model that sees what it is to predict.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    reader: Reader | None = None
    nats, tokens, published, count = 0.0, 0, 0.0, 0
    try:
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            labels = batch["labels"].to(device)
            if reader is None:
                reader = try_out(model, device)
                if "position_ids" in inputs and not reader.keeps_documents_apart:
                    _log.info("%s: each document is read alone (%s)", type(model).__name__, reader.reason)
            rows = gather(_of_rows(reader, inputs, labels))
            batch_nats, batch_tokens = rows.double().sum(0).tolist()
            nats, tokens, count = nats + batch_nats, tokens + int(batch_tokens), count + 1
            published += batch_nats / max(batch_tokens, 1)
            on_batch()
    finally:
        model.train(was_training)
    if tokens == 0:
        raise ValueError("There is nothing to predict: every label is -100.")
    return Perplexity(
        loss=nats / tokens,
        tokens=tokens,
        utf8_bytes=utf8_bytes,
        batches=count,
        published_loss=published / (count + 1),
    )


def _of_rows(reader: Reader, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """[B, T] -> [B, 2] as `_row_sums`, documents apart where position ids restart."""
    positions = inputs.get("position_ids")
    if positions is None:
        return _row_sums(reader.logits(inputs), labels)
    labels = labels.masked_fill(positions == 0, IGNORE_INDEX)  # nothing stands before a document's first token
    if reader.keeps_documents_apart:
        return _row_sums(reader.logits(inputs), labels)
    sums = torch.zeros(len(labels), 2, device=labels.device)
    for batch, of_batch, rows in single_documents(inputs, labels):
        sums.index_add_(0, rows, _row_sums(reader.logits(batch), of_batch))
    return sums


def _row_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B, T, V], [B, T] -> [B, 2]: summed negative log-likelihood and number of predicted tokens of each row."""
    targets = labels[:, 1:]
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return torch.stack([losses.view_as(targets).sum(1), (targets != IGNORE_INDEX).sum(1)], dim=1)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
