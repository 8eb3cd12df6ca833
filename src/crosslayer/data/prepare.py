"""The way from a configuration to packed, cached blocks.

The two ways through this package:

    open_source -> split by hash -> tokenizer -> pack -> cache            prepare_data
    open_source -> (one side of the split) -> pack                        load_evaluation_data
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..errors import ConfigError, DataError
from . import cache
from .config import (
    DEFAULT_STREAMING_TOKENIZER_DOCUMENTS,
    DEFAULT_STREAMING_VALIDATION_DOCUMENTS,
    DataConfig,
    cache_root,
)
from .files import documents_from_pairs, quiet
from .packing import BLOCK_COLUMNS, DocumentPacker, SplitStatistics
from .sources import Documents, Source, open_source
from .tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset
    from transformers import PreTrainedTokenizerFast

_BATCH = 128  # documents tokenised together
_log = logging.getLogger(__name__)


@dataclass(kw_only=True, frozen=True)
class DataStatistics:
    """What was prepared."""

    train: SplitStatistics
    validation: SplitStatistics
    skipped: int
    """Files, lines and rows left out because they could not be read."""

    duplicates: int
    """Training documents left out because `validation_data` holds the same text."""

    vocab_size: int
    cache_path: str
    cache_hit: bool
    """True when the blocks were found in the cache, so that nothing was tokenised."""


@dataclass(kw_only=True, frozen=True)
class PreparedData:
    """Blocks to train and validate on: columns input_ids, position_ids and labels, each a list of
    block_size ints.

    `train` holds whole blocks only; the last block of `validation` is padded, so that its loss counts every
    token. With `streaming`, `train` is an IterableDataset.
    """

    train: Dataset | IterableDataset
    validation: Dataset
    tokenizer: PreTrainedTokenizerFast
    statistics: DataStatistics


def prepare_data(config: DataConfig) -> PreparedData:
    """Read, split, tokenise and pack the data of a configuration, or find the result of an earlier call in
    the cache.

    Raises DataError for data that is missing, unreadable or too small, ConfigError for a tokenizer that
    cannot be used. Neither leaves anything in the cache.
    """
    source = open_source(config)
    held_out = open_source(config, validation=True) if config.validation_data is not None else None
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer is not None else None
    folder = cache_root(config.cache_dir) / cache.cache_key(_key_content(config, source, held_out, tokenizer))

    prepared = _load(folder, config, source, tokenizer, cache_hit=True)
    if prepared is None:
        with cache.building(folder) as temporary:
            _build(temporary, config, source, held_out, tokenizer)
        prepared = _load(folder, config, source, tokenizer, cache_hit=False)
    if prepared is None:
        raise DataError(f"{folder}: the data cache cannot be read back; check the disk or choose another cache_dir")
    return prepared


def load_documents(config: DataConfig) -> Dataset | IterableDataset:
    """The documents of `config.data` in source order, columns `text` and `name`: a Dataset, or an
    IterableDataset when `streaming`. Raises DataError."""
    return _read(open_source(config), config.max_documents).dataset


def load_evaluation_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    block_size: int | None = None,
    *,
    part: Literal["all", "validation"] = "all",
) -> tuple[Dataset, SplitStatistics]:
    """Blocks of one source for evaluation, the last one padded so that every token counts.

    part "all" packs the whole of `config.data`; "validation" only what `prepare_data` with the same source,
    fraction and caps would have held out (the whole of `config.validation_data` where that is given).
    block_size None = `config.block_size`. Not cached. Raises DataError when there is nothing to evaluate,
    ConfigError for a block_size below 2.
    """
    size = config.block_size if block_size is None else block_size
    if size < 2:
        raise ConfigError(f"block_size={size} is too small; give at least 2 tokens")
    if part == "validation":
        held_out = config.validation_data is not None
        documents = _validation_documents(config, open_source(config, validation=held_out), whole=held_out)
    else:
        source = open_source(config)
        documents = _materialise(_read(source, config.max_documents).dataset)
        documents = documents.select(_with_text(documents))
        if not len(documents):
            raise DataError(f"{source.label}: no document holds any text")
    return pack_documents(documents, tokenizer, size, pad_last=True)


# ------------------------------------------------------------------------------------------------ the cache


def _key_content(
    config: DataConfig, source: Source, held_out: Source | None, tokenizer: PreTrainedTokenizerFast | None
) -> dict[str, Any]:
    """Everything the prepared blocks depend on."""
    if tokenizer is not None:
        tokens: list[Any] = ["existing", tokenizer_fingerprint(tokenizer)]
    else:
        tokens = ["trained", config.tokenizer_vocab_size, config.max_tokenizer_documents]
    return {
        "source": source.identity,
        "validation": held_out.identity if held_out else config.validation_fraction,
        "max_documents": config.max_documents,
        "max_validation_documents": config.max_validation_documents,
        "tokenizer": tokens,
        "block_size": config.block_size,
    }


def _build(
    folder: Path,
    config: DataConfig,
    source: Source,
    held_out: Source | None,
    tokenizer: PreTrainedTokenizerFast | None,
) -> None:
    """Write train/ (unless streaming), validation/, tokenizer/ and statistics.json into an empty folder."""
    split = (_split_stream if config.streaming else _split)(config, source, held_out)
    if tokenizer is None:
        texts = _batches(_first(split.train, config.max_tokenizer_documents))
        tokenizer = train_tokenizer(texts, config.tokenizer_vocab_size, config.block_size)
    tokenizer.save_pretrained(folder / "tokenizer")

    train = SplitStatistics()
    if not config.streaming:
        train = _write_split(folder / "train", split.train, tokenizer, config.block_size, pad_last=False)
        if not train.blocks:
            raise DataError(
                f"{source.label}: the training documents hold {train.tokens} tokens, but one block needs "
                f"{config.block_size}; add text or lower block_size"
            )
    validation = _write_split(folder / "validation", split.validation, tokenizer, config.block_size, pad_last=True)
    content = {
        "train": asdict(train),
        "validation": asdict(validation),
        "skipped": split.skipped,
        "duplicates": split.duplicates,
        "held_out": sorted(digest.hex() for digest in split.held_out) if config.streaming else [],
    }
    (folder / "statistics.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_split(
    folder: Path, documents: Dataset, tokenizer: PreTrainedTokenizerFast, block_size: int, *, pad_last: bool
) -> SplitStatistics:
    """Pack documents into blocks and save those in `folder`, never holding all of them in memory."""
    scratch = folder.with_name(f"{folder.name}.arrow")
    blocks, statistics = pack_documents(documents, tokenizer, block_size, pad_last=pad_last, file=scratch)
    with quiet():
        blocks.save_to_disk(folder)
    del blocks
    scratch.unlink(missing_ok=True)
    return statistics


def _load(
    folder: Path,
    config: DataConfig,
    source: Source,
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    cache_hit: bool,
) -> PreparedData | None:
    """Prepared data from a cache folder; None when it is not there, or damaged (which is logged)."""
    import datasets

    if not cache.is_complete(folder):
        return None
    try:
        content = json.loads((folder / "statistics.json").read_text(encoding="utf-8"))
        if tokenizer is None:
            tokenizer = load_tokenizer(str(folder / "tokenizer"))
        validation = datasets.load_from_disk(folder / "validation")
        train: Any = None if config.streaming else datasets.load_from_disk(folder / "train")
    except (OSError, ValueError, KeyError) as error:  # those of arrow and our own are ValueErrors too
        cache.discard(folder, error)
        return None
    if config.streaming:
        held_out = frozenset(bytes.fromhex(digest) for digest in content["held_out"])
        train = _training_stream(config, source, tokenizer, held_out)
    statistics = DataStatistics(
        train=SplitStatistics(**content["train"]),
        validation=SplitStatistics(**content["validation"]),
        skipped=content["skipped"],
        duplicates=content["duplicates"],
        vocab_size=len(tokenizer),
        cache_path=str(folder),
        cache_hit=cache_hit,
    )
    return PreparedData(train=train, validation=cast("Dataset", validation), tokenizer=tokenizer, statistics=statistics)


# ------------------------------------------------------------------------------------------------ the split


@dataclass
class _Split:
    """Documents of both sides. For a streaming source, `train` is only what the tokenizer is trained on."""

    train: Dataset
    validation: Dataset
    held_out: frozenset[bytes]  # digests of the documents of `validation_data`; empty for a split by hash
    skipped: int
    duplicates: int = 0


def text_digest(text: str) -> bytes:
    """SHA-256 of the text: the same on every machine, in every order."""
    return hashlib.sha256(text.encode("utf-8")).digest()


def goes_to_validation(digest: bytes, fraction: float) -> bool:
    """Whether a document with this digest belongs to the validation split."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _split(config: DataConfig, source: Source, held_out_source: Source | None) -> _Split:
    """Split a source that lies on disk. Raises DataError when one side would be empty."""
    documents = _read(source, config.max_documents)
    dataset = cast("Dataset", documents.dataset)
    whole, skipped, held_out = _held_out(config, held_out_source)
    sides: dict[bool, list[int]] = {True: [], False: []}
    for index, text in _texts(dataset):
        sides[_is_held_out(text, config, held_out)].append(index)
    train, chosen = sides[False], sides[True]
    if not train and not chosen:
        raise DataError(f"{source.label}: no document holds any text{_skipped_note(documents.skipped)}")
    if whole is None:
        _check_sides(config, source, len(train), len(chosen))
        validation = dataset.select(chosen[: config.max_validation_documents])
        return _Split(dataset.select(train), validation, held_out, documents.skipped)
    if not train:
        raise DataError(
            f"{source.label}: each of its {len(chosen)} documents is also in validation_data, so that "
            "none is left to train on; give another source as validation_data"
        )
    if chosen:
        _log.warning("%s: left out %d documents that validation_data holds too", source.label, len(chosen))
    return _Split(dataset.select(train), whole, held_out, documents.skipped + skipped, len(chosen))


