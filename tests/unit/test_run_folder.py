"""The folder of a run, ended anywhere while it is made: it can be written again with the same command."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from crosslayer.train import run_folder
from crosslayer.train.run_folder import check_output_dir, prepare_output_dir, read_json
from tiny_run import tiny_recipe


@dataclass
class Plan:
    steps: int = 3


class End(BaseException):
    """As a Ctrl-C, or a kill."""


def ended_at(line, call):
    """Whether `call` reaches so many lines of the code under test; it ends before the last of them."""
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if Path(frame.f_code.co_filename).name not in ("run_folder.py", "recipe.py"):
            return None
        if event == "line":
            seen += 1
            if seen == line:
                raise End
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except End:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("overwrite", [False, True])
def test_ended_anywhere(tmp_path, monkeypatch, overwrite):
    recipe = tiny_recipe(tmp_path)
    monkeypatch.setattr(run_folder, "describe_run", lambda: {"command": "crosslayer"})
    lines = 0
    while True:
        lines += 1
        folder = tmp_path / f"run {lines}"
        if overwrite:
            prepare_output_dir(folder, recipe, Plan(), {}, overwrite=False)
            (folder / "checkpoint-1" / "deep").mkdir(parents=True)
            (folder / "checkpoint-1" / "weights").write_text("old")
        if not ended_at(lines, lambda: prepare_output_dir(folder, recipe, Plan(5), {}, overwrite=overwrite)):  # noqa: B023
            break
        check_output_dir(folder, resume=False, overwrite=True)
        if not (folder / "run.json").exists():
            check_output_dir(folder, resume=False, overwrite=False)
        prepare_output_dir(folder, recipe, Plan(7), {}, overwrite=True)
        assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "run.json"}
        assert read_json(folder / "run.json")["plan"] == {"steps": 7}
    assert lines > 10
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "run.json"}
