"""Documents for training, documents for validation: by the hash of their text, or two sources.

The side of a document depends on its text alone, so that it stays there when files are added, moved or repeated. Where
the fraction leaves one side empty, the document whose hash comes first (or last) goes there.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from ..errors import DataError
from .config import DEFAULT_STREAMING_TOKENIZER_DOCUMENTS, DEFAULT_STREAMING_VALIDATION_DOCUMENTS, DataConfig
from .sources import Documents, Source
from .spool import documents_from_pairs

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BATCH = 128  # documents handled together
_log = logging.getLogger(__name__)


@dataclass
class Split:
    """Documents of both sides. For a streaming source, `train` is only what the tokenizer is trained on."""

    train: Dataset
    validation: Dataset
    held_out: frozenset[bytes]
    """Digests of documents to leave out of training besides those that the fraction takes: the documents of
    `validation_data`, or the one that a short stream gave up."""
    skipped: int
    duplicates: int = 0
    cut: int = 0


def text_digest(text: str) -> bytes:
    """SHA-256 of the text: the same on every machine, in every order."""
    return hashlib.sha256(text.encode("utf-8")).digest()


def goes_to_validation(digest: bytes, fraction: float) -> bool:
    """Whether the fraction alone takes a document with this digest for validation."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def is_held_out(text: str, config: DataConfig, held_out: frozenset[bytes]) -> bool:
    """Whether a document of `config.data` is kept out of training."""
    digest = text_digest(text)
    if digest in held_out:
        return True
    return config.validation_data is None and goes_to_validation(digest, config.validation_fraction)


def validation_digests(digests: Iterable[bytes], fraction: float) -> set[bytes]:
    """Which of the documents with these digests are held out: a share, and at least one where there are two texts, but
    never all of them."""
    texts = set(digests)
    chosen = {digest for digest in texts if goes_to_validation(digest, fraction)}
    if len(texts) < 2:
        return chosen
    return chosen - {max(texts)} if chosen == texts else chosen or {min(texts)}


def split_documents(config: DataConfig, source: Source, held_out_source: Source | None) -> Split:
    """Split a source that lies on disk. Raises DataError when one side would be empty."""
    documents = read(source, config.max_documents)
    dataset = cast("Dataset", documents.dataset)
    if held_out_source is None:
        train, chosen = _sides(config, source, documents)
        validation = dataset.select(chosen[: config.max_validation_documents])
        return Split(dataset.select(train), validation, frozenset(), documents.skipped, cut=documents.cut)
    whole, held_out = _held_out(config, held_out_source)
    held_out_set = cast("Dataset", whole.dataset)
    train, chosen = [], []
    for index, text in _texts(dataset):
        (chosen if text_digest(text) in held_out else train).append(index)
    if not train and not chosen:
        raise no_text(source, documents.skipped)
    if not train:
        raise DataError(
            f"{source.label}: each of its {len(chosen)} documents is also in validation_data, so that "
            "none is left to train on; give another source as validation_data"
        )
    if chosen:
        _log.warning("%s: left out %d documents that validation_data holds too", source.label, len(chosen))
    skipped, cut = documents.skipped + whole.skipped, documents.cut + whole.cut
    return Split(dataset.select(train), held_out_set, held_out, skipped, len(chosen), cut)


def _sides(config: DataConfig, source: Source, documents: Documents) -> tuple[list[int], list[int]]:
    """Rows of the training and of the validation documents. Raises DataError when one side would be empty."""
    fraction = config.validation_fraction
    rows = [(index, text_digest(text)) for index, text in _texts(cast("Dataset", documents.dataset))]
    if not rows:
        raise no_text(source, documents.skipped)
    held_out = validation_digests((digest for _, digest in rows), fraction)
    train = [index for index, digest in rows if digest not in held_out]
    chosen = [index for index, digest in rows if digest in held_out]
    _check_sides(config, source, len(train), len(chosen))
    if not any(goes_to_validation(digest, fraction) for _, digest in rows):
        _say_first_by_hash(config, source)
    elif all(goes_to_validation(digest, fraction) for _, digest in rows):
        _log.info(
            "%s: validation_fraction=%s takes every document; kept the one whose hash comes last to train on",
            source.label,
            fraction,
        )
    return train, chosen


def split_stream(config: DataConfig, source: Source, held_out_source: Source | None) -> Split:
    """Read a stream as far as needed for the validation split and for training the tokenizer."""
    want_train = 1
    if config.tokenizer is None:
        want_train = config.max_tokenizer_documents or DEFAULT_STREAMING_TOKENIZER_DOCUMENTS
    rows = read(source, config.max_documents).dataset
    if held_out_source is not None:
        whole, held_out = _held_out(config, held_out_source)
        training = _take(rows, lambda text: text_digest(text) not in held_out, want_train)
        _check_sides(config, source, len(training), len(whole.dataset))
        return Split(documents_from_pairs(training), cast("Dataset", whole.dataset), held_out, whole.skipped)
    sides: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    want = {True: validation_cap(config), False: want_train}
    first = _First()
    for row in rows:
        if row["text"].strip():
            digest = text_digest(row["text"])
            first.see(digest, row)
            side = goes_to_validation(digest, config.validation_fraction)
            if len(sides[side]) < want[side]:
                sides[side].append((row["name"], row["text"]))
            elif len(sides[not side]) >= want[not side]:
                break
    held_out = frozenset()
    if not sides[True] and first.has_company:
        _say_first_by_hash(config, source)
        held_out = frozenset({first.digest})
        sides[True] = [first.pair]
        sides[False] = [pair for pair in sides[False] if text_digest(pair[1]) != first.digest] or [first.other]
    _check_sides(config, source, len(sides[False]), len(sides[True]))
    return Split(documents_from_pairs(sides[False]), documents_from_pairs(sides[True]), held_out, 0)


