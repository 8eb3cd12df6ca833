"""Models that keep packed documents apart, and the way around for those that do not.

Packed rows hold several documents, whose position ids restart at 0. Most models of transformers derive from the
restarts that documents must not attend to each other. Others do not read position ids (OPT, BLOOM, MPT, Falcon with
alibi), or carry a state from token to token (Mamba, RWKV, RecurrentGemma), and predict a document from the one before
it. Which of the two a model is cannot be told from its class: it is tried out.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError

PROBE_TOKENS = 12  # of each of the two documents that a model is tried out with
# Of the largest logit. Between equal shapes only the experts of a mixture may round otherwise; other shapes take other
# kernels, TF32 among them.
NOISE, NOISE_OF_SHAPES, NOISE_OF_HALF = 1e-3, 1e-2, 5e-2
# Between packed rows a mixture multiplies the same tokens in other groups: what rounding moves, at most, and how little
# that is of what a document before would move if it were seen.
NOISE_OF_GROUPS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
SHARE_OF_SEEN = 0.02


@dataclass
class Reader:
    """How to hand packed rows to one model; made by `try_out`."""

    model: nn.Module
    keeps_documents_apart: bool
    reason: str = ""
    """Why it does not, in words."""

    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """input_ids [B, T] and what else the model takes -> [B, T, V]."""
        return _forward(self.model, **inputs)


@torch.no_grad()
def try_out(model: nn.Module, device: torch.device) -> Reader:
    """Whether `model`, in evaluation mode, keeps packed documents apart.

    Two rows of two documents each are read, once with another first document: nothing may change in the second one,
    in a mixture of experts nothing but rounding, and it must have the logits it has alone. In doubt the answer is no,
    which only costs time.

    Raises ConfigError for a model that sees the tokens it is to predict.
    """
    size = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    draw = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(size, (2, PROBE_TOKENS), generator=draw).to(device) for _ in range(3))
    alone = torch.arange(PROBE_TOKENS, device=device).expand(2, -1)

    changed = second.clone()
    changed[:, -1] = (changed[:, -1] + 1) % size
    logits, of_changed = (_forward(model, input_ids=ids)[:, :-1].float() for ids in (second, changed))
    dtype = next(model.parameters()).dtype
    is_half = dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(device.type)
    largest = logits.abs().max()
    if (logits - of_changed).abs().max() > (NOISE_OF_HALF if is_half else NOISE) * largest:
        raise ConfigError(
            f"{type(model).__name__} sees the tokens that it is to predict: its attention is not causal, and a "
            "perplexity of it would mean nothing; give a causal language model (encoders: config.is_decoder=true)"
        )
    if not _takes(model, "position_ids"):
        return Reader(model, False, "it reads no position ids")

    def after(before: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([before, second], dim=1)
        return _forward(model, input_ids=ids, position_ids=positions)[:, PROBE_TOKENS:].float()

    apart, together = torch.cat([alone, alone], dim=1), torch.arange(2 * PROBE_TOKENS, device=device).expand(2, -1)
    after_first = after(first, apart)
    moved = (after_first - after(other, apart)).abs().max()
    if moved > 0:
        seen = (after(first, together) - after(other, together)).abs().max()
        precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype
        if moved > NOISE_OF_GROUPS[precision] * largest or moved > SHARE_OF_SEEN * seen:
            share = float(moved / largest)
            return Reader(model, False, f"the one before moves a prediction by {share:.1e} of the largest logit")
    difference = (after_first[:, :-1] - logits).abs().max()
    if difference > (NOISE_OF_HALF if is_half else NOISE_OF_SHAPES) * largest:
        share = float(difference / largest)
        return Reader(model, False, f"packed, a prediction is {share:.1e} of the largest logit from what it is alone")
    return Reader(model, True)


def single_documents(
    inputs: dict[str, torch.Tensor], labels: torch.Tensor
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]]:
    """Packed rows as rows of one document each: (inputs, labels [N, S], the packed row [N] of each).

    Documents of similar length come together, padded at the end, in batches of no more tokens than the packed one.
    """
    ids, positions = inputs["input_ids"], inputs["position_ids"]
    starts = positions == 0
    starts[:, 0] = True
    pieces: list[tuple[int, int, int]] = []  # length, row, first column
    for row in range(len(ids)):
        columns = [*starts[row].nonzero().flatten().tolist(), ids.shape[1]]
        spans = pairwise(columns)
        pieces += [(end - begin, row, begin) for begin, end in spans if end - begin > 1]  # one token predicts nothing
    pieces.sort(reverse=True)
    while pieces:
        longest = pieces[0][0]
        count = max(ids.numel() // longest, 1)
        here, pieces = pieces[:count], pieces[count:]
        shape = (len(here), longest)
        batch = {"input_ids": ids.new_zeros(shape), "attention_mask": torch.zeros(shape, dtype=torch.long)}
        batch["attention_mask"] = batch["attention_mask"].to(ids.device)
        of_batch = labels.new_full(shape, -100)
        for index, (length, row, begin) in enumerate(here):
            batch["input_ids"][index, :length] = ids[row, begin : begin + length]
            batch["attention_mask"][index, :length] = 1
            of_batch[index, :length] = labels[row, begin : begin + length]
        yield batch, of_batch, torch.tensor([row for _, row, _ in here], device=ids.device)


def _forward(model: nn.Module, **inputs: Any) -> torch.Tensor:
    if _takes(model, "use_cache"):
        inputs["use_cache"] = False
    return model(**inputs).logits


def _takes(model: nn.Module, name: str) -> bool:
    unwrap: Any = getattr(model, "get_base_model", lambda: model)
    base = unwrap()  # the forward of an adapter takes anything
    parameters = inspect.signature(base.forward).parameters
    return name in parameters or any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())
