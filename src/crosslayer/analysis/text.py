"""Text for an analysis: documents in, batches of a model's own tokens out.

Each document is cut into pieces of at most `block_size` tokens with the tokenizer's own special tokens around them;
pieces of about the same length share a batch, so that little is padded, and a mask tells what is.
"""

from collections.abc import Iterable
from typing import Any

import torch

from ..errors import ConfigError, DataError

SHORTEST_PIECE = 8


def text_batches(
    texts: Iterable[str], tokenizer: Any, *, max_tokens: int, block_size: int, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    """Batches {input_ids [B, T], attention_mask [B, T]} of the first `max_tokens` tokens of the texts.

    Pieces under 8 tokens are left out. Raises DataError where nothing is left, ConfigError for sizes that cannot work.
    """
    for name, value, least in (
        ("max_tokens", max_tokens, 1),
        ("batch_size", batch_size, 1),
        ("block_size", block_size, 2),
    ):
        if value < least:
            raise ConfigError(f"{name}={value}; give at least {least}")
    pieces: list[list[int]] = []
    left = max_tokens
    for text in texts:
        encoded = tokenizer(
            text,
            truncation=True,
            max_length=block_size,
            return_overflowing_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        for piece in _as_pieces(encoded["input_ids"]):
            piece = piece[:left]
            if len(piece) >= min(SHORTEST_PIECE, block_size):
                pieces.append(piece)
                left -= len(piece)
        if left < SHORTEST_PIECE:
            break
    if not pieces:
        raise DataError("the text holds no document of a few tokens; give more of it")
    pieces.sort(key=len, reverse=True)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return [_batch(pieces[i : i + batch_size], padding) for i in range(0, len(pieces), batch_size)]


def _as_pieces(ids: list) -> list[list[int]]:
    """Fast tokenizers give one list a piece, slow ones the first piece alone."""
    return ids if ids and isinstance(ids[0], list) else [ids]


def _batch(pieces: list[list[int]], padding: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, pieces))
    return {
        "input_ids": torch.tensor([piece + [padding] * (longest - len(piece)) for piece in pieces]),
        "attention_mask": torch.tensor([[1] * len(piece) + [0] * (longest - len(piece)) for piece in pieces]),
    }


__all__ = ["text_batches"]
