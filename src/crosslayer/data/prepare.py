"""The way from a configuration to packed, cached blocks.

The two ways through this package:

    open_source -> split by hash -> tokenizer -> pack -> cache            prepare_data
    open_source -> (one side of the split) -> pack                        load_evaluation_data
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..errors import ConfigError, DataError
from ..private import dataset_fingerprint
from ..ranges import LENGTH, out_of_range
from . import cache
from .config import DataConfig, cache_root, local_path
from .files import quiet
from .packing import DocumentPacker, SplitStatistics, block_features
from .parts import PartPacker, Parts
from .prepared import check_prepared, is_prepared, preparing
from .sources import Source, open_source
from .split import (
    BATCH,
    all_documents,
    first_rows,
    read,
    split_documents,
    split_stream,
    text_batches,
    validation_documents,
)
from .stream import TrainingStream
from .tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerFast


@dataclass(kw_only=True, frozen=True)
class DataStatistics:
    """What was prepared."""

    train: SplitStatistics
    validation: SplitStatistics
    skipped: int
    """Files, lines and rows left out because they could not be read."""

    duplicates: int
    """Training documents left out because `validation_data` holds the same text."""

    cut: int
    """Long files and rows that became several documents."""

    vocab_size: int
    cache_path: str
    cache_hit: bool
    """True when the blocks were found in the cache, so that nothing was tokenised."""

    def describe(self) -> dict[str, Any]:
        """For the report of a run: all but where the cache lies, which says nothing about it."""
        return {name: value for name, value in asdict(self).items() if name not in ("cache_path", "cache_hit")}


@dataclass(kw_only=True, frozen=True)
class PreparedData:
    """Blocks to train and validate on: columns input_ids, position_ids and labels, each a list of
    block_size ints.

    `train` holds whole blocks only; the last block of `validation` is padded, so that its loss counts every
    token. With `streaming`, `train` gives one pass after another.
    """

    train: Dataset | TrainingStream
    validation: Dataset
    tokenizer: PreTrainedTokenizerFast
    statistics: DataStatistics


def prepare_data(config: DataConfig) -> PreparedData:
    """Read, split, tokenise and pack the data of a configuration, or find the result of an earlier call in
    the cache.

    Raises DataError for data that is missing, unreadable or too small, ConfigError for a tokenizer that
    cannot be used. Neither leaves anything in the cache.
    """
    if is_prepared(local_path(config.data)):
        check_prepared(local_path(config.data), config)
        return _open(local_path(config.data), cache_hit=True)
    ingredients = _open_ingredients(config)
    folder = cache_root(config.cache_dir) / ingredients.key

    prepared = _load(folder, ingredients, cache_hit=True)
    if prepared is None:
        with cache.building(folder) as temporary:
            _build(temporary, ingredients)
        prepared = _load(folder, ingredients, cache_hit=False)
    if prepared is None:
        raise DataError(f"{folder}: the data cache cannot be read back; check the disk or choose another cache_dir")
    return prepared


def prepare_folder(config: DataConfig, output: Path, workers: int = 1) -> DataStatistics:
    """Prepare the data of a configuration into a new folder, which `data` may name on any machine.

    Args:
        workers: processes that tokenise.

    The folder is there when it is whole. What was tokenised when the work broke off lies beside it, in
    `<output>.partial`, and is not tokenised again. The blocks are those of `prepare_data`. Raises as it does, and
    ConfigError for a stream and for a folder that holds something else.
    """
    if config.streaming:
        raise ConfigError("a stream is read while it trains; give streaming: false to prepare it")
    ingredients = _open_ingredients(config)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not is_prepared(output):
            raise ConfigError(f"{output} holds other files; give a new folder as --output")
        check_prepared(output, config)
        if _content(output)["key"] != ingredients.key:
            raise ConfigError(f"{output} holds other prepared data; give a new folder as --output")
        return _open(output, cache_hit=True).statistics
    with (
        preparing(output, ingredients.key) as work,
        Parts(work, workers) as parts,
        cache.building(work / "data") as temporary,
    ):
        _build(temporary, ingredients, parts)
    return _open(output, cache_hit=False).statistics


def load_documents(config: DataConfig) -> Dataset | IterableDataset:
    """The documents of `config.data` in source order, columns `text` and `name`: a Dataset, or an
    IterableDataset when `streaming`. Raises DataError."""
    return read(open_source(config), config.max_documents).dataset


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
    for problem in out_of_range({"block_size": size}, {"block_size": LENGTH}):
        raise ConfigError(problem)
    if part == "validation":
        held_out = config.validation_data is not None
        documents = validation_documents(config, open_source(config, validation=held_out), whole=held_out)
    else:
        documents = all_documents(config, open_source(config))
    return pack_documents(documents, tokenizer, size, pad_last=True)


# ------------------------------------------------------------------------------------------------ the cache


@dataclass(kw_only=True, frozen=True)
class _Ingredients:
    """What blocks are made from."""

    config: DataConfig
    source: Source
    held_out: Source | None
    tokenizer: PreTrainedTokenizerFast | None
    """None: to be trained."""

    @property
    def key(self) -> str:
        return cache.cache_key(_key_content(self.config, self.source, self.held_out, self.tokenizer))


def _open_ingredients(config: DataConfig) -> _Ingredients:
    return _Ingredients(
        config=config,
        source=open_source(config),
        held_out=open_source(config, validation=True) if config.validation_data is not None else None,
        tokenizer=load_tokenizer(config.tokenizer) if config.tokenizer is not None else None,
    )


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


def _build(folder: Path, given: _Ingredients, parts: Parts | None = None) -> None:
    """Write train/ (unless streaming), validation/, tokenizer/ and statistics.json into an empty folder."""
    config, source = given.config, given.source
    split = (split_stream if config.streaming else split_documents)(config, source, given.held_out)

    def tokenizer_of_the_data() -> PreTrainedTokenizerFast:
        if given.tokenizer is not None:
            return given.tokenizer
        texts = text_batches(first_rows(split.train, config.max_tokenizer_documents))
        return train_tokenizer(texts, config.tokenizer_vocab_size, config.block_size)

    tokenizer = tokenizer_of_the_data() if parts is None else parts.tokenizer(tokenizer_of_the_data)
    tokenizer.save_pretrained(folder / "tokenizer")

    train = SplitStatistics()
    if not config.streaming:
        train = _write_split(folder / "train", split.train, tokenizer, config.block_size, parts, pad_last=False)
        if not train.blocks:
            raise DataError(
                f"{source.label}: the training documents hold {train.tokens} tokens, but one block needs "
                f"{config.block_size}; add text or lower block_size"
            )
    validation = _write_split(
        folder / "validation", split.validation, tokenizer, config.block_size, parts, pad_last=True
    )
    content = {
        "train": asdict(train),
        "validation": asdict(validation),
        "skipped": split.skipped,
        "duplicates": split.duplicates,
        "cut": split.cut,
        "held_out": sorted(digest.hex() for digest in split.held_out) if config.streaming else [],
        "key": given.key,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "config": {name: value for name, value in asdict(config).items() if name not in ("data", "cache_dir")},
    }
    (folder / "statistics.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_split(
    folder: Path,
    documents: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    block_size: int,
    parts: Parts | None,
    *,
    pad_last: bool,
) -> SplitStatistics:
    """Pack documents into blocks and save those in `folder`, never holding all of them in memory."""
    scratch = folder.with_name(f"{folder.name}.arrow")
    if parts is None:
        blocks, statistics = pack_documents(documents, tokenizer, block_size, pad_last=pad_last, file=scratch)
    else:
        rows = parts.tokenize(folder.name, documents, tokenizer)
        packer = PartPacker(tokenizer, block_size, pad_last=pad_last, rows=len(rows))
        blocks, statistics = _pack(rows, packer, batch_size=1, file=scratch)
    with quiet():
        blocks.save_to_disk(folder)
    del blocks
    scratch.unlink(missing_ok=True)
    return statistics


def _load(folder: Path, given: _Ingredients, *, cache_hit: bool) -> PreparedData | None:
    """Prepared data from a cache folder; None when it is not there, or damaged (which is logged)."""
    if not cache.is_complete(folder):
        return None
    try:
        return _open(folder, given, cache_hit=cache_hit)
    except (OSError, ValueError, KeyError) as error:  # those of arrow and our own are ValueErrors too
        cache.discard(folder, error)
        return None


def _content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "statistics.json").read_text(encoding="utf-8"))


def _open(folder: Path, given: _Ingredients | None = None, *, cache_hit: bool) -> PreparedData:
    """What a folder holds; what it was made from is asked for its tokenizer and, where it streams, its documents."""
    import datasets

    content = _content(folder)
    tokenizer = None if given is None else given.tokenizer
    if tokenizer is None:
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
    if given is not None and given.config.streaming:
        train: Any = TrainingStream(
            documents=cast("IterableDataset", read(given.source, given.config.max_documents).dataset),
            tokenizer=tokenizer,
            config=given.config,
            held_out=frozenset(bytes.fromhex(digest) for digest in content["held_out"]),
        )
    else:
        train = datasets.load_from_disk(folder / "train")
    statistics = DataStatistics(
        train=SplitStatistics(**content["train"]),
        validation=SplitStatistics(**content["validation"]),
        skipped=content["skipped"],
        duplicates=content["duplicates"],
        cut=content["cut"],
        vocab_size=len(tokenizer),
        cache_path=str(folder),
        cache_hit=cache_hit,
    )
    validation = cast("Dataset", datasets.load_from_disk(folder / "validation"))
    return PreparedData(train=train, validation=validation, tokenizer=tokenizer, statistics=statistics)


# ---------------------------------------------------------------------------------------------------- blocks


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
    return _pack(documents, packer, batch_size=BATCH, file=file)


def _pack(
    rows: Dataset, packer: DocumentPacker, *, batch_size: int, file: Path | None
) -> tuple[Dataset, SplitStatistics]:
    blocks = rows.map(
        packer,
        batched=True,
        batch_size=batch_size,
        with_indices=True,
        remove_columns=rows.column_names,
        features=block_features(),
        load_from_cache_file=False,
        keep_in_memory=file is None,
        cache_file_name=None if file is None else str(file),
        new_fingerprint=f"{dataset_fingerprint(rows)}-{packer.block_size}-{packer.last_index is not None}",
        desc="Tokenising",
    )
    return blocks, packer.statistics()
