"""A stream that begins again when it ends."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from ..errors import DataError


class Passes(IterableDataset):
    """Pass after pass over a streamed dataset, each shuffled anew, as one stream without an end.

    transformers' Trainer counts the steps of a stream from its first pass. With one stream that has no end, a run goes
    on where it was in any of them.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number = 0
        while True:
            self.stream.set_epoch(number)
            is_empty = True
            for row in self.stream:
                is_empty = False
                yield row
            if is_empty and get_worker_info() is not None:  # more workers than the stream has parts
                return
            if is_empty:
                raise DataError("the stream holds no block to train on; check the source and block_size")
            number += 1
