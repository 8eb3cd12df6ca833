"""`optim: muon` and `optim: spectron` on two processes: the losses of one, and checkpoints that one goes on from."""

import json
import os
import shutil
import socket

import pytest
import torch
from torch import distributed as dist

from crosslayer.train import build_recipe
from crosslayer.train.run import pretrain
from processes import spawn
from tiny_run import tiny_content

pytestmark = [pytest.mark.slow, pytest.mark.long]

STEPS, ROWS = 4, 4
OPTIMIZERS = ("muon", "spectron")
SPLITS = {"ddp": {}, "fsdp": {"fsdp_size": 2}, "tp": {"tensor_parallel": 2}}
CASES = [(optim, split) for optim in OPTIMIZERS for split in SPLITS]
TOLERANCE = {"muon": 2e-4, "spectron": 2e-5}
"""torch's Muon orthogonalises in bfloat16, where sums in another order are off by its rounding."""


def recipe_of(root, optim, readers=1, **parallel):
    settings = {"max_steps": STEPS, "save_steps": 2, "eval_strategy": "no", "logging_steps": 1, "save_total_limit": 9}
    content = tiny_content(root, optim=optim, **settings, per_device_train_batch_size=ROWS // readers, warmup_steps=1)
    content["model"]["num_hidden_layers"] = 2
    return build_recipe({**content, "parallel": parallel})


def work(rank, port, root):
    torch.set_num_threads(1)
    os.environ |= {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from accelerate.state import AcceleratorState

    for optim, split in CASES:
        AcceleratorState._reset_state()
        readers = 2 // SPLITS[split].get("tensor_parallel", 1)
        pretrain(recipe_of(root, optim, readers, **SPLITS[split]), root / f"{optim}_{split}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("optimizers")
    for optim in ("adamw_torch_fused", *OPTIMIZERS):
        pretrain(recipe_of(root, optim), root / optim)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(work, (port, root), nprocs=2)
    return root


def losses(run):
    return [line["loss"] for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "loss" in line]


@pytest.mark.parametrize(("optim", "split"), CASES)
def test_equal_to_one_process(root, optim, split):
    expected = losses(root / optim)
    assert len(expected) == STEPS
    assert losses(root / f"{optim}_{split}") == pytest.approx(expected, abs=TOLERANCE[optim])
    assert losses(root / "adamw_torch_fused") != pytest.approx(expected, abs=4 * TOLERANCE["muon"])


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_one_process_goes_on_from_the_parts_of_two(root, optim, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(root / f"{optim}_fsdp", run)
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    shutil.rmtree(run / "model")
    (run / "report.json").unlink()
    pretrain(recipe_of(root, optim), run, resume=True)
    assert losses(run) == pytest.approx(losses(root / f"{optim}_fsdp"), abs=TOLERANCE[optim])
