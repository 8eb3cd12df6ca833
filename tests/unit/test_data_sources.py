"""Files, folders, the embedded library and hub datasets: what is read, in what order, and what is refused."""

import gzip
import json
import os
import sysconfig
from itertools import pairwise
from pathlib import Path

import datasets
import pytest

from crosslayer.data import DataConfig, load_documents
from crosslayer.data.cutting import CUT_BYTES, LONG_TEXT_BYTES, cut_long_text
from crosslayer.data.files import KINDS
from crosslayer.data.sources import open_source
from crosslayer.errors import ConfigError, CrossLayerError, DataError


@pytest.fixture
def config(tmp_path):
    """Makes configurations whose cache is the test's own."""
    return lambda data, **fields: DataConfig(data=str(data), cache_dir=str(tmp_path / "cache"), **fields)


def read(config):
    documents = load_documents(config)
    return list(zip(documents["name"], documents["text"], strict=True))


def write_jsonl(path, rows):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path, columns):
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return path


def refusal(config):
    """The message with which reading is refused: always one line."""
    with pytest.raises(DataError) as caught:
        open_source(config).read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("ending", [".txt", ".md", ".py", ".txt.gz"])
def test_one_text_file_is_one_document_byte_for_byte(tmp_path, config, ending):
    text = "\ufefffirst\r\nsecond é\u2028\x0c\n\n"
    path = tmp_path / f"one{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    assert read(config(path)) == [(path.name, text[1:])]  # a byte order mark is no text


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_json_lines_one_document_a_row(tmp_path, config, ending):
    path = write_jsonl(tmp_path / f"rows{ending}", [{"body": f"text {i}", "n": i} for i in range(3)])
    assert read(config(path, text_column="body")) == [(f"{path.name}:{i + 1}", f"text {i}") for i in range(3)]


def test_parquet_one_document_a_row(tmp_path, config):
    path = write_parquet(tmp_path / "rows.parquet", {"n": [1, 2], "body": ["a", "b"]})
    assert read(config(path, text_column="body")) == [("rows.parquet:1", "a"), ("rows.parquet:2", "b")]


def test_a_folder_is_read_in_order_of_relative_paths(tmp_path, config):
    folder = tmp_path / "data"
    for name in [
        "b.txt",
        "a/z.md",
        "a/b/c.py",
        "B.txt",
        ".hidden.txt",
        ".git/x.txt",
        "image.png",
        "empty.txt",
    ]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if "empty" in name else name)
    write_jsonl(folder / "a" / "rows.jsonl", [{"text": "one"}, {"text": "two"}])
    write_parquet(folder / "c.parquet", {"text": ["three"]})
    expected = ["B.txt", "a/b/c.py", "a/rows.jsonl:1", "a/rows.jsonl:2", "a/z.md", "b.txt", "c.parquet:1"]
    assert [name for name, _ in read(config(folder))] == expected
    assert [text for _, text in read(config(folder))][1:5] == ["a/b/c.py", "one", "two", "a/z.md"]
    assert len(load_documents(config(folder, max_documents=3))) == 3


def test_json_lines_that_datasets_would_change_or_refuse_are_read_as_they_are(tmp_path, config):
    dates = ["2020-01-01 00:00:00", "2021-05-05 10:00:00"]  # arrow takes these for time stamps
    path = write_jsonl(tmp_path / "dates.jsonl", [{"text": date} for date in dates])
    assert [text for _, text in read(config(path))] == dates
    rows = [{"text": "a", "meta": 1}, {"text": "b", "meta": "x"}, {"text": "c", "meta": {"y": []}}]
    path = write_jsonl(tmp_path / "mixed.jsonl", rows)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n\r\n"))  # blank lines are no rows
    assert [text for _, text in read(config(path))] == ["a", "b", "c"]


def test_changed_content_is_read_again_even_with_the_same_time_stamp(tmp_path, config):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "old"}])
    os.utime(path, (1, 1))
    assert [text for _, text in read(config(path))] == ["old"]
    write_jsonl(path, [{"text": "new"}])
    os.utime(path, (1, 1))
    assert [text for _, text in read(config(path))] == ["new"]


def test_reading_leaves_nothing_in_the_cache(tmp_path, config):
    """No copy that could be stale, damaged or left behind by a killed run."""
    (tmp_path / "one.txt").write_text("some text " * 100)
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    write_parquet(tmp_path / "rows.parquet", {"text": ["a"]})
    for name in ("one.txt", "rows.jsonl", "rows.parquet"):
        documents = load_documents(config(tmp_path / name))
        assert not list((tmp_path / "cache").iterdir())
        assert len(documents) == len(documents.map(lambda row: {"text": row["text"] + "!"})) == 1
    assert not list((tmp_path / "cache").iterdir())


def test_identity_follows_names_and_content_but_not_the_place(tmp_path, config):
    def identity(folder, text, name="a.txt", **fields):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(text)
        return open_source(config(tmp_path / folder, **fields)).identity

    first = identity("one", "text")
    assert identity("two", "text") == first
    assert identity("three", "texT") != first
    assert identity("four", "text", name="b.txt") != first
    assert identity("one", "text", text_column="body") != first


