"""Files read as they are: odd names, links, byte order marks, damaged rows, long texts."""

import json
import logging
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crosslayer.data import DataConfig, load_documents
from crosslayer.data.cutting import LONG_FILE_BYTES, LONG_TEXT_BYTES, LONGEST_LINE, cut_long_text, cut_text_file
from crosslayer.data.sources import open_source
from crosslayer.errors import DataError
from crosslayer.train import build_recipe, load_recipe
from crosslayer.train.run import pretrain
from tiny_run import tiny_content

MARK = "\ufeff"


@pytest.fixture
def read(tmp_path):
    """read(path, **fields) -> [(name, text), ...]"""

    def call(path, **fields):
        documents = load_documents(DataConfig(data=str(path), cache_dir=str(tmp_path / "cache"), **fields))
        return list(zip(documents["name"], documents["text"], strict=True))

    return call


def write(path, texts):
    """Texts as rows or, of a text file, joined."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        with path.open("wb") as file:
            pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), file)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        path.write_text("".join(texts))
    return path


# --------------------------------------------------------------------------------------------------- names

ODD_NAMES = [
    "part[1]",
    "a*",
    "what?",
    "{a,b}",
    "two words ",
    "line\nbreak",
    "hash#1",
    "a::b",
    "~",
    "%20",
    "-x",
    os.fsdecode(b"latin\xe9"),
]


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_the_file_that_was_named_is_read_and_no_other(tmp_path, read, name, ending):
    for other in ("part1", "abc", "whatx", "a", "b", "two words", "hash", "x"):
        write(tmp_path / f"{other}{ending}", ["another file"])
    write(tmp_path / f"{name}{ending}", ["mine"])
    assert [text for _, text in read(tmp_path / f"{name}{ending}")] == ["mine"]
    write(tmp_path / "folder" / name / f"{name}{ending}", ["mine"])
    assert [text for _, text in read(tmp_path / "folder")] == ["mine"]
    assert [text for _, text in read(tmp_path / "folder" / name)] == ["mine"]


def test_linked_folders_and_files_are_read_once_and_loops_end(tmp_path, read):
    write(tmp_path / "elsewhere" / "one.txt", ["linked folder"])
    write(tmp_path / "two.txt", ["linked file"])
    folder = tmp_path / "data"
    write(folder / "own.txt", ["own"])
    (folder / "folder").symlink_to(tmp_path / "elsewhere")
    (folder / "file.txt").symlink_to(tmp_path / "two.txt")
    (folder / "loop").symlink_to(folder)
    (folder / "again").symlink_to(tmp_path / "elsewhere")
    assert read(folder) == [("again/one.txt", "linked folder"), ("file.txt", "linked file"), ("own.txt", "own")]


def test_a_link_that_leads_nowhere_is_named_or_counted(tmp_path, read):
    write(tmp_path / "data" / "own.txt", ["own"])
    (tmp_path / "data" / "gone.jsonl").symlink_to(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"gone.jsonl: a link that leads nowhere; repair it, or set skip_bad"):
        read(tmp_path / "data")
    config = DataConfig(data=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), skip_bad=True)
    documents = open_source(config).read()
    assert (documents.dataset["text"][:], documents.skipped) == (["own"], 1)


# ----------------------------------------------------------------------------------------------- what they hold


def test_byte_order_marks_are_no_text(tmp_path, read):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text(f"{MARK}text {MARK}inside")
    line = json.dumps({"text": "row"})
    (tmp_path / "d" / "b.jsonl").write_text(f"{MARK}{line}\n{MARK}{line}\n")  # two files put together with `cat`
    (tmp_path / "d" / "c.md").write_text(MARK + "long line of text\n" * (LONG_TEXT_BYTES // 16))
    texts = [text for _, text in read(tmp_path / "d")]
    assert texts[:3] == [f"text {MARK}inside", "row", "row"]
    assert texts[3].startswith("long")
    assert read(tmp_path / "d" / "c.md")[0][1].startswith("long")


def test_parquet_files_without_rows_are_fine_alone_or_not(tmp_path, read):
    write(tmp_path / "d" / "0.parquet", ["a", "b"])
    write(tmp_path / "d" / "1.parquet", [])
    (tmp_path / "d" / "2.jsonl").write_text("\n\n")
    assert [text for _, text in read(tmp_path / "d")] == ["a", "b"]
    assert read(tmp_path / "d" / "1.parquet") == []


def test_a_parquet_row_that_is_not_utf8_is_named_or_counted(tmp_path, read):
    raw = pa.array([b"good", b"na\xefve", b"last"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet")
    with pytest.raises(
        DataError, match=r"rows.parquet, row 2: text column 'text' is not UTF-8 \(byte 0xef at offset 2"
    ):
        read(tmp_path / "rows.parquet")
    config = DataConfig(data=str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"), skip_bad=True)
    documents = open_source(config).read()
    assert documents.dataset["name"][:] == ["rows.parquet:1", "rows.parquet:3"]
    assert documents.skipped == 1


def test_json_that_python_will_not_read_is_named(tmp_path, read):
    for content in ("[" * 100_000, '{"text": ' + "1" * 5000 + "}"):
        (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n' + content + "\n")
        with pytest.raises(DataError, match=r"rows.jsonl, line 2: not usable JSON"):
            read(tmp_path / "rows.jsonl")


# --------------------------------------------------------------------------------------------------- long texts


@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n", "\r\r", "\u2028\u2028", " \x0c ", "\n"])
def test_a_long_file_is_cut_as_its_text_is(tmp_path, separator):
    text = "".join(f"Paragraph {i} of some words" * (i % 40) + separator for i in range(1000))
    (tmp_path / "long.txt").write_bytes(text.encode())
    with (tmp_path / "long.txt").open(encoding="utf-8", newline="") as file:
        pieces = list(cut_text_file(file))
    assert pieces == cut_long_text(text)
    assert "".join(pieces) == text
    assert len(pieces) > 20


def test_a_corpus_in_one_line_is_cut_at_spaces(tmp_path, read):
    text = "some words in a line " * (3 * LONGEST_LINE // 21)
    (tmp_path / "line.txt").write_text(text)
    pieces = [piece for _, piece in read(tmp_path / "line.txt")]
    assert pieces == cut_long_text(text)
    assert len(pieces) >= 3
    assert "".join(pieces) == text
    assert all(piece.endswith(" ") for piece in pieces)
    assert "".join(cut_long_text("x" * (2 * LONGEST_LINE + 5))) == "x" * (2 * LONGEST_LINE + 5)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_long_rows_are_cut_at_blank_lines(tmp_path, read, caplog, ending):
    book = "A line of a book.\n\n" * (LONG_TEXT_BYTES // 8)
    path = write(tmp_path / f"books{ending}", ["short", book, "x" * LONG_TEXT_BYTES])
    with caplog.at_level(logging.INFO, logger="crosslayer"):
        documents = read(path)
    assert "1 long texts were cut into documents" in caplog.text
    assert documents[0] == (f"books{ending}:1", "short")
    assert documents[1][0] == f"books{ending}:2#1"
    assert documents[-1][0] == f"books{ending}:3"  # no line end in it, and no more than 64 KiB
    assert "".join(text for _, text in documents[1:-1]) == book
    assert len(documents) > 6


@pytest.mark.parametrize("source", ["books/long.txt", "books"])
def test_a_long_file_is_never_whole_in_memory(tmp_path, source):
    line = "A line of text, and then another one.\n"
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "long.txt").write_text(line * (24 * 2**20 // len(line)))
    tracemalloc.start()
    try:
        documents = open_source(DataConfig(data=str(tmp_path / source), cache_dir=str(tmp_path / "cache"))).read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(documents.dataset) > 500
    assert peak < 20 * 2**20  # a batch of documents and little else; the file has 24 MiB


def test_a_file_in_a_folder_is_one_document_up_to_a_mebibyte(tmp_path, read):
    text = "A line of a book.\n\n" * (LONG_FILE_BYTES // 19)
    (tmp_path / "d").mkdir()
    for number, extra in enumerate(("", "x" * 40)):
        (tmp_path / "d" / f"{number}.txt").write_text(text + extra)
    documents = read(tmp_path / "d")
    assert documents[0] == ("0.txt", text)
    assert documents[1][0] == "1.txt#1"
    assert "".join(piece for _, piece in documents[1:]) == text + "x" * 40


def test_a_folder_whose_name_is_no_text_is_trained_on_and_reported(tmp_path):
    content = tiny_content(tmp_path, max_steps=2, save_steps=2, eval_strategy="no", warmup_steps=0)
    folder = tmp_path / os.fsdecode(b"latin\xe9[1]\n")
    Path(content["data"]["data"]).rename(folder)
    content["data"]["data"] = str(folder)
    report = pretrain(build_recipe(content), tmp_path / "run")
    assert report.data["source"].endswith("latin\\xe9[1]\n")
    assert (tmp_path / "run" / "report.md").is_file()
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.data == str(folder)
