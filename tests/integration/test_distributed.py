"""Two gloo processes on a CPU: FSDP2 and DDP train as one process does."""

import traceback

import pytest
import torch
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from crosslayer.crnet import CRNetForCausalLM
from device_reads import reads_of
from model_cases import model_of, tokens
from processes import spawn

pytestmark = pytest.mark.slow

WORLD, STEPS = 2, 4


def shard(model, **arguments):
    for layer in model.model.layers:
        fully_shard(layer, **arguments)
    return fully_shard(model, **arguments)


def with_checkpointing(model):
    model.activation_checkpointing_enable()
    return shard(model)


def in_bf16_with_beta_in_fp32(model):
    """What from_pretrained(dtype=torch.bfloat16) makes. FSDP2 wants one dtype per group: beta is left out of it.

    Every process then holds every beta, a few bytes, and their gradients have to be averaged by hand.
    """
    betas = {p for name, p in model.named_parameters() if name.endswith("beta")}
    for parameter in set(model.parameters()) - betas:
        parameter.data = parameter.data.bfloat16()
    for beta in betas:
        beta.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad, dist.ReduceOp.AVG))
    return shard(model, ignored_params=betas)


def in_bf16_all_sharded(model):
    for name, parameter in model.named_parameters():
        if not name.endswith("beta"):
            parameter.data = parameter.data.bfloat16()
    return shard(model)


def with_policy(wrap, policy, interval=None):
    def wrapped(model):
        model.set_recompute(policy, interval)
        return wrap(model)

    return wrapped


WRAPPERS = {
    "fsdp": shard,
    "fsdp_checkpointing": with_checkpointing,
    "fsdp_mixed": lambda model: shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
    "fsdp_bf16": in_bf16_with_beta_in_fp32,
    "fsdp_bf16_all": in_bf16_all_sharded,
    "ddp": DistributedDataParallel,
    "ddp_cola": DistributedDataParallel,
    "fsdp_invert": with_policy(shard, "invert"),
    "fsdp_replay": with_policy(shard, "replay", 3),
    "fsdp_reversible": with_policy(shard, "reversible"),
    "fsdp_mixed_replay": with_policy(
        lambda model: shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)), "replay", 3
    ),
    "fsdp_mixed_reversible": with_policy(
        lambda model: shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)), "reversible"
    ),
    "ddp_invert": with_policy(DistributedDataParallel, "invert"),
    "ddp_reversible": with_policy(DistributedDataParallel, "reversible"),
}

# name -> (how transformers distributes the model while loading it, whether each process has rows of its own)
LOADERS = {
    "load_tp": ({"tp_size": WORLD, "tp_plan": "auto"}, False),
    "load_fsdp": ({"fsdp_size": WORLD}, True),
}


def case_of(name):
    return "cola" if name.endswith("cola") else "gqa"


def train(model, rows):
    """Losses of a few steps, averaged over the processes if there are several."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
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


def train_distributed(name, rank, folder):
    own_rows = slice(rank, rank + 1)
    if name in WRAPPERS:
        return train(WRAPPERS[name](model_of(case_of(name)).train()), own_rows)
    arguments, splits_rows = LOADERS[name]
    model = CRNetForCausalLM.from_pretrained(
        f"{folder}/{case_of(name)}", distributed_config=DistributedConfig(**arguments)
    )
    return train(model.train(), own_rows if splits_rows else slice(None))


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results = {}
    for name in (*WRAPPERS, *LOADERS):
        try:
            results[name] = train_distributed(name, rank, folder)
        except Exception:
            results[name] = traceback.format_exc()
    model = WRAPPERS["fsdp_mixed_reversible"](model_of("gqa").train())
    results["reads"] = reads_of(model, tokens(rows=WORLD)[rank : rank + 1])
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All of them in one pair of processes, since starting those costs more than the training."""
    folder = tmp_path_factory.mktemp("distributed")
    model_of("gqa").save_pretrained(folder / "gqa")
    spawn(worker, (str(folder),), nprocs=WORLD)
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("name", [name for name in (*WRAPPERS, *LOADERS) if name != "fsdp_bf16_all"])
def test_losses_equal_one_process(results, name):
    losses = results[name]
    assert not isinstance(losses, str), losses
    expected = train(model_of(case_of(name)).train(), slice(None))
    tolerance = 1e-2 if "bf16" in name or "mixed" in name else 1e-6
    assert losses == pytest.approx(expected, rel=tolerance)
    assert expected[-1] < expected[0] * (1 - 10 * tolerance), "the steps changed too little to compare"


def test_one_read_in_a_forward_with_rounded_hidden_states(results):
    """FSDP2 rounds what goes into a layer: to see that nobody else changed it must not wait for the device."""
    assert results["reads"] == ({"tolist": 1}, {})


def test_fsdp_refuses_mixed_dtypes_in_a_group(results):
    """torch's limit, not ours: weights in bf16 beside beta in float32 need `ignored_params`, as above.

    When torch lifts it, the workaround above and in the documentation can go.
    """
    assert "FSDP expects uniform original parameter dtype" in results["fsdp_bf16_all"]