def _split_stream(config: DataConfig, source: Source, held_out_source: Source | None) -> _Split:
    """Read a stream as far as needed for the validation split and for training the tokenizer."""
    whole, skipped, held_out = _held_out(config, held_out_source)
    want_validation = 0 if whole is not None else _validation_cap(config)
    want_train = 1
    if config.tokenizer is None:
        want_train = config.max_tokenizer_documents or DEFAULT_STREAMING_TOKENIZER_DOCUMENTS
    sides: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for row in _read(source, config.max_documents).dataset:
        if row["text"].strip():
            in_validation = _is_held_out(row["text"], config, held_out)
            if len(sides[in_validation]) < (want_validation if in_validation else want_train):
                sides[in_validation].append((row["name"], row["text"]))
            elif len(sides[not in_validation]) >= (want_train if in_validation else want_validation):
                break
    _check_sides(config, source, len(sides[False]), len(sides[True]) if whole is None else len(whole))
    train, validation = (documents_from_pairs(sides[side]) for side in (False, True))
    return _Split(train, validation if whole is None else whole, held_out, skipped)


def _training_stream(
    config: DataConfig, source: Source, tokenizer: PreTrainedTokenizerFast, held_out: frozenset[bytes]
) -> IterableDataset:
    """Training blocks of a streaming source, made while they are read.

    Documents are packed batch by batch and the incomplete block at the end of a batch is dropped, so that
    the stream has no state but its position and can be resumed. A batch has at least 4 documents for each
    token of a block, which keeps the loss below one part in twelve even for one-token documents; for web
    pages it is one part in thousands.
    """
    stream: Any = _read(source, config.max_documents).dataset
    if config.shuffle_buffer:
        stream = stream.shuffle(seed=config.seed, buffer_size=config.shuffle_buffer)

    return cast(
        "IterableDataset",
        stream.map(
            _pack_batch,
            batched=True,
            batch_size=max(1000, 4 * config.block_size),
            remove_columns=["text", "name"],
            features=_block_features(),
            fn_kwargs={"tokenizer": tokenizer, "config": config, "held_out": held_out},
        ),
    )