# ------------------------------------------------------------------------------------------ long text files


def test_a_long_text_is_cut_at_blank_lines_and_nothing_is_lost():
    text = "".join(f"Paragraph {i}. " + "word " * (i % 200) + "\n" + "\n" * (i % 3) for i in range(800))
    pieces = cut_long_text(text)
    assert "".join(pieces) == text
    assert len(pieces) > 5
    for before, after in pairwise(pieces):
        assert before.endswith("\n\n")
        assert after[0] == "P"
        assert CUT_BYTES <= len(before.encode()) < 2 * CUT_BYTES


def test_a_long_text_without_blank_lines_is_cut_at_line_ends():
    lines = [f"{i} " + "x" * 1000 + "\n" for i in range(100)] + ["y" * 100_000 + "\n", "end"]
    pieces = cut_long_text("".join(lines))
    assert "".join(pieces) == "".join(lines)
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert all(len(piece) < 2 * CUT_BYTES + 2000 or "y" in piece for piece in pieces)


def test_only_a_long_text_file_given_alone_is_cut(tmp_path, config):
    paragraph = "A line of text.\n" * 500 + "\n"
    text = paragraph * (LONG_TEXT_BYTES // len(paragraph) + 2)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "long.txt").write_text(text)
    (tmp_path / "short.txt").write_text(paragraph * 2)
    documents = read(config(folder / "long.txt"))
    assert [name for name, _ in documents] == [f"long.txt#{i + 1}" for i in range(len(documents))]
    assert len(documents) > 2
    assert "".join(piece for _, piece in documents) == text
    assert read(config(folder)) == [("long.txt", text)]
    assert len(read(config(tmp_path / "short.txt"))) == 1


# ------------------------------------------------------------------------------------------- python-library


def test_the_python_library(config):
    documents = dict(read(config("python-library")))
    names = list(documents)
    files = [name for name in names if "#" not in name]
    assert files == sorted(files)
    assert {"abc.py", "json/decoder.py", "asyncio/tasks.py", "pydoc_data/topics.py#assert"} <= set(names)
    root = Path(sysconfig.get_paths()["stdlib"])
    assert documents["json/decoder.py"].encode() == (root / "json" / "decoder.py").read_bytes()
    unwanted = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not [name for name in files if unwanted.intersection(name.split("/"))]
    assert not [name for name in files if "_sysconfigdata" in name or name.startswith("config-")]
    assert len(files) > 400
    assert sum(map(len, documents.values())) > 5_000_000


def test_library_files_that_are_not_utf8_are_skipped_and_counted(tmp_path, config, monkeypatch):
    for name, content in {
        "good.py": b"x = 1\n",
        "latin.py": b"# \xe9\n",
        "test/test_x.py": b"pass\n",
    }.items():
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    documents = open_source(config("python-library")).read()
    assert documents.skipped == 1
    assert [name for name in documents.dataset["name"] if "#" not in name] == ["good.py"]


# ------------------------------------------------------------------------------------------------ bad input


def test_missing_empty_and_unknown(tmp_path, config):
    assert "absent.txt: no such file or folder" in refusal(config(tmp_path / "absent.txt"))
    (tmp_path / "empty.txt").touch()
    assert "empty.txt: the file is empty" in refusal(config(tmp_path / "empty.txt"))
    (tmp_path / "picture.png").write_bytes(b"png")
    message = refusal(config(tmp_path / "picture.png"))
    assert all(ending in message for ending in KINDS)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "picture.png").write_bytes(b"png")
    (tmp_path / "folder" / "empty.txt").touch()
    assert "folder: the folder holds no text" in refusal(config(tmp_path / "folder"))


def test_bytes_that_are_not_utf8(tmp_path, config):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "good.txt").write_text("good")
    (folder / "latin.txt").write_bytes("na\u00efve".encode("latin-1"))
    message = refusal(config(folder))
    assert f"{folder / 'latin.txt'}: not UTF-8 (byte 0xef at offset 2)" in message
    assert "skip_bad" in message
    documents = open_source(config(folder, skip_bad=True)).read()
    assert (documents.dataset["text"][:], documents.skipped) == (["good"], 1)


def test_damaged_gzip(tmp_path, config):
    whole = gzip.compress(json.dumps({"text": "x" * 1000}).encode() * 3)
    for name in ("bad.txt.gz", "bad.jsonl.gz"):
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        assert f"{name}" in refusal(config(tmp_path / name))
        (tmp_path / name).write_bytes(b"not gzip at all")
        assert "damaged gzip file" in refusal(config(tmp_path / name))