class _First:
    """The document whose hash comes first, and one with another text."""

    def __init__(self) -> None:
        self.digest = b""
        self.pair = self.other = ("", "")
        self.has_company = False

    def see(self, digest: bytes, row: dict[str, str]) -> None:
        pair = (row["name"], row["text"])
        if not self.digest:
            self.digest, self.pair = digest, pair
        elif digest < self.digest:
            self.other, self.has_company = self.pair, True
            self.digest, self.pair = digest, pair
        elif digest != self.digest:
            self.other, self.has_company = pair, True


def _take(rows: Iterable[dict[str, str]], wanted: Any, count: int) -> list[tuple[str, str]]:
    taken: list[tuple[str, str]] = []
    for row in rows:
        if row["text"].strip() and wanted(row["text"]):
            taken.append((row["name"], row["text"]))
            if len(taken) == count:
                break
    return taken


def validation_documents(config: DataConfig, source: Source, *, whole: bool) -> Dataset:
    """The validation side of a source, as `prepare_data` holds it out."""
    if whole:
        return cast("Dataset", _whole(config, source).dataset)
    documents = read(source, config.max_documents)
    if hasattr(documents.dataset, "__len__"):
        _, chosen = _sides(config, source, documents)
        return cast("Dataset", documents.dataset).select(chosen[: config.max_validation_documents])
    cap, first, seen = validation_cap(config), _First(), 0
    chosen_pairs: list[tuple[str, str]] = []
    for row in documents.dataset:
        if row["text"].strip():
            seen += 1
            digest = text_digest(row["text"])
            first.see(digest, row)
            if goes_to_validation(digest, config.validation_fraction):
                chosen_pairs.append((row["name"], row["text"]))
                if len(chosen_pairs) == cap:
                    break
    if not chosen_pairs and first.has_company:
        chosen_pairs = [first.pair]
    _check_sides(config, source, seen, len(chosen_pairs))
    return documents_from_pairs(chosen_pairs)


def all_documents(config: DataConfig, source: Source) -> Dataset:
    """Every document of a source that holds text. Raises DataError when there is none."""
    return _with_text(source, read(source, config.max_documents))


def read(source: Source, limit: int | None) -> Documents:
    """The documents of a source, at most `limit` of them."""
    documents = source.read()
    return replace(documents, dataset=first_rows(documents.dataset, limit))


def first_rows(dataset: Any, limit: int | None) -> Any:
    """The first `limit` rows of a Dataset or IterableDataset; all of them for None."""
    if limit is None:
        return dataset
    if hasattr(dataset, "__len__"):
        return dataset.select(range(min(limit, len(dataset))))
    return dataset.take(limit)


def text_batches(dataset: Dataset) -> Iterator[list[str]]:
    """The texts of a dataset of documents, some at a time."""
    for batch in dataset.select_columns(["text"]).iter(BATCH):
        yield cast(dict[str, list[str]], batch)["text"]


def validation_cap(config: DataConfig) -> int:
    """How many validation documents are kept at most."""
    unlimited = DEFAULT_STREAMING_VALIDATION_DOCUMENTS if config.streaming else 2**62
    return config.max_validation_documents or unlimited


def no_text(source: Source, skipped: int) -> DataError:
    """The error for a source without any text."""
    note = f" ({skipped} skipped as unreadable)" if skipped else ""
    return DataError(f"{source.label}: no document holds any text{note}")


def _held_out(config: DataConfig, source: Source) -> tuple[Documents, frozenset[bytes]]:
    """The documents of `validation_data` and their digests."""
    whole = _whole(config, source)
    return whole, frozenset(text_digest(text) for _, text in _texts(cast("Dataset", whole.dataset)))


def _whole(config: DataConfig, source: Source) -> Documents:
    """All of `validation_data` (up to its cap) that holds text."""
    documents = read(source, validation_cap(config))
    return replace(documents, dataset=_with_text(source, documents))


def _with_text(source: Source, documents: Documents) -> Dataset:
    dataset = _materialise(documents.dataset)
    dataset = dataset.select([index for index, _ in _texts(dataset)])
    if not len(dataset):
        raise no_text(source, documents.skipped)
    return dataset


def _check_sides(config: DataConfig, source: Source, train: int, validation: int) -> None:
    if train and validation:
        return
    total = train + validation
    raise DataError(
        f"{source.label}: the split by document hash with validation_fraction={config.validation_fraction} "
        f"leaves {train} of {total} documents for training and {validation} for validation; "
        "give validation_data, change validation_fraction, or add documents"
    )


def _say_first_by_hash(config: DataConfig, source: Source) -> None:
    _log.info(
        "%s: validation_fraction=%s takes none of so few documents; held out the one whose hash comes first",
        source.label,
        config.validation_fraction,
    )


def _materialise(dataset: Dataset | IterableDataset) -> Dataset:
    from datasets import Dataset

    if isinstance(dataset, Dataset):
        return dataset
    return documents_from_pairs([(row["name"], row["text"]) for row in dataset])


def _texts(dataset: Dataset) -> Iterator[tuple[int, str]]:
    """(row, text) of every document that holds more than white space."""
    index = 0
    for texts in text_batches(dataset):
        for text in texts:
            if text.strip():
                yield index, text
            index += 1
