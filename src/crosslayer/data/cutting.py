"""Long texts, cut into documents; joined again they are the text, character for character."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import IO

LONG_TEXT_BYTES = 64 * 1024
"""A text file given on its own, and a row of a table, that is longer than this is cut into documents."""

LONG_FILE_BYTES = 2**20
"""A text file in a folder that is longer than this is cut too: tokenising takes 200 times a document."""

CUT_BYTES = 16 * 1024
"""Length after which the next blank line ends a document of a long text."""

LONGEST_LINE = 2**20
"""Characters after which a line without an end is cut at a space: whole corpora come as one line."""


def cut_long_text(text: str) -> list[str]:
    """Cut a long text into documents of about 16 KiB.

    A document ends after the first run of blank lines that follows 16 KiB of text; where none comes within another
    16 KiB it ends at the next line end. Lines of up to 2^20 characters are never cut, longer ones after a space.
    """
    return list(cut_lines(_short_lines(text.splitlines(keepends=True))))


def cut_text_file(file: IO[str]) -> Iterator[str]:
    """`cut_long_text` of a file opened with newline="", never holding more than one document of it."""
    return cut_lines(_short_lines(_lines(file)))


def is_long(text: str) -> bool:
    """Whether a text has more than `LONG_TEXT_BYTES` bytes in UTF-8."""
    return len(text) * 4 > LONG_TEXT_BYTES and len(text.encode("utf-8", "surrogatepass")) > LONG_TEXT_BYTES


def cut_lines(lines: Iterable[str]) -> Iterator[str]:
    """Join lines (with their ends) into documents."""
    document: list[str] = []
    size, after_blank = 0, False
    for line in lines:
        blank = not line.strip()
        if not blank and ((after_blank and size >= CUT_BYTES) or size >= 2 * CUT_BYTES):
            yield "".join(document)
            document, size = [], 0
        document.append(line)
        size += len(line.encode("utf-8", "surrogatepass"))
        after_blank = blank
    if document:
        yield "".join(document)


def _lines(file: IO[str]) -> Iterator[str]:
    """Lines of a file as `str.splitlines(keepends=True)` has them, a bounded number of characters at a time."""
    rest = ""
    while part := file.readline(LONGEST_LINE):
        lines = (rest + part).splitlines(keepends=True)
        rest = ""
        if not part.endswith(("\n", "\r")):  # the end of the file, or the middle of a long line
            rest = lines.pop()
        yield from lines
        while len(rest) > LONGEST_LINE:
            end = _end_of_piece(rest)
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _short_lines(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        while len(line) > LONGEST_LINE:
            end = _end_of_piece(line)
            yield line[:end]
            line = line[end:]
        yield line


def _end_of_piece(line: str) -> int:
    return line.rfind(" ", 0, LONGEST_LINE) + 1 or LONGEST_LINE