BAD_LINES = [
    (b'{"text": "cut off', "not valid JSON"),
    (b'{"text": "a" "b"}', "not valid JSON (Expecting ',' delimiter at column 14)"),
    (b'["text"]', "holds a list; each line must hold one JSON object"),
    (b'{"body": "x", "id": 3}', "no text column 'text'; the columns are 'body', 'id'"),
    (b'{"text": 7}', "text column 'text' holds a number, not a string"),
    (b'{"text": null}', "text column 'text' holds null, not a string"),
    (b'{"text": {"a": "b"}}', "text column 'text' holds an object, not a string"),
    (b'{"text": "\xff"}', "not UTF-8 (byte 0xff at offset 10 of the line)"),
    (b'{"text": "\\ud800"}', "half a surrogate pair"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[line for _, line in BAD_LINES])
def test_bad_json_lines_are_named_or_skipped(tmp_path, config, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "first"}\n\n{"text": "second"}\n' + line + b'\n{"text": "last"}\n')
    message = refusal(config(path))
    assert f"{path}, line 4: " in message
    assert reason in message
    assert "skip_bad" in message
    documents = open_source(config(path, skip_bad=True)).read()
    assert documents.dataset["text"][:] == ["first", "second", "last"]
    assert documents.dataset["name"][:] == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:5"]
    assert documents.skipped == 1


def test_a_wrong_text_column_is_refused_even_when_skipping(tmp_path, config):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"body": "x"}] * 3)
    for skip_bad in (False, True):
        message = refusal(config(path, skip_bad=skip_bad))
        assert "line 1: no text column 'text'; the columns are 'body'; choose one with text_column" in message
    path = write_parquet(tmp_path / "rows.parquet", {"body": ["x"], "n": [1]})
    for skip_bad in (False, True):
        message = refusal(config(path, skip_bad=skip_bad))
        assert "no text column 'text'; the columns are 'body', 'n'" in message
    assert "holds int64, not strings" in refusal(config(path, text_column="n"))


def test_parquet_nulls_and_damage(tmp_path, config):
    path = write_parquet(tmp_path / "rows.parquet", {"text": ["a", None, "c", None]})
    assert f"{path}, row 2: text column 'text' is null" in refusal(config(path))
    documents = open_source(config(path, skip_bad=True)).read()
    assert (documents.dataset["text"][:], documents.skipped) == (["a", "c"], 2)
    path.write_bytes(b"PAR1 but not really")
    assert f"{path}: not a readable parquet file" in refusal(config(path))


def test_a_cache_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "one.txt").write_text("text")
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    for name in ("one.txt", "rows.jsonl"):
        message = refusal(DataConfig(data=str(tmp_path / name), cache_dir=str(tmp_path / "file")))
        assert "choose another cache_dir" in message


# --------------------------------------------------------------------------------------------- hub datasets


def test_an_unreachable_hub(config):
    for streaming in (False, True):
        message = refusal(config("hf:nobody/nothing:en", streaming=streaming))
        assert "hf:nobody/nothing:en (split 'train') cannot be loaded" in message
        assert "hf:owner/name[:config]" in message


def test_hub_names_reach_datasets_whole(config, monkeypatch):
    calls = []

    def load_dataset(*names, **options):
        calls.append((names, options))
        return datasets.Dataset.from_dict({"body": ["x", "y"], "url": ["u", "v"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = read(config("hf:allenai/c4:en", split="validation", text_column="body"))
    assert calls == [(("allenai/c4", "en"), {"split": "validation", "streaming": False})]
    assert documents == [("hf:allenai/c4:en:1", "x"), ("hf:allenai/c4:en:2", "y")]
    assert "the columns are 'body', 'url'" in refusal(config("hf:a/b"))


# -------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"validation_fraction": 0.0}, "validation_fraction=0.0 must be a number in (0, 1)"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0 must be a number in (0, 1)"),
        ({"validation_fraction": float("nan")}, "validation_fraction=nan must be a number in (0, 1)"),
        ({"block_size": 1}, "block_size=1 must be a whole number from 2 to 16777216"),
        ({"tokenizer_vocab_size": 258}, "tokenizer_vocab_size=258 is too small"),
        ({"max_documents": 0}, "max_documents=0 must be a whole number of at least 1"),
        ({"max_validation_documents": 0}, "max_validation_documents=0 must be a whole number of at least 1"),
        ({"max_tokenizer_documents": -1}, "max_tokenizer_documents=-1 must be a whole number of at least 1"),
        ({"shuffle_buffer": -1}, "shuffle_buffer=-1 must be a whole number of at least 0"),
        ({"data": ""}, "data is empty"),
        ({"data": "hf:"}, "data='hf:' is not a hub dataset"),
        ({"data": "hf:a/b/c"}, "is not a hub dataset"),
        ({"validation_data": "hf:a b"}, "validation_data='hf:a b' is not a hub dataset"),
        ({"streaming": True}, "streaming is for files, folders and hub datasets"),
    ],
)
def test_configurations_that_cannot_work(fields, message):
    with pytest.raises(ConfigError) as caught:
        DataConfig(**fields)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, CrossLayerError)


def test_all_mistakes_are_reported_together():
    with pytest.raises(ConfigError, match=r"validation_fraction=2.*block_size=0"):
        DataConfig(validation_fraction=2, block_size=0)


def test_an_existing_tokenizer_makes_the_trained_size_irrelevant():
    assert DataConfig(tokenizer="somewhere", tokenizer_vocab_size=10).tokenizer_vocab_size == 10
