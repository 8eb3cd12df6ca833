"""Documents -> one stream of tokens -> blocks of fixed length.

    documents    [s a b e] [s c e] [s d f g e]             s = start token, e = end token
    stream        s a b e s c e s d f g e
    blocks of 5   s a b e s | s c e s d | d f g e .      stride 4: the first token repeats the last one

Each token is predicted from the one before it, so a block of T tokens has T - 1 predictions. As the stride
is T - 1 too, every token except the start tokens is a label exactly once. Start tokens and the first token of
a block are no labels: the former have nothing to be predicted from, the latter was a label in the block before.
Position ids restart at 0 at each document and each block; transformers derives from the restarts that
documents in one block must not attend to each other.

transformers builds that mask only when it gets neither an attention mask nor a cache: collate the blocks with
`default_data_collator` (a padding collator adds an attention mask of ones), and call the model with
`use_cache=False` (`Trainer` does).

Letters: T block size, N blocks. All arrays here are numpy; ids and positions int32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .tokenizer import document_end_id, document_start_id, encode_documents, padding_id

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedTokenizerFast

IGNORE_INDEX = -100
"""Label of a token that is not predicted, as in transformers."""

_CHARACTERS = 2**20  # tokenised at a time: a tokenizer takes some 200 bytes for each

BLOCK_COLUMNS = ("input_ids", "position_ids", "labels")

Blocks = dict[str, NDArray[np.int32]]
"""The three columns, each [N, T]."""


@dataclass(kw_only=True, frozen=True)
class SplitStatistics:
    """Size of one split; every field is None where a streaming source has not been read to its end."""

    documents: int | None = None
    """Documents with any text."""

    tokens: int | None = None
    """Tokens, the start and end token of each document included."""

    bytes: int | None = None
    """UTF-8 bytes of the text: the denominator of bits per byte."""

    blocks: int | None = None
    """Packed blocks."""

    predicted_tokens: int | None = None
    """Labels that are not -100, over all blocks: the denominator of the mean loss."""


def block_features() -> Features:
    """The columns of every dataset of blocks."""
    from datasets import Features, List, Value

    return Features({name: List(Value("int32")) for name in BLOCK_COLUMNS})


def join_documents(documents: list[list[int]], start: int, end: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Concatenate `[start] + ids + [end]` of all documents: (ids [n], is_start [n])."""
    lengths = np.fromiter((len(ids) + 2 for ids in documents), np.int64, len(documents))
    total = int(lengths.sum())
    stream = np.fromiter(chain.from_iterable([start, *ids, end] for ids in documents), np.int32, total)
    is_start = np.zeros(total, np.bool_)
    is_start[np.cumsum(lengths) - lengths] = True
    return stream, is_start


