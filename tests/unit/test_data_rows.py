"""Rows of tasks, read as they are: texts that look like something else, quotes, places in the file, conversations."""

import csv
import gzip
import json
import os

import datasets
import pytest
from test_data_files import ODD_NAMES

from crosslayer.data import TaskConfig, load_task
from crosslayer.errors import DataError
from tiny_finetune import write_rows

NO_GZIP = b"not gzip"


@pytest.fixture
def load(tmp_path):
    """load(content, name, ...) -> task, the file also being the validation data."""

    def call(content, name="rows.csv", **settings):
        path = tmp_path / name
        content = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") and content != NO_GZIP else content)
        settings.setdefault("validation_data", str(path))
        return load_task(TaskConfig(data=str(path), cache_dir=str(tmp_path / "cache"), **settings))

    return call


def texts(task):
    return list(task.train["text"])


LOOKALIKES = ["null", "NA", "N/A", "nan", "None", "1984", "1e5", "true", "007", "2020-01-01", "#N/A", " padded ", "-"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.tsv.gz"])
def test_texts_stay_texts(load, name):
    separator = "," if "csv" in name else "\t"
    lines = "".join(f"{text}{separator}{'xy'[i % 2]}\n" for i, text in enumerate(LOOKALIKES))
    assert texts(load(f"text{separator}label\n{lines}", name)) == LOOKALIKES
    assert texts(load(f"text{separator}label\n1{separator}x\n2{separator}y\n", name)) == ["1", "2"]


def test_labels_of_a_csv(load):
    def labels(*values, **settings):
        task = load("text,label\n" + "".join(f"t,{value}\n" for value in values), **settings)
        return task.kind, task.labels, list(task.train["label"])

    assert labels("NA", "EU") == ("classification", ("EU", "NA"), [1, 0])
    assert labels("0", "2", "1") == ("classification", ("0", "1", "2"), [0, 2, 1])
    assert labels("007", "008") == ("classification", ("007", "008"), [0, 1])
    assert labels("1", "2.5") == ("regression", (), [1.0, 2.5])
    assert labels("1", "2", task="regression") == ("regression", (), [1.0, 2.0])
    with pytest.raises(DataError, match=r"row 2 \(line 3\): the label is empty"):
        labels("a", "")
    with pytest.raises(DataError, match=r"row 2 \(line 3\): 'nan' is not a finite number"):
        labels("1.5", "nan", task="regression")
    with pytest.raises(DataError, match=r"label 999999999 would make 1000000000 classes"):
        labels("0", "999999999")


def test_quotes_in_a_tsv_are_text_and_in_a_csv_are_quotes(load):
    lines = ['"A bad film', 'it was "great"', '"quoted"', "it's"]
    tsv = "sentence\tlabel\n" + "".join(f"{line}\t{i % 2}\r\n" for i, line in enumerate(lines))
    assert texts(load(tsv, "a.tsv", task="sst2")) == lines
    assert texts(load('text,label\n"a, ""b""\r\nc",0\nd,1\n\n')) == ['a, "b"\r\nc', "d"]
    long = "x" * 200_000  # beyond the csv module's own limit, which is left as it was
    before = csv.field_size_limit()
    assert texts(load(f"text,label\n{long},0\nb,1\n")) == [long, "b"]
    assert csv.field_size_limit() == before
    assert texts(load("text,label\ra,0\rb,1\r")) == ["a", "b"]  # line ends of old


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.csv.gz"])
def test_byte_order_marks_are_skipped(load, name):
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    separator = "," if "csv" in name else "\t"
    table = f"text{separator}label\n" + "".join(f"{row['text']}{separator}{row['label']}\n" for row in rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    content = {"jsonl": lines, "json": json.dumps(rows)}.get(name.partition(".")[2], table)
    assert texts(load(b"\xef\xbb\xbf" + content.encode(), name)) == ["a", "b"]


def test_json_in_its_two_forms(load):
    rows = [{"text": "a", "label": 0, "extra": 1}, {"text": "b", "label": 1, "extra": {"x": ["mixed"]}}]
    for content in (json.dumps(rows), json.dumps(rows, indent=2), "\n".join(map(json.dumps, rows))):
        for name in ("a.json", "a.jsonl", "a.json.gz"):
            assert texts(load(content, name)) == ["a", "b"]
    with pytest.raises(DataError, match="must be a list of objects, or one object a line"):
        load("[{]", "a.json")
    with pytest.raises(DataError, match="row 2: cannot be read: holds a number"):
        load('[{"text": "a"}, 3]', "a.json")


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_the_file_that_was_named_is_read_and_no_other(tmp_path, load, name):
    for ending in (".jsonl", ".csv"):
        for other in ("part1", "abc", "whatx", "a", "b", "two words"):
            (tmp_path / f"{other}{ending}").write_text("text,label\nother,0\nother,1\n")
    assert texts(load('{"text": "mine", "label": 0}\n{"text": "mine", "label": 1}', f"{name}.jsonl")) == ["mine"] * 2
    assert texts(load("text,label\nmine,0\nmine,1\n", f"{name}.csv")) == ["mine"] * 2
    (tmp_path / f"folder{name}").mkdir()
    for split in ("train", "validation"):
        (tmp_path / f"folder{name}" / f"{split}.csv").write_text("text,label\nmine,0\nmine,1\n")
    assert texts(load_task(TaskConfig(data=str(tmp_path / f"folder{name}")))) == ["mine"] * 2


def test_a_changed_file_is_read_again_whatever_its_time(load, tmp_path):
    for word in ("old", "new"):
        task = load(f"text,label\n{word},0\n{word},1\n")
        os.utime(tmp_path / "rows.csv", (1, 1))
        assert texts(task) == [word] * 2
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"text,label\na,0\nna\xefve,1\n", "a.csv", r"a.csv, line 3: not UTF-8 \(byte 0xef at offset 2 of the line\)"),
        (b"text\tlabel\na\t0\nna\xefve\t1\n", "a.tsv", "a.tsv, line 3: not UTF-8"),
        (b'{"text": "a", "label": 0}\n\n{"text": "\xef", "label": 1}\n', "a.jsonl", "a.jsonl, row 3: .*not UTF-8"),
        ("text,label\na,0\nb,1,c\n", "a.csv", r"row 2 \(line 3\): has 3 fields, the header 2"),
        ("text,label\n\na,0\n\nb\n", "a.csv", r"row 2 \(line 5\): has 1 fields"),
        ('text,label\na,0\n"b,1\n', "a.csv", "line 3: cannot be read"),
        ('text,label\na,0\n"b"c,1\n', "a.csv", "line 3: cannot be read"),
        ("text,text,label\n", "a.csv", "the header names the column 'text' twice"),
        ("text,label\n", "a.csv", "the split is empty"),
        ('{"text": "\\ud800", "label": 0}\n', "a.jsonl", "row 1: column 'text' holds half a surrogate pair"),
        ('{"messages": [{"role": "\\ud800"}]}\n', "a.jsonl", "row 1: column 'messages' holds half a surrogate pair"),
        ("[" * 100_000, "a.json", "a.json: cannot be read"),
        (NO_GZIP, "a.csv.gz", "damaged gzip file"),
        (b"PAR1", "a.parquet", "a.parquet: cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(load, content, name, message):
    with pytest.raises(DataError, match=message) as caught:
        load(content, name, task="classification")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_named_by_their_place_in_the_file(tmp_path, seed):
    """Whatever was drawn, shuffled and held out before."""
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(40)]
    rows[30]["text"] = rows[33]["text"] = None
    data = write_rows(tmp_path / "rows.jsonl", rows)
    data.write_text("\n\n" + data.read_text())
    with pytest.raises(DataError, match=r"row 3[36]: column 'text' holds None"):
        load_task(TaskConfig(data=str(data), seed=seed))


def test_a_part_for_validation_never_takes_all_or_none(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(3)])
    for fraction, expected in ((1e-9, 1), (0.5, 2), (0.999, 2)):
        task = load_task(TaskConfig(data=str(data), validation_fraction=fraction, num_labels=2))
        assert (len(task.train), len(task.validation)) == (3 - expected, expected)