def _pack_batch(
    batch: dict[str, list[str]],
    *,
    tokenizer: PreTrainedTokenizerFast,
    config: DataConfig,
    held_out: frozenset[bytes],
) -> dict[str, Any]:
    """Whole blocks of the training documents in one batch, as lists: rows of a stream are handed on as they
    are."""
    texts = [text for text in batch["text"] if text.strip() and not _is_held_out(text, config, held_out)]
    blocks = DocumentPacker(tokenizer, config.block_size).add(texts)
    return {name: column.tolist() for name, column in blocks.items()}


def _is_held_out(text: str, config: DataConfig, held_out: frozenset[bytes]) -> bool:
    digest = text_digest(text)
    if config.validation_data is not None:
        return digest in held_out
    return goes_to_validation(digest, config.validation_fraction)


def _validation_documents(config: DataConfig, source: Source, *, whole: bool) -> Dataset:
    """The validation side of a source, as `prepare_data` holds it out."""
    if whole:
        return _whole(config, source)[0]
    dataset: Any = _read(source, config.max_documents).dataset
    cap = _validation_cap(config)
    chosen: list[tuple[str, str]] = []
    seen = 0
    for row in dataset:
        if row["text"].strip():
            seen += 1
            if goes_to_validation(text_digest(row["text"]), config.validation_fraction):
                chosen.append((row["name"], row["text"]))
                if len(chosen) == cap:
                    break
    _check_sides(config, source, seen, len(chosen))
    return documents_from_pairs(chosen)


