"""Bytes over links and the time they take, against devices that are gone through one by one.

tests/integration/test_communication.py counts real collectives.
"""

import itertools

import pytest

from crosslayer.accounting import (
    PRECISIONS,
    TRAININGS,
    Collective,
    Links,
    Method,
    Sharding,
    Step,
    count_collectives,
    count_operations,
    named_shape,
)
from crosslayer.accounting.communication import AXES, step_seconds


def ring(devices, kind):
    """Chunks that a device passes to its neighbour; every device has one of each of so many chunks."""
    held = [{device} if kind == "all_gather" else set(range(devices)) for device in range(devices)]
    sums = [[{device} for _ in range(devices)] for device in range(devices)]
    passed = 0
    if kind != "all_gather":  # reduce: chunk c of device d goes on, with what it has summed
        for turn in range(devices - 1):
            moving = [(d, (d - turn) % devices, sums[d][(d - turn) % devices]) for d in range(devices)]
            for device, chunk, summed in moving:
                sums[(device + 1) % devices][chunk] = sums[(device + 1) % devices][chunk] | summed
            passed += 1
        held = [{(device + 1) % devices} for device in range(devices)]
        assert all(len(sums[device][(device + 1) % devices]) == devices for device in range(devices))
    if kind != "reduce_scatter":
        for _ in range(devices - 1):
            held = [held[device] | held[device - 1] for device in range(devices)]
            passed += 1
        assert all(len(chunks) == devices for chunks in held)
    return passed


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce"])
@pytest.mark.parametrize("devices", [2, 3, 8])
def test_what_a_device_of_a_ring_sends(kind, devices):
    """A chunk is one n-th of the tensor."""
    collective = Collective(kind=kind, axis="fsdp", phase="forward", size=devices * 10.0)
    assert collective.sent(Sharding(fsdp=devices)) == pytest.approx(10 * ring(devices, kind))


@pytest.mark.parametrize(
    "sharding",
    [Sharding(tensor=t, fsdp=f, replicas=r) for t, f, r in ((1, 8, 1), (2, 4, 4), (4, 8, 2), (8, 2, 2), (1, 1, 16))],
)
def test_links_of_groups_laid_out_on_nodes(sharding):
    """Devices in their order: groups that stay in a node use its links, others a card for each member that is there."""
    links = Links(node=8, within=100.0, between=10.0)
    sizes = {axis: getattr(sharding, axis) for axis in AXES}
    for axis in AXES:
        others = [range(size) for other, size in sizes.items() if other != axis]
        for place in itertools.product(*others):
            where = dict(zip((other for other in AXES if other != axis), place, strict=True))
            members = []
            for own in range(sizes[axis]):
                at = where | {axis: own}
                members.append(at["tensor"] + sizes["tensor"] * (at["fsdp"] + sizes["fsdp"] * at["replicas"]))
            nodes = [member // links.node for member in members]
            expected = 100.0 if len(set(nodes)) == 1 else min(100.0, 10.0 * nodes.count(nodes[0]))
            assert links.bandwidth(sharding, axis) == expected


def test_time_of_a_step():
    compute = {"forward": 1.0, "backward": 2.0, "update": 0.5}
    sends = {
        ("tensor", "forward"): 0.25,
        ("fsdp", "forward"): 2.0,
        ("fsdp", "backward"): 1.0,
        ("replicas", "update"): 4.0,
    }
    assert step_seconds(compute, {}, 3, overlap=True) == 3 * 3 + 0.5
    # forwards wait for FSDP, the last backward for the replicas
    assert step_seconds(compute, sends, 3, overlap=True) == 3 * 2.0 + 2 * 2.0 + 5.0 + 0.5
    assert step_seconds(compute, sends, 3, overlap=False) == 3 * (1.25 + 2 + 2 + 1) + 4 + 0.5


@pytest.mark.parametrize(("method", "width"), [("crnet", 7 / 4), ("cola", 7 / 4), ("dense", 4)])
def test_sums_of_a_layer_in_widths(method, width):
    """7 r at r = h / 4, Megatron's 4 h: the difference that layers make, in hidden sizes per token."""
    sizes = []
    for layers in (31, 32):
        shape = named_shape("llama_7b", TRAININGS[method][0], rank=1024 if method != "dense" else None)
        shape = shape.__class__(**{**vars_of(shape), "layers": shape.layers[:layers]})
        step = Step(sequence=1, precision=PRECISIONS["bf16"], sharding=Sharding(tensor=2))
        sizes.append(sum(c.size for c in count_collectives(shape, step) if c.kind == "all_reduce"))
    betas = 5 * 4 if method == "crnet" else 0
    assert sizes[1] - sizes[0] - betas == width * 4096 * 2


def vars_of(shape):
    return {name: getattr(shape, name) for name in shape.__dataclass_fields__}


def test_reversible_sums_again_and_replay_gathers_again():
    shape = named_shape("llama_7b", "cross_layer")
    split = {"tensor": Sharding(tensor=2), "fsdp": Sharding(fsdp=2)}
    sizes = {
        (policy, axis): sum(
            c.size for c in count_collectives(shape, Step(sequence=64, sharding=at), Method(recompute=policy))
        )
        for policy in ("none", "invert", "replay", "reversible")
        for axis, at in split.items()
    }
    assert sizes["none", "tensor"] == sizes["invert", "tensor"] == sizes["replay", "tensor"]
    assert sizes["reversible", "tensor"] - sizes["none", "tensor"] == 64 * 31 * 2 * 1024 * 4
    assert sizes["none", "fsdp"] == sizes["invert", "fsdp"] == sizes["reversible", "fsdp"] < sizes["replay", "fsdp"]


@pytest.mark.parametrize("factorization", ["dense", "cross_layer", "low_rank", "cola"])
def test_operations_on_one_of_several(factorization):
    """Layout R, written out: A of q, k, v, gate, up and B of o, down are whole, all else is split."""
    shape, tensor, length = named_shape("llama_1b", factorization), 4, 128
    whole, own = (count_operations(shape, length, tensor=n) for n in (1, tensor))
    repeated = 0
    for _, name, linear in shape.linears():
        if linear.rank is not None:
            into, out = linear.in_features, linear.out_features
            repeated += linear.rank * (out if name in ("o", "down") else into)
    layers = whole.forward["layers"] - 2 * repeated
    assert own.forward["layers"] == pytest.approx(layers / tensor + 2 * repeated)
    assert own.forward["attention"] == whole.forward["attention"] / tensor
    assert own.forward["head"] == whole.forward["head"] / tensor
    if factorization == "cross_layer":
        share = 2 * repeated / whole.forward["layers"]
        assert 0.3 < share < 0.37