def test_the_draw_is_that_of_datasets(tmp_path):
    """Runs of earlier versions are repeated by the same seed."""
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(50)]
    task = load_task(TaskConfig(data=str(write_rows(tmp_path / "r.jsonl", rows)), max_train_rows=20, seed=5))
    parts = datasets.Dataset.from_list(rows).train_test_split(test_size=0.1, seed=5)
    assert list(task.train["text"]) == list(parts["train"].shuffle(seed=5).select(range(20))["text"])
    assert list(task.validation["text"]) == list(parts["test"]["text"])


# ------------------------------------------------------------------------------------------------ conversations


def say(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_every_answer_of_a_conversation_is_trained(load):
    row = say(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    task = load(json.dumps(row), "a.jsonl")
    turns = row["messages"]
    assert list(task.train) == [
        {"prompt": turns[:2], "completion": turns[2:3]},
        {"prompt": turns[:4], "completion": turns[4:]},
    ]


def test_an_answer_to_nothing_is_said_to_be_left_out(load, caplog):
    row = say(("assistant", "hello"), ("user", "a"), ("assistant", "b"))
    task = load(json.dumps(row), "a.jsonl")
    assert list(task.train["completion"]) == [row["messages"][2:]]
    assert "1 of 1 conversations begin with an answer" in caplog.text


def test_parts_of_contents_are_joined(load):
    parts = [{"type": "text", "text": "go"}, "od"]
    task = load(json.dumps(say(("user", "hi"), ("assistant", parts))), "a.jsonl")
    assert task.train[0]["completion"] == [{"role": "assistant", "content": "good"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (say(("user", "a"), ("assistant", None)), r"row 1, message 2 \(assistant\): content is None, not text"),
        (say(("user", ""), ("assistant", "b")), r"message 1 \(user\): content is '', not text"),
        (say(("user", "a"), ("assistant", [])), "content is '', not text"),
        (say(("user", "a"), ("assistant", " \n")), "not text"),
        (say(("user", "a"), ("assistant", 7)), "content is 7, not text"),
        (say(("user", [{"type": "image", "url": "x"}]), ("assistant", "b")), "a part that is no text"),
        (say(("user", [{"type": "text", "text": None}]), ("assistant", "b")), "a part that is no text"),
        (say((None, "a"), ("assistant", "b")), "message 1: role is None"),
        ({"messages": None}, "messages must be a list of objects"),
        ({"messages": "hi"}, "messages must be a list of objects"),
        ({"messages": ["hi", "ho"]}, "messages must be a list of objects"),
        ({"messages": []}, "must end with an answer"),
        ({"prompt": "a", "completion": None}, "column 'completion' holds None, not text"),
        ({"prompt": " ", "completion": "b"}, "column 'prompt' holds ' ', not text"),
        ({"instruction": "a", "input": 3, "output": "b"}, "column 'input' holds 3, not text"),
    ],
)
def test_contents_are_checked(load, row, message):
    with pytest.raises(DataError, match=message):
        load(json.dumps(row), "a.jsonl")
