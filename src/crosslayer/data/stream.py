"""A source that is read while it trains: pass after pass as blocks, divided among readers, shuffled anew each time.

    documents -> those of one reader -> shards in another order -> windows shuffled -> tokenised and packed

Each arrow is a method of `datasets.IterableDataset`, and none of them keeps anything back: the state of a pass
(`state_dict`) is its position, and a pass that goes on from there gives the blocks that were still to come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .config import DataConfig
from .packing import DocumentPacker, block_features, stack_blocks
from .split import is_held_out

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerFast


@dataclass(kw_only=True, frozen=True)
class TrainingStream:
    """Training blocks of a source, made while they are read. It has no length."""

    documents: IterableDataset
    """Columns text and name, in source order; those to be held out are among them."""

    tokenizer: PreTrainedTokenizerFast
    config: DataConfig
    held_out: frozenset[bytes]
    """Digests of documents to leave out besides those that `validation_fraction` takes."""

    def one_pass(self, number: int = 0, *, reader: int = 0, readers: int = 1) -> IterableDataset:
        """The blocks of pass `number` that one of several readers gets: every document that is not held out is in
        exactly one of them, exactly once. Read it with `iter`: workers of a loader are readers, and are not divided
        once more.

        Where the number of files (shards) is a multiple of `readers`, or at least 16 times as large, each has its own;
        else each reads all of them and keeps every `readers`-th document. Documents are shuffled among `shuffle_buffer`
        that follow one another; the order of the files changes too, and up to ten are read by turns (not with
        `max_documents`).
        """
        stream: Any = self._part(reader, readers)
        if self.config.shuffle_buffer:
            stream = self._shuffled(stream, [self.config.seed, number])
        return stream.map(
            _pack,
            batched=True,
            batch_size=max(1000, 4 * self.config.block_size),
            remove_columns=["text", "name"],
            features=block_features(),
            fn_kwargs={"tokenizer": self.tokenizer, "config": self.config, "held_out": self.held_out},
        )

    def _part(self, reader: int, readers: int) -> IterableDataset:
        if readers == 1:
            return self.documents
        shards = self.documents.num_shards
        can_be_divided = shards % readers == 0 or shards >= 16 * readers
        if can_be_divided and self.config.max_documents is None:
            return self.documents.shard(readers, reader, contiguous=False)
        return self.documents.filter(_belongs, with_indices=True, fn_kwargs={"reader": reader, "readers": readers})

    def _shuffled(self, stream: IterableDataset, seed: list[int]) -> IterableDataset:
        import numpy as np

        # The order of the shards: documents in a buffer of `datasets` would be lost when a run goes on.
        stream = stream.shuffle(generator=np.random.default_rng(seed), buffer_size=1)
        size = self.config.shuffle_buffer
        return stream.map(_shuffle, batched=True, batch_size=size, with_indices=True, fn_kwargs={"seed": seed})


def _belongs(document: dict[str, str], index: int, *, reader: int, readers: int) -> bool:
    return index % readers == reader


def _shuffle(window: dict[str, list[str]], indices: list[int], *, seed: list[int]) -> dict[str, list[str]]:
    import numpy as np

    order = np.random.default_rng([*seed, indices[0]]).permutation(len(indices))
    return {name: [column[i] for i in order] for name, column in window.items()}


def _pack(
    batch: dict[str, list[str]],
    *,
    tokenizer: PreTrainedTokenizerFast,
    config: DataConfig,
    held_out: frozenset[bytes],
) -> dict[str, Any]:
    """Blocks of the training documents in one batch, the last one padded, so that no token is lost and nothing is
    carried over. Lists, as rows of a stream are handed on as they are.

    A batch has at least 4 documents for each token of a block: less than one part in twelve is padding even where each
    document is one token; for web pages it is one part in thousands.
    """
    texts = [text for text in batch["text"] if text.strip() and not is_held_out(text, config, held_out)]
    packer = DocumentPacker(tokenizer, config.block_size)
    blocks = stack_blocks(packer.add(texts), packer.finish())
    return {name: column.tolist() for name, column in blocks.items()}
