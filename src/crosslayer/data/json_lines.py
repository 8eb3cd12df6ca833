"""Rows of JSON, one at a time, and words for what is wrong with one."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

GZIP_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def open_bytes(path: Path) -> IO[bytes]:
    """Open for reading bytes, decompressing if the name ends in .gz."""
    if path.name.lower().endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    """(line number, row, what is wrong or None) of every line that is not blank; the row is empty where it is wrong.

    A damaged gzip file is a wrong line, the last one. Raises OSError.
    """
    number = 0
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(BYTE_ORDER_MARK)
                if line.strip():
                    row, problem = parse_row(line)
                    yield number, row, problem
    except GZIP_ERRORS as error:
        yield number + 1, {}, f"damaged gzip file ({error})"


def parse_row(line: bytes) -> tuple[dict[str, Any], str | None]:
    """(row, None), or ({}, what is wrong with the line)."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return {}, not_utf8(error, "of the line")
    except json.JSONDecodeError as error:
        return {}, f"not valid JSON ({error.msg} at column {error.colno}); each line must hold one JSON object"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        return {}, f"not usable JSON ({error}); each line must hold one JSON object"
    if not isinstance(row, dict):
        return {}, f"holds {json_type(row)}; each line must hold one JSON object"
    return row, None


def json_type(value: object) -> str:
    """What JSON calls a value, with its article."""
    names = {
        "NoneType": "null",
        "bool": "a boolean",
        "int": "a number",
        "float": "a number",
        "list": "a list",
        "str": "a string",
    }
    return names.get(type(value).__name__, "an object")


def lone_surrogate(text: str) -> str | None:
    """The complaint about a text with half a surrogate pair (JSON can spell one), which no file can hold; else None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "holds half a surrogate pair, which is no character"
    return None


def not_utf8(error: UnicodeDecodeError, where: str = "", before: int = 0) -> str:
    """The complaint about bytes that are no UTF-8; `before` is the offset at which the decoded bytes began."""
    byte, offset = error.object[error.start], before + error.start
    return f"not UTF-8 (byte 0x{byte:02x} at offset {offset}{' ' if where else ''}{where})"


def names_of(columns: Any) -> str:
    """The first twenty column names, for a message."""
    return ", ".join(repr(str(column)) for column in list(columns)[:20]) or "none"
