"""Two and four gloo processes: layout R of tensor parallelism computes what one process does, and sends what it should.

Everything is compared in float64, so that what is not equal is wrong.
"""

import traceback
from contextlib import contextmanager

import pytest
import torch
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import crosslayer.crnet.tape
from crosslayer.accounting import Sharding, Step
from crosslayer.accounting.kept import saved_bytes
from crosslayer.accounting.methods import method_of
from crosslayer.accounting.shapes import Shape
from crosslayer.analysis import measure_saved_activations
from family_cases import FAMILY_CASES, NO_DROPOUT, tokens
from processes import spawn
from tolerances import error_in_tolerances

pytestmark = pytest.mark.slow

POLICIES = ("none", "invert", "replay", "reversible")
RANK, HIDDEN = 12, 48
FAMILIES = {
    "llama": FAMILY_CASES["llama"],
    "one_key": FAMILY_CASES["llama"].but(num_key_value_heads=1),  # fewer than ranks
    "bias": FAMILY_CASES["llama"].but(attention_bias=True, mlp_bias=True),
    "qwen3": FAMILY_CASES["qwen3"],
    "qwen3_one_key": FAMILY_CASES["qwen3"].but(num_key_value_heads=1),
    "gpt2": FAMILY_CASES["gpt2"].but(**NO_DROPOUT),
    "gemma3": FAMILY_CASES["gemma3"],
    "mistral": FAMILY_CASES["mistral"],
    "cohere": FAMILY_CASES["cohere"],
}
FIELDS = {
    "none": {},
    **{policy: {"recompute": policy} for policy in POLICIES[1:]},
    "silu": {"increment_activation": "silu", "recompute": "replay"},
    "cola": {"factorization": "cola", "recompute": "invert"},
    "dense": {"factorization": "dense"},
    "no_carry": {"carries": {"q": False, "down": False}, "recompute": "invert"},
}
CASES = [
    *(("llama", fields) for fields in FIELDS),
    *((family, fields) for family in FAMILIES if family != "llama" for fields in ("none", "invert")),
]
REFUSED = {
    "qwen3_moe": (FAMILY_CASES["qwen3_moe_interleaved"], "experts"),
    "deepseek_v3": (FAMILY_CASES["deepseek_v3"], "kv_a"),
    "odd_mlp": (FAMILY_CASES["llama"].but(intermediate_size=131), "intermediate_size=131 cannot be split over 2"),
    "odd_heads": (
        FAMILY_CASES["llama"].but(num_attention_heads=3, num_key_value_heads=3),
        "num_attention_heads=3 cannot be split over 2 ranks",
    ),
}
KEPT = [*(("llama", fields) for fields in (*POLICIES, "cola", "dense")), ("one_key", "none"), ("one_key", "invert")]
SHARDED = [("llama", "none"), ("llama", "invert"), ("qwen3", "reversible"), ("gpt2", "replay")]


def load(folder, family, fields, **arguments):
    case = FAMILIES[family]
    model = case.causal_class.from_pretrained(f"{folder}/{family}_{fields}", dtype=torch.float64, **arguments)
    return model.train()


def rows(step):
    return tokens(rows=4, seed=step)


def accumulate(model, own=slice(None)):
    """Three micro-batches: their losses, and the gradients that have come together."""
    losses = []
    for step in range(3):
        ids = rows(step)[own]
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
    return losses, {name: whole(p.grad) for name, p in model.named_parameters()}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def tapes_counted():
    made, kind = [], crosslayer.crnet.tape.Tape.__init__

    def counted(self, *arguments):
        made.append(self)
        kind(self, *arguments)

    crosslayer.crnet.tape.Tape.__init__ = counted
    try:
        yield made
    finally:
        crosslayer.crnet.tape.Tape.__init__ = kind


