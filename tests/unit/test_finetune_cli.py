"""`crosslayer finetune`: what it prints, its exit codes, and one clear line for every wrong input."""

import json
import sys
import types

import pytest

from crosslayer.cli import main
from tiny_finetune import rows_of, write_encoder, write_rows, write_task


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("finetune-cli")
    write_encoder(root / "encoder")
    write_task(root / "sst2", train=16, validation=8)
    return root


@pytest.fixture
def run(monkeypatch, capsys, root):
    """run("--method", "lora") -> exit code, standard output, standard error of `crosslayer finetune`."""

    def call(*arguments, model=None, data=None):
        given = ["--model", model or root / "encoder", "--data", data or root / "sst2", "--cache_dir", root / "cache"]
        given += ["--use_cpu", "--disable_tqdm", "--num_train_epochs", "1", *arguments]
        monkeypatch.setattr(sys, "argv", ["crosslayer", "finetune", *map(str, given)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return types.SimpleNamespace(code=stopped.value.code or 0, out=out, err=err)

    return call


def test_plan_table_and_paths(run, root):
    result = run("--task", "sst2", "--method", "mergelor2c", "--output_dir", root / "shown")
    assert result.code == 0, result.err
    for part in ("trains 2,048 adapter", "accuracy", "trainable parameters", "fuse blocks", "peak"):
        assert part in result.out
    for name in ("adapter", "structure.png", "report.md"):
        assert str(root / "shown" / name) in result.out


def test_json_is_all_of_standard_output(run, root):
    result = run("--task", "sst2", "--method", "lora", "--r", "2", "--output_dir", root / "as-json", "--json")
    assert result.code == 0, result.err
    content = json.loads(result.out)
    assert content["plan"]["method"] == "lora"
    assert content["trained"]["adapter"] == 4 * 2 * 2 * 32 * 2
    plan = run("--task", "sst2", "--dry-run", "--json", "--output_dir", root / "dry")
    assert json.loads(plan.out)["trained"]["adapter"] == 4 * 2 * 32 * 8
    assert not (root / "dry").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--task", "sst"), ("task='sst'", "the nearest is sst2")),
        (("--task", "sst2", "--method", "lorc"), ("method='lorc'", "the nearest is")),
        (("--task", "sst2", "--text_colum", "x"), ("text_colum", "the nearest is text_column")),
        (("--task", "classification", "--text_column", "body"), ("no column 'body'", "'sentence'")),
        (("--task", "sst2", "--validation_split", "test"), ("no test.jsonl", "train.jsonl")),
        (("--task", "sst2", "--target_modules", "nothing"), ("nothing",)),
        (("--task", "sst2", "--method", "imlor2c", "--max_fuses", "9"), ("max_fuses=9",)),
        (("--task", "sst2", "--criterion", "sfss", "--method", "imlor2c"), ("criterion='sfss'",)),
        (("--task", "sst2", "--learning_rate", "fast"), ("learning_rate='fast'",)),
        (("--task", "sst2", "--resume"), ("no run to resume",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) and value[0].startswith("--") else None,
)
def test_wrong_input_is_one_line_and_leaves_nothing(run, root, arguments, parts):
    result = run(*arguments, "--output_dir", root / "refused")
    assert result.code == 2, result.err
    assert result.out == ""
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("crosslayer: error: ")
    for part in parts:
        assert part in lines[0]
    assert not (root / "refused").exists()


def test_wrong_files_are_refused(run, root):
    out_of_range = write_rows(root / "bad" / "train.jsonl", [*rows_of(4, 0), {"sentence": "x", "label": 7, "idx": 9}])
    write_rows(root / "bad" / "validation.jsonl", rows_of(4, 1))
    for arguments, part in (
        ({"data": out_of_range.parent}, "row 5: label 7 is out of range; allowed are 0 to 1"),
        ({"data": root / "nowhere"}, "no such file or folder"),
        ({"model": root / "no-model"}, "no-model"),
        ({"model": root / "sst2"}, "is not a model"),
    ):
        result = run("--task", "sst2", "--output_dir", root / "refused", **arguments)
        assert result.code == 2, result.err
        assert part in result.err
        assert not (root / "refused").exists()


def test_a_folder_with_other_files_is_not_touched(run, root):
    result = run("--task", "sst2", "--output_dir", root / "sst2")
    assert result.code == 2
    assert "not of a run" in result.err
