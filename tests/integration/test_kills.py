"""Runs that are killed at random moments, again and again, end in the weights of a run that was left alone."""

import json
import random
import subprocess
import sys
import time

import pytest
import yaml
from safetensors.torch import load_file

from crosslayer.train.run import pretrain
from tiny_run import tiny_content, tiny_recipe

KILLS = 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_moments(tmp_path):
    settings = {"max_steps": 60, "save_steps": 4, "logging_steps": 2, "eval_steps": 30}
    pretrain(tiny_recipe(tmp_path, **settings), tmp_path / "whole")
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(tiny_content(tmp_path, **settings)))
    command = [sys.executable, "-m", "crosslayer", "pretrain", "--recipe", str(recipe), "--output_dir", str(run)]
    rng, kills = random.Random(0), 0
    while True:
        resume = ["--resume"] if (run / "run.json").is_file() else []
        process = subprocess.Popen([*command, *resume], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if kills < KILLS:
            seen = set(run.glob("checkpoint-*/trainer_state.json"))
            while process.poll() is None and set(run.glob("checkpoint-*/trainer_state.json")) <= seen:
                time.sleep(0.01)
            time.sleep(rng.random() * 0.5)
            process.kill()
            kills += 1
        output, _ = process.communicate(timeout=300)
        if process.returncode == 0:
            break
        assert process.returncode < 0, output
    assert kills == KILLS
    report = json.loads((run / "report.json").read_text())
    assert report["steps"] == 60
    weights, expected = (load_file(folder / "model" / "model.safetensors") for folder in (run, tmp_path / "whole"))
    assert weights.keys() == expected.keys()
    assert all((weights[name] == tensor).all() for name, tensor in expected.items())
