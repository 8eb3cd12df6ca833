"""Ctrl-C in every verb: gone within two seconds, its workers too, with one line that names what goes on."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

import tiny_finetune
from crosslayer.cli import interrupt
from crosslayer.train.run import pretrain
from tiny_run import tiny_content, tiny_recipe

pytestmark = pytest.mark.slow

MAIN = [sys.executable, "-m", "crosslayer"]
LONG = {"max_steps": 100_000, "save_steps": 50, "eval_steps": 100, "logging_steps": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("interrupt")
    (root / "recipe.yaml").write_text(yaml.safe_dump(tiny_content(root, **LONG)))
    pretrain(tiny_recipe(root, max_steps=4), root / "run")
    encoder, task = tiny_finetune.write_encoder(root / "encoder"), tiny_finetune.write_task(root / "sst2")
    content = tiny_finetune.tiny_content(root, encoder, task, num_train_epochs=9000)
    (root / "finetune.yaml").write_text(yaml.safe_dump(content))
    return root


def end_of(root, arguments, until, to="group"):
    """Start a verb, press Ctrl-C when `until` (a text in its output, or seconds) has come: its last words."""
    log = root / "output"
    with log.open("wb") as output:
        process = subprocess.Popen([*MAIN, *arguments], cwd=root, stdout=output, stderr=output, start_new_session=True)
    try:
        started = time.monotonic()
        while until not in log.read_text() if isinstance(until, str) else time.monotonic() - started < until:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() - started < 200, log.read_text()
            time.sleep(0.02)
        workers = psutil.Process(process.pid).children(recursive=True)
        pressed = time.monotonic()
        if to == "group":  # as a terminal does
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        process.wait(20)
        took = time.monotonic() - pressed
        psutil.wait_procs(workers, timeout=1)
    finally:
        left = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for each in left:
            each.kill()
        process.kill()
    text = log.read_text()
    assert process.returncode == 1, text
    assert took < 2, f"{took:.2f} s\n{text}"
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE], text
    assert "Traceback" not in text
    assert "Warning" not in text
    *_, last = lines = text.splitlines()
    assert last.startswith("crosslayer: error: interrupted"), text
    assert [line for line in lines if "error" in line] == [last]
    return last


def test_pretrain_names_the_command_that_goes_on(root):
    start = ("pretrain", "--recipe", "recipe.yaml", "--output_dir", "a run", "--overwrite")
    last = end_of(root, start, "step 60/")
    assert "interrupted at step 6" in last
    assert "the last good checkpoint is a run/checkpoint-50" in last
    command = "to go on: crosslayer pretrain --recipe recipe.yaml --output_dir 'a run' --resume"
    assert last.endswith(command)
    # It does go on, and the same command goes on from there.
    again = end_of(root, ("pretrain", "--recipe", "recipe.yaml", "--output_dir", "a run", "--resume"), "step 70/")
    assert again.endswith(command)
    # What was there before is not this run's.
    assert "to go on" not in end_of(root, start, 1.0)


def test_pretrain_with_loaders(root):
    arguments = ("pretrain", "--recipe", "recipe.yaml", "--output_dir", "loaders", "--dataloader_num_workers", "2")
    end_of(root, arguments, "step 5/", to="main process alone")


@pytest.mark.parametrize("seconds", [0.1, 0.4, 1.5, 3.0])
def test_at_the_start(root, seconds):
    """While Python, typer, torch or transformers are loaded."""
    assert end_of(root, ("pretrain", "--recipe", "recipe.yaml", "--output_dir", "early"), seconds).count(";") == 0


def test_finetune(root):
    last = end_of(root, ("finetune", "--recipe", "finetune.yaml", "--output_dir", "tuned"), "step 10/")
    assert last.endswith("to go on: crosslayer finetune --recipe finetune.yaml --output_dir tuned --resume")


@pytest.mark.parametrize("until", [6.0, "steps: "], ids=["workers start", "a run has ended"])
@pytest.mark.parametrize("to", ["group", "main process alone"])
def test_compare_and_its_workers(root, until, to):
    small = ("--workers", "2", "--max_steps", "400", "--tuning_steps", "4", "--tuning_runs", "2")
    last = end_of(root, ("compare", "--recipe", "recipe.yaml", "--output_dir", "c", "--overwrite", *small), until, to)
    assert isinstance(until, float) or last.endswith(f"--output_dir c {' '.join(small)} --resume")


@pytest.mark.parametrize(
    ("arguments", "until"),
    [
        (("evaluate", "run", "--batch_size", "1"), "evaluating"),
        (("analyze", "run", "--batch_size", "1", "--max_tokens", "500000", "--block_size", "32"), "analyzing"),
        (("generate", "run", "--prompt", "the", "--max_new_tokens", "1000", "--temperature", "0"), 5.0),
        (("bench", "speed", "--turns", "10000"), 7.0),
        (("bench", "memory", "--layers", "4,64"), 5.0),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_the_other_verbs(root, arguments, until):
    end_of(root, arguments, until)


STUCK = """
import sys, threading, time
from crosslayer.cli import interrupt
sys.argv = ["crosslayer", "evaluate"]
interrupt.watch()
{}
print("ready", flush=True)
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
"""


@pytest.mark.parametrize("waits", ["", "threading.Thread(target=time.sleep, args=(60,)).start()"])
def test_what_does_not_end_is_ended(tmp_path, waits):
    """A call that swallows the interruption, or threads that somebody waits for."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK.format(waits)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    pressed = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert interrupt.PATIENCE_S < time.monotonic() - pressed < 2
    assert (process.returncode, err) == (1, "crosslayer: error: interrupted\n")


def test_where_it_is_ignored_it_stays_ignored():
    """nohup, and jobs behind a shell's &."""
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from crosslayer.cli import interrupt\n"
    code += "interrupt.watch(); signal.raise_signal(signal.SIGINT); print(signal.getsignal(signal.SIGINT).name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "SIG_IGN\n", done.stderr