def _held_out(config: DataConfig, source: Source | None) -> tuple[Dataset | None, int, frozenset[bytes]]:
    """The documents of `validation_data`, what was skipped there, and their digests; none for a split by hash."""
    if source is None:
        return None, 0, frozenset()
    dataset, skipped = _whole(config, source)
    return dataset, skipped, frozenset(text_digest(text) for _, text in _texts(dataset))


def _whole(config: DataConfig, source: Source) -> tuple[Dataset, int]:
    """All of `validation_data` (up to its cap) that holds text, and what was skipped in it."""
    documents = _read(source, _validation_cap(config))
    dataset = _materialise(documents.dataset)
    dataset = dataset.select(_with_text(dataset))
    if not len(dataset):
        raise DataError(f"{source.label}: no document holds any text{_skipped_note(documents.skipped)}")
    return dataset, documents.skipped


def _validation_cap(config: DataConfig) -> int:
    unlimited = DEFAULT_STREAMING_VALIDATION_DOCUMENTS if config.streaming else 2**62
    return config.max_validation_documents or unlimited


def _check_sides(config: DataConfig, source: Source, train: int, validation: int) -> None:
    if train and validation:
        return
    total = train + validation
    raise DataError(
        f"{source.label}: the split by document hash with validation_fraction={config.validation_fraction} "
        f"leaves {train} of {total} documents for training and {validation} for validation; "
        "give validation_data, change validation_fraction, or add documents"
    )


# --------------------------------------------------------------------------------------------------- pieces


def _read(source: Source, limit: int | None) -> Documents:
    """The documents of a source, at most `limit` of them."""
    documents = source.read()
    return replace(documents, dataset=_first(documents.dataset, limit))


def _first(dataset: Any, limit: int | None) -> Any:
    """The first `limit` rows of a Dataset or IterableDataset; all of them for None."""
    if limit is None:
        return dataset
    if hasattr(dataset, "__len__"):
        return dataset.select(range(min(limit, len(dataset))))
    return dataset.take(limit)


def _materialise(dataset: Dataset | IterableDataset) -> Dataset:
    from datasets import Dataset

    if isinstance(dataset, Dataset):
        return dataset
    return documents_from_pairs([(row["name"], row["text"]) for row in dataset])


def _batches(dataset: Dataset) -> Iterator[list[str]]:
    for batch in dataset.select_columns(["text"]).iter(_BATCH):
        yield cast(dict[str, list[str]], batch)["text"]


def _texts(dataset: Dataset) -> Iterator[tuple[int, str]]:
    """(row, text) of every document that holds more than white space."""
    index = 0
    for texts in _batches(dataset):
        for text in texts:
            if text.strip():
                yield index, text
            index += 1


def _with_text(dataset: Dataset) -> list[int]:
    return [index for index, _ in _texts(dataset)]


def pack_documents(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    block_size: int,
    *,
    pad_last: bool,
    file: Path | None = None,
) -> tuple[Dataset, SplitStatistics]:
    """Tokenise the column `text` and pack it into blocks, in memory or in an Arrow file."""
    packer = DocumentPacker(tokenizer, block_size, pad_last=pad_last, rows=len(documents))
    blocks = documents.map(
        packer,
        batched=True,
        batch_size=_BATCH,
        with_indices=True,
        remove_columns=documents.column_names,
        features=_block_features(),
        load_from_cache_file=False,
        keep_in_memory=file is None,
        cache_file_name=None if file is None else str(file),
        new_fingerprint=f"{documents._fingerprint}-{block_size}-{pad_last}",
        desc="Tokenising",
    )
    return blocks, packer.statistics()


def _block_features() -> Features:
    from datasets import Features, List, Value

    return Features({name: List(Value("int32")) for name in BLOCK_COLUMNS})


def _skipped_note(skipped: int) -> str:
    return f" ({skipped} skipped as unreadable)" if skipped else ""
