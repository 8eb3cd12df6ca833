"""Every family under torch.compile, and sharded over two processes under a memory policy."""

import traceback

import pytest
import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from family_cases import FAMILY_CASES, tokens
from long_cases import mostly_long
from model_cases import gradients
from processes import spawn
from tolerances import assert_all_close, assert_close

pytestmark = pytest.mark.slow

WORLD, STEPS = 2, 3

# Dropout draws other numbers in a compiled graph, and on other rows.
NAMES = [name for name, case in FAMILY_CASES.items() if not case.fields.get("resid_pdrop")]


# One of each family: compiling takes seconds.
COMPILED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3_softcapping",
    "gpt2",
    "qwen3_moe_interleaved",
    "deepseek_v3",
    "cohere_qk_norm",
]


@pytest.mark.parametrize("name", mostly_long(COMPILED, "gemma3_softcapping", "gpt2", "qwen3_moe_interleaved"))
def test_compile_without_graph_breaks(name):
    torch._dynamo.reset()
    model = FAMILY_CASES[name].model(num_hidden_layers=2).train()
    eager = model(tokens(), labels=tokens(), use_cache=False)
    eager.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(tokens(), labels=tokens(), use_cache=False)
    output.loss.backward()
    assert_close(output.logits, eager.logits)
    assert_all_close(gradients(model), expected)
    torch._dynamo.reset()


def train(model, rows):
    """Losses of a few steps, averaged over the processes if there are several."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(STEPS):
        ids = tokens(rows=WORLD)[rows]
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if dist.is_initialized():
            dist.all_reduce(loss, dist.ReduceOp.AVG)
        losses.append(loss.item())
    return losses


def model_to_train(name):
    return FAMILY_CASES[name].model(recompute="invert").train()


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results = {}
    for name in NAMES:
        try:
            model = model_to_train(name)
            for block in model.base_model.blocks:
                fully_shard(block)
            results[name] = train(fully_shard(model), slice(rank, rank + 1))
        except Exception:
            results[name] = traceback.format_exc()
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    spawn(worker, (str(folder),), nprocs=WORLD)
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("name", NAMES)
def test_sharded_losses_equal_one_process(results, name):
    losses = results[name]
    assert not isinstance(losses, str), losses
    expected = train(model_to_train(name), slice(None))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0] * (1 - 1e-4), "the steps changed too little to compare"
