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

# Ctrl-C is heard even where these tests run in the background, which a shell starts deaf to it.
AT_A_TERMINAL = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
MAIN = [sys.executable, "-m", "crosslayer"]
LONG = {"max_steps": 100_000, "save_steps": 10, "eval_steps": 100, "logging_steps": 1}
LIMIT_S = 2.0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("interrupt")
    (root / "recipe.yaml").write_text(yaml.safe_dump(tiny_content(root, **LONG)))
    pretrain(tiny_recipe(root, max_steps=4), root / "run")
    encoder, task = tiny_finetune.write_encoder(root / "encoder"), tiny_finetune.write_task(root / "sst2")
    content = tiny_finetune.tiny_content(root, encoder, task, num_train_epochs=9000)
    (root / "finetune.yaml").write_text(yaml.safe_dump(content))
    return root


def slowdown(seconds=0.5):
    """How many times longer work takes now than it would take alone on this machine; about 1 on one that is idle."""
    started, worked = time.monotonic(), time.thread_time()
    while time.monotonic() - started < seconds:
        pass
    return (time.monotonic() - started) / (time.thread_time() - worked)


def assert_in_time(took, text):
    """Two seconds are the promise. On a machine whose cores are shared, as many more as it is slower just now."""
    assert took < LIMIT_S or took < LIMIT_S * slowdown(), f"{took:.2f} s\n{text}"


def is_reached(until, process, text):
    """A text in the output, a number of children, or seconds since Ctrl-C is watched for."""
    if isinstance(until, str):
        return until in text
    if isinstance(until, int):
        return len(psutil.Process(process.pid).children(recursive=True)) >= until
    return psutil.Process(process.pid).num_threads() > 1


def is_at_work(process):
    """Whether it has not ended: what has may still be listed until init, whose child it is now, looks at it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_of(root, arguments, until, to="group"):
    """Start a verb, press Ctrl-C when `until` (see `is_reached`) has come: its last words."""
    log = root / "output"
    with log.open("wb") as output:
        process = subprocess.Popen([*MAIN, *arguments], cwd=root, stdout=output, stderr=output, **AT_A_TERMINAL)
    try:
        started = time.monotonic()
        while True:
            assert process.poll() is None, log.read_text()
            if is_reached(until, process, log.read_text()):
                break
            assert time.monotonic() - started < 200, log.read_text()
            time.sleep(0.02)
        if isinstance(until, float):
            time.sleep(until)
        workers = psutil.Process(process.pid).children(recursive=True)
        pressed = time.monotonic()
        if to == "group":  # as a terminal does
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        process.wait(60)
        while (left := [worker for worker in workers if is_at_work(worker)]) and time.monotonic() - pressed < 60:
            time.sleep(0.02)
        took = time.monotonic() - pressed
    finally:
        if process.poll() is None:
            for each in psutil.Process(process.pid).children(recursive=True):
                each.kill()
            process.kill()
    text = log.read_text()
    assert process.returncode == 1, text
    assert not left, text
    assert_in_time(took, text)
    assert "Traceback" not in text
    assert "Warning" not in text
    *_, last = lines = text.splitlines()
    assert last.startswith("crosslayer: error: interrupted"), text
    assert [line for line in lines if "error" in line] == [last]
    return last


def test_pretrain_names_the_command_that_goes_on(root):
    start = ("pretrain", "--recipe", "recipe.yaml", "--output_dir", "a run", "--overwrite")
    last = end_of(root, start, "step 15/")
    assert "interrupted at step 1" in last
    assert "the last good checkpoint is a run/checkpoint-10" in last
    command = "to go on: crosslayer pretrain --recipe recipe.yaml --output_dir 'a run'"
    assert last.endswith(f"{command} --resume")
    # What was there before is not this run's.
    assert "to go on" not in end_of(root, start, 0.5)
    # It does go on, and the same command goes on from there; with workers that read the data.
    loaders = (
        "--dataloader_num_workers",
        str(min(2, len(os.sched_getaffinity(0)))),
    )  # torch warns of more than there are
    again = end_of(root, (*start[:-1], *loaders, "--resume"), "step 17/", to="main process alone")
    assert again.endswith(f"{command} {' '.join(loaders)} --resume")


@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0, 2.5])
def test_at_the_start(root, seconds):
    """While Python, typer, torch or transformers are loaded."""
    assert end_of(root, ("pretrain", "--recipe", "recipe.yaml", "--output_dir", "early"), seconds).count(";") == 0


def test_finetune(root):
    last = end_of(root, ("finetune", "--recipe", "finetune.yaml", "--output_dir", "tuned"), "step 10/")
    assert last.endswith("to go on: crosslayer finetune --recipe finetune.yaml --output_dir tuned --resume")


@pytest.mark.parametrize(
    ("until", "to"),
    [(1, "group"), pytest.param("steps: ", "main process alone", marks=pytest.mark.long)],
    ids=["workers start", "a run has ended"],
)
def test_compare_and_its_workers(root, until, to):
    small = ("--workers", "2", "--max_steps", "400", "--tuning_steps", "1", "--tuning_runs", "2")
    last = end_of(root, ("compare", "--recipe", "recipe.yaml", "--output_dir", "c", "--overwrite", *small), until, to)
    assert isinstance(until, int) or last.endswith(f"--output_dir c {' '.join(small)} --resume")


@pytest.mark.parametrize(
    ("arguments", "until"),
    [
        (("evaluate", "run", "--batch_size", "1"), "evaluating"),
        (("analyze", "run", "--batch_size", "1", "--max_tokens", "500000", "--block_size", "32"), 6.0),
        (("generate", "run", "--prompt", "the", "--max_new_tokens", "1000", "--temperature", "0"), 5.0),
        (("bench", "speed", "--turns", "10000"), 7.0),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_the_other_verbs(root, arguments, until):
    end_of(root, arguments, until)


STUCK = """
import sys, threading, time
sys.argv = ["crosslayer", "evaluate"]
from crosslayer.cli import interrupt
interrupt.watch()
{}
while True:
    try:
        print("ready", flush=True)
        time.sleep(60)
    except BaseException:
        pass
"""


@pytest.mark.parametrize("waits", ["", "threading.Thread(target=time.sleep, args=(60,)).start()"])
def test_what_does_not_end_is_ended(tmp_path, waits):
    """A call that swallows the interruption, or threads that somebody waits for."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK.format(waits)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **AT_A_TERMINAL,
    )
    assert process.stdout.readline() == "ready\n"
    pressed = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    took = time.monotonic() - pressed
    assert took > interrupt.PATIENCE_S
    assert_in_time(took, err)
    assert (process.returncode, err) == (1, "crosslayer: error: interrupted\n")


IGNORED = """
import signal, sys
sys.argv = ["crosslayer"]
signal.signal(signal.SIGINT, signal.SIG_IGN)
from crosslayer.cli import interrupt
interrupt.watch()
signal.raise_signal(signal.SIGINT)
print(signal.getsignal(signal.SIGINT).name)
"""


def test_where_it_is_ignored_it_stays_ignored():
    """nohup, and jobs behind a shell's &."""
    done = subprocess.run([sys.executable, "-c", IGNORED], capture_output=True, text=True)
    assert done.stdout == "SIG_IGN\n", done.stderr
