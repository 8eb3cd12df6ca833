"""Tasks: GLUE by name, own rows in three forms, metrics against plain formulas, and one clear line for bad rows."""

import gzip
import json
import math

import numpy as np
import pytest

from crosslayer.data import TaskConfig, load_task
from crosslayer.data.instructions import prompt_of
from crosslayer.data.tasks import GLUE
from crosslayer.errors import ConfigError, DataError
from crosslayer.evaluate.task_metrics import measure_task
from tiny_finetune import rows_of, write_rows, write_task


@pytest.fixture
def load(tmp_path):
    """load(rows, ...) -> task, from one file; keyword arguments are fields of TaskConfig."""

    def call(rows, validation=None, **settings):
        data = write_rows(tmp_path / "rows.jsonl", rows)
        if validation is not None:
            settings["validation_data"] = str(write_rows(tmp_path / "held.jsonl", validation))
        return load_task(TaskConfig(data=str(data), cache_dir=str(tmp_path / "cache"), **settings))

    return call


def test_glue_from_a_folder_or_the_folder_above(tmp_path):
    write_task(tmp_path / "sst2", train=6, validation=4)
    for data in (tmp_path, tmp_path / "sst2"):
        task = load_task(TaskConfig(task="glue/sst2", data=str(data), cache_dir=str(tmp_path / "cache")))
        assert (task.kind, task.labels, task.metrics) == ("classification", ("negative", "positive"), ("accuracy",))
        assert task.train.column_names == ["text", "label"]
        assert (len(task.train), len(task.validation)) == (6, 4)


def test_every_glue_task_reads_its_columns(tmp_path):
    for name, glue in GLUE.items():
        row = {column: f"some {column}" for column in glue.columns} | {"label": 0 if glue.labels else 2.5, "idx": 0}
        other = row | {"label": 1 if glue.labels else 4.0}
        write_rows(tmp_path / name / "train.jsonl", [row, other])
        write_rows(tmp_path / name / f"{glue.validation_split}.jsonl", [row, other])
        task = load_task(TaskConfig(task=name, data=str(tmp_path), cache_dir=str(tmp_path / "cache")))
        assert task.kind == ("regression" if name == "stsb" else "classification")
        assert ("text_pair" in task.train.column_names) == (len(glue.columns) == 2)


def test_csv_tsv_gz_and_parquet(tmp_path):
    import pandas

    frame = pandas.DataFrame(rows_of(10, 0))
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows_of(10, 0))
    for name in ("a.csv", "a.tsv", "a.parquet", "a.jsonl.gz"):
        task = load_task(TaskConfig(data=str(tmp_path / name), cache_dir=str(tmp_path / "cache")))
        assert (len(task.train), len(task.validation)) == (9, 1), name
        assert task.kind == "classification"


def test_own_classes_by_number_or_name(load):
    numbered = load([{"text": "a", "label": 0}, {"text": "b", "label": 2}], [{"text": "c", "label": 1}])
    assert numbered.labels == ("0", "1", "2")
    named = load([{"text": "a", "label": "no"}, {"text": "b", "label": "yes"}], [{"text": "c", "label": "yes"}])
    assert named.labels == ("no", "yes")
    assert named.validation[0] == {"text": "c", "label": 1}
    assert load([{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}]).kind == "regression"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"prompt": prompt_of("Add.", "1 2"), "completion": "3"},
    ],
)
def test_forms_of_instructions(load, row):
    task = load([row] * 10)
    assert task.kind == "instruction"
    assert task.train[0] == {
        "prompt": "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
        "completion": "3",
    }


def test_conversations(load):
    turns = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}]
    task = load([{"messages": turns}] * 4)
    assert task.train[0] == {"prompt": turns[:1], "completion": turns[1:]}


def test_a_subset_is_drawn_by_its_seed(load):
    rows = [{"text": f"t{index}", "label": index % 2} for index in range(40)]
    drawn = [load(rows, max_train_rows=8, seed=seed).train["text"][:] for seed in (0, 0, 1)]
    assert list(drawn[0]) == list(drawn[1]) != list(drawn[2])