class Reduced(TorchDispatchMode):
    """Numbers that all-reduces take from every rank."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        if "all_reduce" in str(function) or "allreduce" in str(function):
            tensors = arguments[0] if isinstance(arguments[0], list | tuple) else [arguments[0]]
            self.count += sum(tensor.numel() for tensor in tensors)
        return function(*arguments, **(kwargs or {}))


def sums_of_a_layer(make):
    """What the last of four layers adds to the all-reduces of a step, in numbers per token."""
    counts = []
    for layers in (3, 4):
        model, ids = make(layers), tokens(rows=2)
        with Reduced() as reduced:
            model(ids, labels=ids, use_cache=False).loss.backward()
        counts.append(reduced.count)
    return (counts[1] - counts[0]) / ids.numel()


def of_a_step(folder, mesh_of):
    """Gradients, clipping, generation, saving: of every case, in one process."""
    found = {}
    for family, fields in CASES:
        try:
            model = load(folder, family, fields, **mesh_of)
            with tapes_counted() as tapes:
                losses, gradients = accumulate(model)
            result = {"losses": losses, "gradients": gradients, "tapes": len(tapes)}
            if (family, fields) in (("llama", "none"), ("gpt2", "none"), ("one_key", "none"), ("qwen3", "none")):
                result["tokens"] = model.eval().generate(tokens(rows=2, length=7), max_new_tokens=8, do_sample=False)
            found[family, fields] = result
        except Exception:
            found[family, fields] = traceback.format_exc()
    return found


def clipped(folder, **mesh_of):
    """The norm that the Trainer clips with, and the weights after a step of AdamW with it."""
    from accelerate import Accelerator

    model = load(folder, "llama", "invert", **mesh_of)
    accumulate(model)
    norm = whole(Accelerator(cpu=True).clip_grad_norm_(model.parameters(), 0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    optimizer.step()
    return float(norm), {name: whole(p.detach()) for name, p in model.named_parameters()}


def two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/two", rank=rank, world_size=2)
    mesh_of = {"distributed_config": DistributedConfig(tp_size=2)}
    results = {"steps": of_a_step(folder, mesh_of), "clipped": clipped(folder, **mesh_of)}
    model = load(folder, "qwen3", "none", **mesh_of)
    results["local"] = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
    model.save_pretrained(f"{folder}/saved")
    results["kept"] = {
        case: measure_saved_activations(load(folder, *case, **mesh_of).float(), tokens(rows=4)).layer_bytes
        for case in KEPT
    }
    for name in REFUSED:
        try:
            REFUSED[name][0].causal_class.from_pretrained(f"{folder}/{name}", **mesh_of)
            results[name] = "loaded"
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    results["sums"] = sums_of_a_layer(lambda layers: CRNet_of(folder, layers, mesh_of))
    results["sums of Llama"] = sums_of_a_layer(lambda layers: llama_of(folder, layers, mesh_of))
    if rank == 0:
        torch.save(results, f"{folder}/two.pt")
    dist.barrier()
    dist.destroy_process_group()


def CRNet_of(folder, layers, mesh_of):
    return FAMILIES["llama"].causal_class.from_pretrained(f"{folder}/layers_{layers}", **mesh_of).train()


def llama_of(folder, layers, mesh_of):
    return LlamaForCausalLM.from_pretrained(f"{folder}/llama_{layers}", **mesh_of).train()


def four(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/four", rank=rank, world_size=4)
    results = {}
    for family, fields in SHARDED:
        try:
            config = DistributedConfig(tp_size=2, fsdp_size=2)
            model = load(folder, family, fields, distributed_config=config)
            at = model._device_mesh["fsdp"].get_local_rank()
            results[family, fields] = accumulate(model, slice(2 * at, 2 * at + 2))
        except Exception:
            results[family, fields] = traceback.format_exc()
    if rank == 0:
        torch.save(results, f"{folder}/four.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for family, fields in {*CASES, *SHARDED}:
        FAMILIES[family].model(**FIELDS[fields]).save_pretrained(folder / f"{family}_{fields}")
    for name, (case, _) in REFUSED.items():
        case.model(rank=2).save_pretrained(folder / name)
    for layers in (3, 4):
        case = FAMILIES["llama"].but(num_hidden_layers=layers)
        case.model(rank=RANK).save_pretrained(folder / f"layers_{layers}")
        LlamaForCausalLM(LlamaConfig(**case.all_fields())).save_pretrained(folder / f"llama_{layers}")
    return folder


@pytest.fixture(scope="module")
def one(folder):
    return of_a_step(folder, {})


@pytest.fixture(scope="module")
def on_two(folder):
    spawn(two, (str(folder),), nprocs=2)
    return torch.load(folder / "two.pt", weights_only=False)


@pytest.fixture(scope="module")
def on_four(folder):
    spawn(four, (str(folder),), nprocs=4)
    return torch.load(folder / "four.pt", weights_only=False)


def assert_same_step(found, expected):
    assert not isinstance(found, str), found
    losses, gradients = found
    assert losses == pytest.approx(expected[0], rel=1e-10)
    assert gradients.keys() == expected[1].keys()
    apart = {name: error_in_tolerances(gradients[name], expected[1][name]) for name in gradients}
    assert max(apart.values()) <= 1, {name: error for name, error in apart.items() if error > 1}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_losses_and_gradients_equal_one_process(on_two, one, case):
    """Three micro-batches, so that a sum over the ranks that came too late would count twice."""
    found, expected = on_two["steps"][case], one[case]
    assert not isinstance(expected, str), expected
    assert not isinstance(found, str), found
    assert_same_step((found["losses"], found["gradients"]), (expected["losses"], expected["gradients"]))
    assert found["tapes"] == expected["tapes"] == (0 if case[1] == "dense" else 3)
    if "tokens" in expected:
        assert found["tokens"].tolist() == expected["tokens"].tolist()


def test_clipping_counts_replicated_weights_once(on_two, folder):
    norm, weights = on_two["clipped"]
    expected, of_one = clipped(folder)
    assert norm == pytest.approx(expected, rel=1e-10)
    assert norm > 0.5  # it was clipped
    for name, weight in of_one.items():
        assert error_in_tolerances(weights[name], weight) <= 1, name


def test_a_rank_holds_its_part(on_two, folder):
    """The embeddings, the dense first layer, and of each factor pair the side that is split."""
    model = load(folder, "qwen3", "none")
    embeddings = 2 * model.lm_head.weight.numel()
    first = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2)
    split = [
        linear.B.weight if name not in ("o", "down") else linear.A.weight
        for layer in model.model.layers[1:]
        for name, linear in ((name, layer.linear(name)) for name in layer.places)
    ]
    halved = first + embeddings + sum(weight.numel() for weight in split)
    vocabulary, hidden = model.lm_head.weight.shape
    uneven = 2 * hidden * ((vocabulary + 1) // 2) - embeddings // 2  # rank 0 holds one row more of an odd vocabulary
    assert on_two["local"] == model.num_parameters() - halved + halved // 2 + uneven


@pytest.mark.parametrize("case", KEPT, ids="-".join)
def test_a_rank_keeps_what_accounting_says(on_two, case):
    """Of the layers between the first, and the last, whose state is the live one."""
    family, fields = case
    config, ids = FAMILIES[family].config(**FIELDS[fields]), tokens(rows=4)
    step = Step(micro_batch=4, sequence=ids.shape[1], fused_norms=False, sharding=Sharding(tensor=2))
    for layer in (1, 2):
        expected = ids.numel() * saved_bytes(Shape.of(config), step, method_of(config), layer)
        assert on_two["kept"][case][layer] == expected


def test_saved_as_one_process_saves_it(on_two, folder):
    saved = FAMILIES["qwen3"].causal_class.from_pretrained(folder / "saved", dtype=torch.float64)
    for (name, weight), expected in zip(
        saved.named_parameters(), load(folder, "qwen3", "none").parameters(), strict=True
    ):
        assert torch.equal(weight, expected), name


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_says_why(on_two, name):
    assert on_two[name].startswith("ValueError")
    assert REFUSED[name][1] in on_two[name]


def test_sums_are_as_narrow_as_promised(on_two):
    """Per token and layer: T of o and down, dT of the other five, and b of those five once.

    Megatron's dense block sums 4h; transformers' plan for Llama 7h, since it sums dX of q, k, v, gate and up apart.
    """
    betas = 5 / tokens(rows=2).numel()
    assert on_two["sums"] == pytest.approx(7 * RANK + betas)
    assert on_two["sums of Llama"] == pytest.approx(7 * HIDDEN)
    assert on_two["sums"] / (4 * HIDDEN) == pytest.approx(0.4375, rel=2e-3)


@pytest.mark.parametrize("case", SHARDED, ids="-".join)
def test_with_fsdp_on_the_other_axis(on_four, folder, case):
    found = on_four[case]
    assert not isinstance(found, str), found
    losses, gradients = found
    model = load(folder, *case)
    of_halves = [accumulate(load(folder, *case), slice(2 * at, 2 * at + 2)) for at in range(2)]
    expected = {name: (of_halves[0][1][name] + of_halves[1][1][name]) / 2 for name in dict(model.named_parameters())}
    assert_same_step((losses, gradients), (of_halves[0][0], expected))
