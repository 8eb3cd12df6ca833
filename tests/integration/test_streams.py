"""Several gloo processes over one stream: every document trained on by one of them, and gone on with where it was."""

import itertools
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from crosslayer.data import prepare_data
from crosslayer.data.split import goes_to_validation, text_digest
from crosslayer.train import build_recipe
from crosslayer.train.run import pretrain
from crosslayer.train.stream import Passes
from streams import documents_of, rows_by_worker, write_shards
from tiny_run import tiny_content

pytestmark = pytest.mark.slow

STEPS = 12


def recipe_of(root, workers, steps):
    settings = {"max_steps": steps, "save_steps": 4, "eval_steps": 4, "logging_steps": 1, "warmup_steps": 0}
    settings |= {"lr_scheduler_type": "constant", "dataloader_num_workers": workers, "per_device_train_batch_size": 8}
    content = tiny_content(root, **settings)
    content["data"] |= {"data": str(root / "stream"), "streaming": True, "shuffle_buffer": 20, "block_size": 16}
    return build_recipe(content)


def train(root, workers, resumptions):
    """Trains, and goes on after each of `resumptions`; what each run read and lost goes into a file of the process."""
    read, keep = [], Passes.trained_on

    def trained_on(self, batch):
        read.append({"position": batch["position"], "input_ids": batch["input_ids"].clone()})
        return keep(self, batch)

    Passes.trained_on = trained_on
    found = {}
    for name, ends in {"whole": [STEPS], "again": [*resumptions, STEPS]}.items():
        if name == "again" and not resumptions:
            break
        for end in ends:
            report = pretrain(recipe_of(root, workers, end), root / name, resume=end != ends[0])
        losses, evaluated = ([line[key] for line in report.history if key in line] for key in ("loss", "eval_loss"))
        found[name] = {"losses": losses, "evaluated": evaluated, "read": list(read)}
        read.clear()
    torch.save(found, root / f"{os.environ['RANK']}.pt")


def run(root, processes, workers, resumptions):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    where = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    command = [sys.executable, __file__, str(root), str(workers), *map(str, resumptions)]
    running = []
    for rank in range(processes):
        given = {name: str(value) for name, value in {**where, "RANK": rank, "LOCAL_RANK": rank}.items()}
        path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
        with (root / f"{rank}.log").open("w") as log:
            environment = {**os.environ, **given, "PYTHONPATH": path}
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        assert [process.wait(timeout=240) for process in running] == [0] * processes, (root / "0.log").read_text()
    finally:
        for process in running:
            process.kill()
    return [torch.load(root / f"{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.parametrize(("processes", "workers", "files"), [(2, 2, 3), pytest.param(4, 0, 4, marks=pytest.mark.long)])
def test_documents_are_trained_on_once(tmp_path, processes, workers, files):
    """Two passes and more: in the first, each document comes up once in all processes and workers together. Half of
    the cases go on twice: what they read and lose is what an undisturbed run does."""
    texts = write_shards(tmp_path / "stream", files, 40)
    tokenizer = prepare_data(recipe_of(tmp_path, workers, STEPS).data).tokenizer
    ranks = run(tmp_path, processes, workers, [4, 8] if workers else [])
    parts = []
    for rows in itertools.chain(*(rows_by_worker(rank["whole"]["read"]) for rank in ranks)):
        *found, _ = documents_of(rows, tokenizer)  # the last one may be cut
        count = len(set(found))
        assert len(found) > count, "no second pass"
        assert len(set(found[:count])) == count
        parts.append(set(found))
    trained = [text for text in texts if not goes_to_validation(text_digest(text), 0.2)]
    assert len(parts) == processes * max(workers, 1)
    assert Counter(itertools.chain(*parts)) == Counter(trained)
    for rank in ranks:
        whole = rank["whole"]
        assert len(whole["losses"]) == STEPS
        assert len(whole["evaluated"]) >= 3, "evaluated while streaming"
        if workers:
            again = rank["again"]
            assert again["losses"] == whole["losses"]
            assert again["evaluated"] == whole["evaluated"]
            for batch, expected in zip(again["read"], whole["read"], strict=True):
                assert batch["input_ids"].equal(expected["input_ids"])
    run_json = json.loads(Path(tmp_path / "whole" / "run.json").read_text())
    assert run_json["plan"]["tokens_per_step"] == 8 * 16 * processes


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), list(map(int, sys.argv[3:])))
    os._exit(0)  # as processes.py does
