"""Peak memory by part: exact where it can be known, and the rest where it belongs."""

import pytest
import torch

from crosslayer.analysis import measure_peak_memory, measure_saved_activations
from crosslayer.analysis.peak_memory import PARTS, PHASES, PeakMemory, StorageWatch, _correct_by_allocator
from crosslayer.bench.contenders import SETUPS, Contenders
from model_cases import SHAPE

SIZES = {key: value for key, value in SHAPE.items() if not key.endswith("_token_id")} | {"num_hidden_layers": 5}


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def case(name, dtype="float32", **shape):
    contenders = Contenders(SIZES | shape, [name], dtype=dtype, interval=3 if name == "crnet_reversible" else None)
    return contenders.model(name), contenders.tokens(2, 19)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SETUPS)
def test_parts_are_exact_and_add_up(name, dtype):
    model, ids = case(name, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = measure_peak_memory(model, ids, optimizer)
    assert found.tokens == ids.numel()
    assert list(found.phases) == list(PHASES)
    assert found.total_bytes == sum(found.parts.values()) == max(sum(p.values()) for p in found.phases.values())
    weights = bytes_of(model.parameters())
    states = bytes_of(value for state in optimizer.state.values() for value in state.values())
    for phase in found.phases.values():
        assert list(phase) == list(PARTS)
        assert min(phase.values()) >= 0
        assert phase["parameters"] == weights
        assert phase["optimizer"] == states
        assert phase["other"] == bytes_of([*model.buffers(), ids])
    assert found.phases["forward"]["gradients"] == 0
    assert found.phases["optimizer"]["gradients"] == weights
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["crnet_invert", "crnet_replay", "crnet_reversible"])
def test_activations_are_what_the_policy_keeps(name):
    """Against `none`, by the count of saved activations. Many words: the peak is at the loss."""

    def both(name):
        model, ids = case(name, vocab_size=3001)
        forward = measure_peak_memory(model, ids).phases["forward"]
        return forward["activations"], measure_saved_activations(model, ids).total_bytes

    activations, saved = both("crnet")
    fewer_activations, fewer_saved = both(name)
    rotary_tables = 2 * 19 * 16 * 4  # the call holds them for every layer, the tape does not count them
    assert activations - fewer_activations == pytest.approx(saved - fewer_saved, abs=rotary_tables)
    assert saved - fewer_saved > 50 * rotary_tables


def test_what_the_forward_drops_is_temporary():
    model, ids = case("crnet_invert")
    before = measure_peak_memory(model, ids).phases["forward"]
    model.model.norm.register_forward_hook(lambda module, inputs, output: output + torch.zeros(10**6).sum())
    after = measure_peak_memory(model, ids).phases["forward"]
    assert after["temporary"] >= 4 * 10**6 > before["temporary"]
    assert after["activations"] - before["activations"] < 10**5  # what is kept until there, now where the peak is


def test_what_the_forward_leaves_is_an_activation():
    model, ids = case("crnet_invert")
    before = measure_peak_memory(model, ids).phases["backward"]
    hoard = []
    model.model.norm.register_forward_hook(lambda *_: hoard.append(torch.zeros(10**6)))
    after = measure_peak_memory(model, ids).phases["backward"]
    assert after["activations"] - before["activations"] >= 4 * 10**6


def test_without_an_optimizer_nothing_is_trained():
    model, ids = case("crnet_reversible")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = measure_peak_memory(model, ids)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    moments_and_steps = 2 * bytes_of(model.parameters()) + 4 * len(before)
    assert found.parts["optimizer"] == moments_and_steps


def test_frozen_parameters_have_no_gradient():
    model, ids = case("crnet_invert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("B.weight"))
    found = measure_peak_memory(model, ids)
    trained = bytes_of(p for p in model.parameters() if p.requires_grad)
    assert found.phases["optimizer"]["gradients"] == trained
    assert found.parts["parameters"] == bytes_of(model.parameters())


def test_released_gradients_are_not_all_there():
    model, ids = case("crnet_invert")

    def release(parameter):
        parameter.grad = None

    kept = measure_peak_memory(model, ids)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(release)
    released = measure_peak_memory(model, ids)
    assert released.phases["optimizer"]["gradients"] == 0
    assert released.total_bytes < kept.total_bytes


def test_sgd_has_no_states():
    model, ids = case("dense")
    assert measure_peak_memory(model, ids, torch.optim.SGD(model.parameters(), lr=0.1)).parts["optimizer"] == 0


def test_under_autocast():
    model, ids = case("crnet_invert")
    full = measure_peak_memory(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = measure_peak_memory(model, ids)
    assert mixed.parts["parameters"] == full.parts["parameters"]
    assert mixed.phases["forward"]["activations"] != full.phases["forward"]["activations"]


def test_storages_are_noted_once():
    watch = StorageWatch()
    outside = torch.ones(10)
    with watch:
        x = torch.zeros(100)
        y = x.view(10, 10).t()  # the same storage
        x.add_(1)  # in place
        z = y.contiguous() + outside.sum()  # a copy that dies at once, a sum, a result
    sizes = [size for _, size in watch.events]
    assert sum(sizes) == 400 + 400  # x and z are left
    assert sizes.count(400) == 3
    del z
    assert sum(size for _, size in watch.events) == 400
    x.resize_(1)
    watch.number(x)
    x.untyped_storage().resize_(4)
    watch.number(x)
    assert sum(size for _, size in watch.events) == 4
    del x, y
    assert sum(size for _, size in watch.events) == 0


def test_allocator_has_the_last_word(monkeypatch):
    """On CUDA: its peak, less what it held for others, is the total; the difference is temporary."""

    class Step:
        ran = []

        class optimizer:  # noqa: N801
            zero_grad = staticmethod(lambda: None)

        def run(self, phase):
            self.ran.append(phase)

    parts = dict.fromkeys(PARTS, 0) | {"parameters": 100, "optimizer": 200, "other": 10, "temporary": 5}
    found = PeakMemory(1, {phase: dict(parts) for phase in PHASES})
    peaks = iter([1500, 1700, 1400])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 310 + 1000)  # 1000 are someone else's
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    _correct_by_allocator(found, Step(), torch.device("cpu"))
    assert Step.ran == list(PHASES)
    assert [sum(phase.values()) for phase in found.phases.values()] == [500, 700, 400]
    assert found.phase == "backward"
    assert found.parts["temporary"] == 700 - 310