def cut_blocks(ids: NDArray[np.int32], is_start: NDArray[np.bool_], block_size: int) -> tuple[Blocks, int]:
    """Cut a stream of n tokens into as many complete blocks as it holds.

    Returns the blocks and the number of stream tokens that are done with; the stream from there on (at
    least the last token of the last block, which the next block repeats) is the beginning of the next
    block.
    """
    count = max(0, (len(ids) - 1) // (block_size - 1))
    if count == 0:
        return _columns(ids[:0].reshape(0, block_size), is_start[:0].reshape(0, block_size)), 0
    return _columns(_windows(ids, block_size), _windows(is_start, block_size)), count * (block_size - 1)


def padded_block(ids: NDArray[np.int32], is_start: NDArray[np.bool_], block_size: int, pad: int) -> Blocks:
    """One block from the 1 <= n <= T tokens that are left: pads are no labels and stand alone at position
    0."""
    missing = block_size - len(ids)
    row = np.concatenate([ids, np.full(missing, pad, np.int32)])
    alone = np.concatenate([is_start, np.ones(missing, np.bool_)])  # a pad is treated like a start token
    return _columns(row[None], alone[None])


def _windows(stream: NDArray[Any], block_size: int) -> NDArray[Any]:
    return np.lib.stride_tricks.sliding_window_view(stream, block_size)[:: block_size - 1]


def _columns(ids: NDArray[np.int32], is_start: NDArray[np.bool_]) -> Blocks:
    """The three columns of blocks with these ids [N, T] and document starts [N, T]."""
    restart = is_start.copy()
    restart[:, :1] = True
    index = np.arange(ids.shape[1], dtype=np.int32)
    last_restart = np.maximum.accumulate(np.where(restart, index, 0), axis=1)
    labels = np.where(restart, np.int32(IGNORE_INDEX), ids)
    return {"input_ids": np.ascontiguousarray(ids), "position_ids": index - last_restart, "labels": labels}


class Tokens(NamedTuple):
    """Documents as one stream."""

    ids: NDArray[np.int32]
    """[n]"""
    is_start: NDArray[np.bool_]
    """[n], True where a document begins."""
    bytes: int
    """UTF-8 bytes of the texts."""


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Iterator[Tokens]:
    """The tokens of the texts in order, `[start] + ids + [end]` each, some texts at a time."""
    start, end = document_start_id(tokenizer), document_end_id(tokenizer)
    for few in _batches(texts):
        ids, is_start = join_documents(encode_documents(tokenizer, few), start, end)
        yield Tokens(ids, is_start, sum(len(text.encode("utf-8")) for text in few))


class DocumentPacker:
    """Turns batches of texts into blocks, carrying the incomplete block from batch to batch.

    Used as the function of `Dataset.map(batched=True, with_indices=True)` in one process and in order. With
    `pad_last`, the batch that holds row `rows - 1` also emits the padded remainder, so that no token is lost;
    without it the incomplete last block is dropped.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        block_size: int,
        *,
        pad_last: bool = False,
        rows: int | None = None,
    ) -> None:
        if pad_last and rows is None:
            raise ValueError("pad_last needs the number of rows, to know which batch is the last")
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.last_index = rows - 1 if pad_last and rows is not None else None
        self._ids = np.empty(0, np.int32)
        self._is_start = np.empty(0, np.bool_)
        self._documents = self._tokens = self._bytes = self._blocks = self._predicted = 0

    def __call__(self, batch: dict[str, list[str]], indices: list[int]) -> Blocks:
        """Blocks completed by the rows of a batch, whose row numbers are `indices`."""
        blocks = self._add(self.tokens_of(batch))
        if self.last_index is not None and indices[-1] == self.last_index:
            blocks = stack_blocks(blocks, self.finish())
        return blocks

    def tokens_of(self, batch: dict[str, list[str]]) -> Iterator[Tokens]:
        """The tokens in the rows of a batch: of the texts in its column `text`."""
        return tokenize(self.tokenizer, batch["text"])

    def add(self, texts: list[str]) -> Blocks:
        """Append documents to the stream; return the blocks that are now complete."""
        return self._add(tokenize(self.tokenizer, texts))

    def _add(self, parts: Iterable[Tokens]) -> Blocks:
        stream = [Tokens(self._ids, self._is_start, 0), *parts]
        for part in stream[1:]:
            self._documents += int(np.count_nonzero(part.is_start))
            self._tokens += len(part.ids)
            self._bytes += part.bytes
        ids = np.concatenate([part.ids for part in stream])
        is_start = np.concatenate([part.is_start for part in stream])
        blocks, used = cut_blocks(ids, is_start, self.block_size)
        self._ids, self._is_start = ids[used:].copy(), is_start[used:].copy()
        return self._count(blocks)

    def finish(self) -> Blocks:
        """The remaining tokens as one padded block, or no block when nothing is left to predict."""
        ids, is_start = self._ids, self._is_start
        self._ids, self._is_start = ids[:0], is_start[:0]
        if len(ids) < 2:  # only the last token of the block before, already a label there
            return _columns(ids[:0].reshape(0, self.block_size), is_start[:0].reshape(0, self.block_size))
        return self._count(padded_block(ids, is_start, self.block_size, padding_id(self.tokenizer)))

    def statistics(self) -> SplitStatistics:
        """What has gone through so far."""
        return SplitStatistics(
            documents=self._documents,
            tokens=self._tokens,
            bytes=self._bytes,
            blocks=self._blocks,
            predicted_tokens=self._predicted,
        )

    def _count(self, blocks: Blocks) -> Blocks:
        self._blocks += len(blocks["labels"])
        self._predicted += int(np.count_nonzero(blocks["labels"] != IGNORE_INDEX))
        return blocks


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """`texts` in order, about `_CHARACTERS` at a time."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > _CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def stack_blocks(first: Blocks, second: Blocks) -> Blocks:
    """The blocks of both, in order."""
    return {name: np.concatenate([first[name], second[name]]) for name in BLOCK_COLUMNS}
