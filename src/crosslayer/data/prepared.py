"""Folders of prepared data: made once by `crosslayer prepare`, taken anywhere, named by `data`.

They have the layout of a cache entry (cache.py), hashes and tokenizer included; nothing in them says where they lie.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import ConfigError, DataError
from . import cache
from .config import DataConfig
from .tokenizer import load_tokenizer, tokenizer_fingerprint

BEGUN = "begun.json"
_MARKS = ("manifest.json", "statistics.json", "tokenizer")
_OF_BLOCKS = (
    "validation_data",
    "validation_fraction",
    "max_validation_documents",
    "block_size",
    "max_documents",
    "text_column",
    "skip_bad",
)
"""Fields that decide the blocks, besides the source and the tokenizer."""


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds prepared data, be it whole or not."""
    return os.path.isfile(folder / BEGUN) or (
        os.path.isdir(folder / "validation") and any(os.path.exists(folder / name) for name in _MARKS)
    )


def work_folder(output: Path) -> Path:
    """Where a folder is prepared before it is whole."""
    return output.with_name(f"{output.name}.partial")


def check_prepared(folder: Path, config: DataConfig) -> None:
    """Raises DataError for a folder that is not whole, ConfigError where it was not prepared as `config` says."""
    if (folder / BEGUN).is_file():
        raise DataError(f"{folder} is half-finished: run the same `crosslayer prepare` again, which goes on with it")
    problem = cache.problem_of(folder)
    if problem is not None:
        raise DataError(f"{folder} is damaged: {problem}; copy it again, or prepare it anew")
    if config.streaming:
        raise ConfigError(f"data={str(folder)!r} is prepared, and not read as a stream; give streaming: false")
    content = json.loads((folder / "statistics.json").read_text(encoding="utf-8"))
    problems = _differences(config, content)
    if problems:
        raise ConfigError(f"{folder} was prepared otherwise: {'; '.join(problems)}; give the same, or prepare it anew")


def _differences(config: DataConfig, content: dict[str, Any]) -> Iterator[str] | list[str]:
    made = content["config"]
    names = list(_OF_BLOCKS)
    if config.tokenizer is None and made["tokenizer"] is None:
        names += ["tokenizer_vocab_size", "max_tokenizer_documents"]
    elif not _is_same_tokenizer(config.tokenizer, made["tokenizer"], content["tokenizer"]):
        names.append("tokenizer")
    given = vars(config)
    found = [f"{name}={given[name]!r}, prepared with {made[name]!r}" for name in names if given[name] != made[name]]
    if "tokenizer" in names and given["tokenizer"] == made["tokenizer"]:  # another one of the same name
        found.append(f"tokenizer={given['tokenizer']!r} is not the one it was prepared with")
    return found


def _is_same_tokenizer(given: str | None, made: str | None, fingerprint: str) -> bool:
    if given is None:
        return False
    if given == made and not os.path.exists(os.path.expanduser(given)):
        return True  # a name on the hub, which need not be in reach
    return tokenizer_fingerprint(load_tokenizer(given)) == fingerprint


@contextmanager
def preparing(output: Path, key: str) -> Iterator[Path]:
    """The folder to work in, kept when the work breaks off and gone when `output` is there.

    Raises ConfigError where another process prepares it, or other data were begun there.
    """
    work = work_folder(output)
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / "lock", blocking=False):
            _check_begun(work, key)
            yield work
            os.rename(work / "data", output)
        shutil.rmtree(work, ignore_errors=True)
    except Timeout:
        raise ConfigError(f"{work}: another process prepares it; wait for it, or give another --output") from None
    except OSError as error:
        raise DataError(
            f"{output} cannot be written ({error.strerror or error}); check free space and rights"
        ) from error


def _check_begun(work: Path, key: str) -> None:
    begun = work / BEGUN
    if begun.is_file():
        if json.loads(begun.read_text(encoding="utf-8")) != {"key": key}:
            raise ConfigError(f"{work} holds the beginning of other data; remove it, or give another --output")
    elif set(os.listdir(work)) - {"lock", f"{BEGUN}.tmp"}:
        raise ConfigError(f"{work} holds files that are not of this work; remove it, or give another --output")
    else:
        (work / f"{BEGUN}.tmp").write_text(json.dumps({"key": key}), encoding="utf-8")
        os.replace(work / f"{BEGUN}.tmp", begun)