GOOD = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]


@pytest.mark.parametrize(
    ("rows", "validation", "settings", "message"),
    [
        ([{"body": "a", "label": 0}], GOOD, {}, r"\(train\): no column 'text'; the columns are 'body', 'label'"),
        (GOOD, [{"text": "a"}], {}, r"\(validation\): no column 'label'"),
        (GOOD, [{"text": "a", "label": 2}], {}, r"\(validation\), column 'label', row 1: label 2 is out of range"),
        ([*GOOD, {"text": "c", "label": -1}], GOOD, {}, "row 3: label -1 is out of range; allowed are 0 to 1"),
        ([*GOOD, {"text": "c", "label": 5}], GOOD, {"num_labels": 2}, "row 3: label 5 is out of range"),
        ([*GOOD, {"text": "c", "label": None}], GOOD, {}, "row 3: label None is out of range"),
        ([*GOOD, {"text": None, "label": 1}], GOOD, {}, "row 3: column 'text' holds None, not text"),
        ([{"text": "a", "label": 0}] * 2, GOOD[:1], {}, "one class only"),
        ([{"text": "a", "label": "x"}] * 2, None, {"task": "regression"}, "row 2: 'x' is not a finite number"),
        ([{"a": 1}], GOOD, {}, "are no task"),
        ([{"a": 1}] * 3, None, {"task": "instruction"}, "are no instruction data"),
        ([{"instruction": "a", "output": ""}] * 3, None, {}, "column 'output' holds '', not text"),
        ([{"messages": [{"role": "user", "content": "a"}]}] * 3, None, {}, "must end with an answer"),
        (GOOD[:1], None, {}, "one row cannot be split"),
        ([], GOOD, {}, "the file is empty"),
    ],
)
def test_bad_rows(load, rows, validation, settings, message):
    with pytest.raises(DataError, match=message):
        load(rows, validation, **settings)


def test_bad_sources(tmp_path):
    (tmp_path / "text.pdf").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jsonl").write_text('{"text": \n')
    for source, message in (
        ("missing.jsonl", "no such file or folder"),
        ("text.pdf", "unknown kind of file"),
        ("empty", "no train.jsonl"),
        ("broken.jsonl", "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            load_task(TaskConfig(data=str(tmp_path / source), cache_dir=str(tmp_path / "cache")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "sst"}, "task='sst' is none of .*; the nearest is sst2"),
        ({}, "give a GLUE task"),
        ({"task": "regression"}, "give a GLUE task"),
        ({"task": "rte", "max_length": 1}, "max_length=1 must be a whole number from 2 to"),
        ({"data": "x", "validation_fraction": 1.0}, r"in \(0, 1\)"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        TaskConfig(**settings)


def test_metrics_against_their_formulas():
    labels, predictions = np.array([0, 0, 1, 1, 1, 0, 1]), np.array([0, 1, 1, 1, 0, 0, 1])
    tp, tn, fp, fn = 3, 2, 1, 1
    found = measure_task(("accuracy", "f1", "matthews_correlation"), predictions, labels)
    assert found["accuracy"] == pytest.approx(5 / 7)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    mcc = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found["matthews_correlation"] == pytest.approx(mcc)
    x, y = np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.0, 3.0, 9.0, 8.0])
    found = measure_task(("pearson", "spearman"), x, y)
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] < 0.999  # the two are not one


def test_constant_predictions_and_unknown_metrics():
    assert measure_task(("pearson",), np.zeros(3), np.arange(3.0)) == {"pearson": 0.0}
    assert measure_task(("matthews_correlation",), np.zeros(3), np.array([0, 1, 1])) == {"matthews_correlation": 0.0}
    with pytest.raises(ConfigError, match="'rouge' is none of"):
        measure_task(("rouge",), np.zeros(3), np.zeros(3))
