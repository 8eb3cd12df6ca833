"""Documents tokenised by several processes, a part at a time, into files that stay when the work is interrupted.

    <output>.partial/begun.json       what is being prepared
                     tokenizer/
                     train/ validation/   00000.safetensors ...: tokens of a part, whole or not there
                     data/                the blocks, until they become <output>

At most two parts a worker are in memory at any time.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..workers import initialize_worker, without_interrupts
from .packing import DocumentPacker, Tokens, tokenize
from .split import text_batches
from .tokenizer import load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

PART_CHARACTERS = 4 * 2**20
"""Length after which the next document begins another part."""


class Parts:
    """The work in a folder: a context, in which processes are there to tokenise.

    Args:
        workers: how many; with one this process does it itself.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        self.folder = folder
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self.workers > 1:
            begin = (str(self.folder / "tokenizer"),)
            with without_interrupts():
                self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), _begin, begin)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def tokenizer(self, make: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
        """The tokenizer of the work: the one that is there, or the one that `make` gives."""
        kept, new = self.folder / "tokenizer", self.folder / "tokenizer.tmp"
        if not kept.is_dir():
            shutil.rmtree(new, ignore_errors=True)
            make().save_pretrained(new)
            os.rename(new, kept)
        return load_tokenizer(str(kept))

    def tokenize(self, name: str, documents: Dataset, tokenizer: PreTrainedTokenizerFast) -> Dataset:
        """The documents as files of tokens, column `part`: those that are there are kept."""
        from datasets import Dataset

        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        files: list[Path] = []
        running: deque[Future[None]] = deque()
        for number, texts in enumerate(_parts(documents)):
            files.append(folder / f"{number:05d}.safetensors")
            if _is_whole(files[-1]):
                continue
            if self._pool is None:
                write_part(tokenizer, texts, files[-1])
                continue
            if len(running) == 2 * self.workers:
                running.popleft().result()
            with without_interrupts():  # a worker may start here
                running.append(self._pool.submit(_work, texts, files[-1]))
        for future in running:
            future.result()
        return Dataset.from_dict({"part": [str(file) for file in files]})


class PartPacker(DocumentPacker):
    """Packs files of tokens, as its base packs texts."""

    def tokens_of(self, batch: dict[str, list[str]]) -> Iterator[Tokens]:
        """Of each file of a batch ("part")."""
        return map(_read_part, batch["part"])


def _parts(documents: Dataset) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for texts in text_batches(documents):
        for text in texts:
            part.append(text)
            size += len(text)
            if size >= PART_CHARACTERS:
                yield part
                part, size = [], 0
    if part:
        yield part


def write_part(tokenizer: PreTrainedTokenizerFast, texts: list[str], file: Path) -> None:
    """Tokenise texts into a file. Raises OSError."""
    import numpy as np
    from safetensors.numpy import save_file

    parts = list(tokenize(tokenizer, texts))
    content = {
        "ids": np.concatenate([part.ids for part in parts]),
        "is_start": np.concatenate([part.is_start for part in parts]),
        "bytes": np.array(sum(part.bytes for part in parts)),
    }
    unfinished = file.with_suffix(".tmp")
    save_file(content, unfinished)
    os.replace(unfinished, file)


def _read_part(file: str) -> Tokens:
    from safetensors.numpy import load_file

    content = load_file(file)
    return Tokens(content["ids"], content["is_start"], int(content["bytes"]))


def _is_whole(file: Path) -> bool:
    """Whether a part is there, all of it: a machine that went down may have left less."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np"):
            return True
    except (OSError, SafetensorError):
        return False


# ------------------------------------------------------------------------------------------------- the workers

_tokenizer: Any = None


def _begin(tokenizer: str) -> None:
    """First call in a worker."""
    global _tokenizer
    initialize_worker()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are what works side by side
    _tokenizer = load_tokenizer(tokenizer)


def _work(texts: list[str], file: Path) -> None:
    write_part(_tokenizer, texts, file)
