"""Whatever is in a file or stands after an option, nothing but our own errors comes out (hypothesis)."""

import csv
import io
import json
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from crosslayer.cli.common import parse_overrides
from crosslayer.data import DataConfig, TaskConfig, load_documents, load_task
from crosslayer.data.cutting import cut_long_text
from crosslayer.data.split import goes_to_validation, validation_digests
from crosslayer.errors import ConfigError, CrossLayerError
from crosslayer.train import build_finetune_recipe, build_recipe, load_recipe
from crosslayer.train.recipe import FinetuneRecipe, Recipe, field_types
from crosslayer.train.run import build_arguments, build_model_config
from property_cases import cases, long_enough

FAST = cases(150)
pytestmark = long_enough


@pytest.fixture(autouse=True)
def no_deprecation_logged():
    """Drawn values may well be deprecated ones."""


texts = st.text(max_size=30)
looks = st.sampled_from(
    [
        "null",
        "NA",
        "no",
        "007",
        "1984",
        "1e3",
        "2024-01-01",
        "2024-99-99",
        "12:30",
        "0b",
        "~",
        "#1",
        "[1]",
        "*.txt",
        "- a",
        "a: b",
        "a #b",
        "'q",
        '"',
        "\ufeff",
        "\ud800",
        "\x00",
        "nan",
        ".inf",
        "-5",
        "",
        " ",
        "&a",
        "!x",
        "{}",
        "9" * 5000,
    ]
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, looks)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=5
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | looks,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "text"]), inner),
    max_leaves=6,
)
columns = st.sampled_from(["text", "label", "messages", "prompt", "completion", "instruction", "output", "input", "x"])
rows = st.lists(st.dictionaries(columns, json_values, max_size=4), max_size=6)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def ours(call):
    """The result, or None when the call ends with an error of ours."""
    try:
        return call()
    except CrossLayerError:
        return None


# ------------------------------------------------------------------------------------------------------ readers

ENDINGS = [".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet"]
TASK_ENDINGS = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".csv.gz", ".jsonl.gz"]


@FAST
@given(content=st.binary(max_size=200), ending=st.sampled_from(ENDINGS), skip_bad=st.booleans())
def test_any_bytes_as_documents(folder, content, ending, skip_bad):
    path = folder / f"any{ending}"
    path.write_bytes(content)
    ours(lambda: load_documents(DataConfig(data=str(path), cache_dir=str(folder / "cache"), skip_bad=skip_bad)))


@FAST
@given(content=st.binary(max_size=200), ending=st.sampled_from(TASK_ENDINGS))
def test_any_bytes_as_rows(folder, content, ending):
    path = folder / f"rows{ending}"
    path.write_bytes(content)
    ours(lambda: load_task(TaskConfig(data=str(path), task="classification", validation_data=str(path))))


@FAST
@given(content=rows, task=st.sampled_from([None, "classification", "regression", "instruction"]), whole=st.booleans())
def test_any_json_as_a_task(folder, content, task, whole):
    path = folder / "rows.json"
    lines = json.dumps(content) if whole else "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(lines)
    loaded = ours(lambda: load_task(TaskConfig(data=str(path), task=task, validation_data=str(path))))
    if loaded is not None and loaded.kind != "instruction":
        assert list(loaded.train["text"]) == [row["text"] for row in content]


@FAST
@given(content=rows, skip_bad=st.booleans())
def test_any_json_as_documents(folder, content, skip_bad):
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    config = DataConfig(data=str(path), cache_dir=str(folder / "cache"), skip_bad=skip_bad)
    documents = ours(lambda: load_documents(config))
    if documents is not None and not skip_bad:
        assert list(documents["text"]) == [row["text"] for row in content]


cells = (texts | looks).filter(lambda text: "\ud800" not in text)


@FAST
@given(cells=st.lists(cells, min_size=2, max_size=8))
def test_a_csv_gives_back_what_was_written(folder, cells):
    path = folder / "cells.csv"
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL)
    writer.writerows([["text", "label"], *([cell, "ab"[i % 2]] for i, cell in enumerate(cells))])
    path.write_bytes(buffer.getvalue().encode("utf-8", "surrogatepass"))
    task = load_task(TaskConfig(data=str(path), task="classification", validation_data=str(path)))
    assert list(task.train["text"]) == cells


@FAST
@given(cells=st.lists(cells.filter(lambda text: not set("\t\n") & set(text)), min_size=2, max_size=8))
def test_a_tsv_gives_back_what_was_written(folder, cells):
    path = folder / "cells.tsv"
    lines = ["text\tlabel", *(f"{cell}\t{'ab'[i % 2]}" for i, cell in enumerate(cells))]
    path.write_bytes("\n".join(lines).encode())
    task = load_task(TaskConfig(data=str(path), task="classification", validation_data=str(path)))
    assert list(task.train["text"]) == cells


