"""`pretrain` with a model that processes share: the losses of one process, and checkpoints that any number reads."""

import json
import os
import shutil
import socket

import pytest
import torch
from torch import distributed as dist

from crosslayer.loading import load_saved
from crosslayer.train import build_recipe
from crosslayer.train.parallel import local
from crosslayer.train.run import build_model, build_model_config, pretrain
from processes import spawn
from tiny_run import tiny_content

pytestmark = pytest.mark.slow

STEPS, ROWS = 6, 4
SPLITS = {
    "fsdp": {"fsdp_size": 4},
    "fsdp_tp": {"fsdp_size": 2, "tensor_parallel": 2, "accumulate": 2},
    "replicas_tp": {"tensor_parallel": 2},  # two replicas of two processes each
    "all": {"fsdp_size": -1, "tensor_parallel": 2, "bf16": True},
}
"""Of four processes. Packed rows, gradients clipped; some in batches of one that are accumulated, or under autocast;
heads that are tied, or not."""


def recipe_of(root, processes, *, accumulate=1, bf16=False, **parallel):
    """Steps of four rows, however many processes read them."""
    batch = ROWS // accumulate // (processes // parallel.get("tensor_parallel", 1))
    settings = {"max_steps": STEPS, "save_steps": 2, "eval_steps": 3, "logging_steps": 1, "save_total_limit": 9}
    settings |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "bf16": bf16}
    content = tiny_content(root, **settings, warmup_steps=1)
    content["model"] |= {"recompute": "invert", "tie_word_embeddings": not bf16}
    return build_recipe({**content, "parallel": parallel})


def work(rank, processes, port, root, runs):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from accelerate.state import AcceleratorState

    for name, parallel, resume in runs:
        AcceleratorState._reset_state()
        recipe = recipe_of(root, processes, **parallel)
        pretrain(recipe, root / name, resume=resume)
        write_held(root / f"{name}.{rank}.json", recipe, processes)
    dist.destroy_process_group()


def write_held(path, recipe, processes):
    """Numbers of weights that this process holds, and of the optimizer's states after a step."""
    config = build_model_config(recipe, load_saved(path.parent / "one" / "model")[1])
    model = recipe.parallel.split(build_model(config, 0), processes, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ids = torch.ones(2, 8, dtype=torch.long)
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    held = {"weights": count(model.parameters()), "states": count(states), "gradients": count_gradients(model)}
    path.write_text(json.dumps(held))


def count(tensors):
    return sum(local(tensor).numel() for tensor in tensors)


def count_gradients(model):
    return count(p.grad for p in model.parameters() if p.grad is not None)


def launch(processes, root, runs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(work, (processes, port, root, runs), nprocs=processes)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs of one process and of four; one of those gone on with by two, and then by one."""
    root = tmp_path_factory.mktemp("parallel")
    pretrain(recipe_of(root, 1), root / "one")
    pretrain(recipe_of(root, 1, bf16=True), root / "one_in_bf16")
    launch(4, root, [(name, parallel, False) for name, parallel in SPLITS.items()])
    back_to(root / "fsdp", root / "fewer", 2)
    launch(2, root, [("fewer", {"fsdp_size": 2}, True)])
    shutil.copytree(root / "fewer", root / "by_two")
    back_to(root / "fewer", root / "single", 4)
    pretrain(recipe_of(root, 1), root / "single", resume=True)
    return root


def back_to(run, copy, step):
    """A copy of a run as it was when it had just saved this step."""
    shutil.copytree(run, copy)
    for later in copy.glob("checkpoint-*"):
        if int(later.name.split("-")[1]) > step:
            shutil.rmtree(later)
    shutil.rmtree(copy / "model")
    (copy / "report.json").unlink()


def losses(run):
    return [line["loss"] for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "loss" in line]


def weights(run):
    return load_saved(run / "model")[0].state_dict()


def one_process(name):
    """The run of one process that a run is to equal, and how far losses may be off."""
    return ("one_in_bf16", 5e-3) if SPLITS.get(name, {}).get("bf16") else ("one", 2e-5)


@pytest.mark.parametrize("name", [*SPLITS, "by_two", "single"])
def test_equal_to_one_process(root, name):
    one, tolerance = one_process(name)
    assert losses(root / name) == pytest.approx(losses(root / one), abs=tolerance)
    expected, found = weights(root / one), weights(root / name)
    assert expected.keys() == found.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, atol=tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("name", ["fsdp", "fsdp_tp", "all"])
def test_a_process_holds_its_part(root, name):
    """A quarter of what FSDP2 shards over four, and little more: parts are rows, of which a beta has one."""
    whole = sum(parameter.numel() for parameter in load_saved(root / "one" / "model")[0].parameters())
    held = [json.loads((root / f"{name}.{rank}.json").read_text()) for rank in range(4)]
    assert sum(each["weights"] for each in held) >= whole  # nothing is lost
    for each in held:
        assert each["gradients"] == each["weights"]
        assert each["states"] == 2 * each["weights"]
        assert each["weights"] < (0.27 if name == "fsdp" else 0.4) * whole  # A of q, B of o and the like: in half each


@pytest.mark.parametrize("name", [*SPLITS, "single"])
def test_reports_count_what_was_read(root, name):
    of_one, tolerance = one_process(name)
    one, other = (json.loads((root / run / "report.json").read_text()) for run in (of_one, name))
    assert other["tokens"] == one["tokens"] == STEPS * ROWS * 32
    for key in ("loss", "tokens", "perplexity", "bits_per_byte"):
        assert other["after"][key] == pytest.approx(one["after"][key], rel=tolerance)
