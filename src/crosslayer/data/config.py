"""What to read, how to split it, how to cut it: one dataclass, checked when it is made."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..ranges import COUNT, COUNT_OR_0, LENGTH, NAME, PART, SIZE, out_of_range
from .tokenizer import MINIMUM_VOCABULARY, vocabulary_too_small

PYTHON_LIBRARY = "python-library"
HUB_PREFIX = "hf:"
DEFAULT_STREAMING_VALIDATION_DOCUMENTS = 512
DEFAULT_STREAMING_TOKENIZER_DOCUMENTS = 10_000
_HUB_SOURCE = re.compile(r"hf:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?")


RANGES = {
    **dict.fromkeys(("max_documents", "max_validation_documents", "max_tokenizer_documents"), COUNT),
    **dict.fromkeys(("shuffle_buffer", "seed"), COUNT_OR_0),
    **dict.fromkeys(("split", "text_column", "validation_split", "tokenizer", "cache_dir"), NAME),
    "validation_fraction": PART,
    "tokenizer_vocab_size": SIZE,
    "block_size": LENGTH,
}
"""Field of `DataConfig` -> what it may be; a source has a form of its own."""


@dataclass(kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes blocks of tokens.

    Raises ConfigError, naming every field that is wrong, for values that cannot work whatever the data;
    what only the data can tell (a missing file, too little text) is a DataError of the functions that read
    it.
    """

    data: str = PYTHON_LIBRARY
    """The source: `python-library` (the sources and help texts of the running Python), a file (.txt, .md,
    .py, .txt.gz, .jsonl, .jsonl.gz, .parquet), a folder of such files, or `hf:owner/name[:config]`."""

    split: str = "train"
    """Split of a hub dataset to train on."""

    text_column: str = "text"
    """Field (JSON lines) or column (parquet, hub) that holds the text of a document."""

    validation_data: str | None = None
    """Another source of the same kinds, used whole as the validation split; training documents with the
    same text as one of its documents are left out. None = split `data` by document hash."""

    validation_split: str = "validation"
    """Split used when `validation_data` is a hub dataset."""

    validation_fraction: float = 0.02
    """Share of the documents that go to validation, chosen by the hash of their text."""

    max_validation_documents: int | None = None
    """Keep only the first so many validation documents; the others are dropped, never trained on. None =
    all of them, or 512 when `streaming`."""

    tokenizer: str | None = None
    """Folder or hub name of an existing tokenizer. None = train a byte-level BPE on the training
    documents."""

    tokenizer_vocab_size: int = 4096
    """Vocabulary of the trained tokenizer, its three special tokens included."""

    max_tokenizer_documents: int | None = None
    """Train the tokenizer on the first so many training documents. None = all, or 10,000 when
    `streaming`."""

    block_size: int = 256
    """Tokens in a block."""

    max_documents: int | None = None
    """Read only the first so many documents of `data` (not of `validation_data`)."""

    streaming: bool = False
    """Files, folders and hub datasets: nothing is downloaded or tokenised before, but read while training."""

    shuffle_buffer: int = 10_000
    """Documents of a streaming source that are shuffled among one another; 0 = source order."""

    skip_bad: bool = False
    """Leave out and count files that are not UTF-8, broken JSON lines and rows without text, instead of
    raising."""

    cache_dir: str | None = None
    """Where tokenised data is kept. None = $CROSSLAYER_CACHE, or ~/.cache/crosslayer."""

    seed: int = 0
    """Seed of the streaming shuffle. Nothing else here is random."""

    def __post_init__(self) -> None:
        problems = [problem for problem in self._problems() if problem]
        if problems:
            raise ConfigError("; ".join(problems))

    def _problems(self) -> list[str | None]:
        return [
            *out_of_range(vars(self), RANGES),
            source_problem("data", self.data),
            source_problem("validation_data", self.validation_data),
            self._vocabulary_problem(),
            self._streaming_problem(),
            self._split_problem("split", "data", self.data),
            self._split_problem("validation_split", "validation_data", self.validation_data),
        ]

    def _vocabulary_problem(self) -> str | None:
        if self.tokenizer is not None or self.tokenizer_vocab_size >= MINIMUM_VOCABULARY:
            return None
        return vocabulary_too_small(self.tokenizer_vocab_size)

    def _streaming_problem(self) -> str | None:
        if not self.streaming or self.data != PYTHON_LIBRARY:
            return None
        return f"streaming is for files, folders and hub datasets, not data={self.data!r}; give one, or turn it off"

    def _split_problem(self, name: str, field: str, source: str | None) -> str | None:
        """A split that is asked for and would be ignored."""
        value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
        if value == default or (source is not None and is_hub(source)):
            return None
        return f"{name}={value!r} is for hub datasets, not {field}={source!r}; leave it out"


def is_hub(source: str) -> bool:
    """True when the source names a hub dataset (`hf:...`)."""
    return source.startswith(HUB_PREFIX)


def parse_hub(source: str) -> tuple[str, str | None]:
    """Split `hf:owner/name[:config]` into (owner/name, config or None). Raises ConfigError for another
    form."""
    match = _HUB_SOURCE.fullmatch(source)
    if match is None:
        raise ConfigError(f"{source!r} is not a hub dataset; write hf:owner/name or hf:owner/name:config")
    return match["name"], match["config"]


def cache_root(cache_dir: str | None) -> Path:
    """The folder that holds the caches, from the `cache_dir` of a configuration."""
    chosen = cache_dir or os.environ.get("CROSSLAYER_CACHE") or "~/.cache/crosslayer"
    return local_path(chosen)


def local_path(name: str) -> Path:
    """A file or folder as it is named, `~` being the home folder; whatever is no home stays as it is."""
    return Path(os.path.expanduser(name))


def source_problem(field: str, source: str | None) -> str | None:
    """The complaint about a source that cannot be one; None stands for a default."""
    if source is None:
        return None
    if not source:
        return f"{field} is empty; give a file, a folder or hf:owner/name[:config]"
    if is_hub(source) and _HUB_SOURCE.fullmatch(source) is None:
        return f"{field}={source!r} is not a hub dataset; write hf:owner/name or hf:owner/name:config"
    return None