@FAST
@given(name=st.text(min_size=1, max_size=300) | looks)
def test_any_name_of_a_source(folder, name):
    for task in (None, "sst2"):
        if task is None:
            ours(lambda: load_documents(DataConfig(data="./" + name, cache_dir=str(folder / "cache"))))
        else:
            ours(lambda: load_task(TaskConfig(data="./" + name, task="sst2")))


@FAST
@given(text=st.text(alphabet="ab \n\r\u2028\x0c", max_size=300), repeat=st.integers(1, 400))
def test_cutting_loses_nothing(text, repeat):
    assert "".join(cut_long_text(text * repeat)) == text * repeat


@FAST
@given(digests=st.lists(st.binary(min_size=32, max_size=32), max_size=12), fraction=st.floats(1e-9, 1 - 1e-9))
def test_a_split_has_two_sides_and_is_the_fraction_s_where_that_is_one(digests, fraction):
    held_out = validation_digests(digests, fraction)
    by_fraction = {digest for digest in digests if goes_to_validation(digest, fraction)}
    if len(set(digests)) > 1:
        assert 0 < len(held_out) < len(set(digests))
    if 0 < len(by_fraction) < len(set(digests)):
        assert held_out == by_fraction


# ------------------------------------------------------------------------------------------------------ options

FIELDS = {kind: sorted({n for s in kind.SECTIONS for n in field_types(kind, s)}) for kind in (Recipe, FinetuneRecipe)}


@FAST
@given(kind=st.sampled_from([Recipe, FinetuneRecipe]), data=st.data())
def test_any_value_of_any_field(kind, data):
    section = data.draw(st.sampled_from(kind.SECTIONS))
    name = data.draw(st.sampled_from(sorted(field_types(kind, section))))
    content = {"name": "x", section: {name: data.draw(values)}}
    if kind is Recipe:
        ours(lambda: build_recipe(content))
    else:
        ours(lambda: build_finetune_recipe({"model": "m", **content}, {"task": "sst2"}))


@FAST
@given(kind=st.sampled_from([Recipe, FinetuneRecipe]), data=st.data())
def test_any_text_after_any_option(kind, data):
    name = data.draw(st.sampled_from(FIELDS[kind]))
    text = data.draw(texts | looks)
    build = build_recipe if kind is Recipe else build_finetune_recipe
    base = {"name": "x"} if kind is Recipe else {"name": "x", "model": "m", "data": {"task": "sst2"}}
    ours(lambda: build(base, parse_overrides([f"--{name}={text}"])))


plausible = st.sampled_from([True, False, 0, 1, 2, 3, 8, 0.5, 1e-3, 1e30, "no", "steps", "epoch", "eager", "x", [], {}])


@FAST
@given(data=st.data())
def test_any_recipe_gives_a_model_s_configuration_and_arguments(folder, data):
    """Several fields at once, each with a value that it might have: what they make of each other."""
    content = {
        "name": "x",
        "model": {"hidden_size": 32, "num_attention_heads": 2, "rank": 8},
        "training": {"use_cpu": True},
    }
    for _ in range(data.draw(st.integers(1, 4))):
        section = data.draw(st.sampled_from(["training", "model"]))
        name = data.draw(st.sampled_from(sorted(field_types(Recipe, section))))
        content[section][name] = data.draw(plausible | values)
    recipe = ours(lambda: build_recipe(content))
    if recipe is not None:
        ours(lambda: build_model_config(recipe))
        ours(lambda: build_arguments(recipe, folder / "run"))
        assert not (folder / "run").exists()


@FAST
@given(text=(texts | looks).filter(lambda text: text not in ("", "null", "Null", "NULL", "~")))
def test_text_stays_text(text):
    recipe = build_finetune_recipe(
        {"name": "x", "data": {"task": "sst2"}},
        parse_overrides(
            [f"--model={text}", f"--text_column={text}", f"--description={text}", f"--label_column={text}"]
        ),
    )
    assert recipe.model == recipe.description == recipe.data.text_column == recipe.data.label_column == text


@FAST
@given(
    content=st.text(max_size=60)
    | st.dictionaries(st.sampled_from(["name", "data", "training", "model"]), values).map(
        lambda content: yaml.dump(content)
    )
)
def test_any_recipe_file(folder, content):
    path = folder / "recipe.yaml"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    ours(lambda: load_recipe(path))


@FAST
@given(data=st.data())
def test_a_recipe_comes_back_from_its_file(folder, data):
    overrides = {
        "name": data.draw(st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,10}", fullmatch=True) | st.sampled_from(["no", "007"])),
        "description": data.draw(texts | looks),
        "data": data.draw((texts | looks).filter(lambda text: text and not text.startswith("hf:"))),
        "text_column": data.draw((texts | looks).filter(bool)),
    }
    recipe = build_recipe({"name": "x"}, overrides)
    recipe.save(folder / "saved.yaml")
    assert load_recipe(folder / "saved.yaml") == recipe


def test_an_error_that_is_not_ours_is_seen():
    """The check of this file can fail."""
    with pytest.raises(ZeroDivisionError):
        ours(lambda: 1 / 0)
    assert ours(lambda: (_ for _ in ()).throw(ConfigError("ours"))) is None
