"""An A shared within groups of blocks: what an adapter is made of, is saved as, and which groups spectra choose."""

import json
from itertools import combinations, pairwise

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from crosslayer import LoR2CConfig
from crosslayer.accounting import lor2c_parameters
from crosslayer.analysis.sharing import share_groups, sharing_loss
from crosslayer.errors import CheckpointError, ConfigError
from crosslayer.lor2c import AdaptedBlocks
from crosslayer.train.methods import AdapterConfig, attach
from lor2c_cases import base_model, inputs_of, move, with_lor2c

IDS = inputs_of("llama")["input_ids"]


def llama(**options):
    return with_lor2c(base_model("llama"), **options)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def owners(model, adapter_name="default"):
    """The number of each block's A, in the order of first use."""
    ids = [id(layer.lor2c_A[adapter_name].weight) for layer in AdaptedBlocks(model, adapter_name).layers]
    return [list(dict.fromkeys(ids)).index(one) for one in ids]


class TestAdapter:
    @pytest.mark.parametrize(
        ("share_A", "expected"),
        [(False, [0, 1, 2]), (True, [0, 0, 0]), ([0], [0, 0, 0]), ([0, 1], [0, 1, 1]), ([0, 2], [0, 0, 1]),
         ([0, 1, 2], [0, 1, 2])],
    )  # fmt: skip
    def test_groups_share(self, share_A, expected):
        model = llama(share_A=share_A)
        assert owners(model) == expected
        blocks = AdaptedBlocks(model)
        count = 32 * 4 * (len(set(expected)) + 3)
        assert blocks.num_parameters() == model.get_nb_trainable_parameters()[0] == count
        assert lor2c_parameters(32, 3, 4, share_A) == count
        model(IDS, labels=IDS).loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in blocks.parameters())

    def test_blocks_are_counted_among_those_adapted(self):
        model = llama(share_A=[0, 1], layers_to_transform=[1, 2])
        assert owners(model) == [0, 1]
        halves = with_lor2c(base_model("bart"), share_A=[0, 2])
        assert owners(halves) == [0, 0, 1, 1]

    def test_saved_and_loaded(self, tmp_path):
        model = llama(share_A=[0, 2], injectable=True)
        model.base_model.fuse(1, 2)
        model.save_pretrained(tmp_path)
        assert PeftConfig.from_pretrained(tmp_path).share_A == [0, 2]
        for low_cpu_mem_usage in (False, True):
            again = PeftModel.from_pretrained(base_model("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            assert owners(again) == [0, 0, 1]
            assert torch.equal(logits(again.eval()), logits(model))

    @pytest.mark.parametrize("share_A", [True, [0, 1]])
    def test_weights_of_other_groups_are_refused(self, share_A, tmp_path):
        """PEFT saves A with every block, so that a configuration changed by hand would take the last one's."""
        llama(share_A=[0, 2]).save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"share_A": share_A}))
        with pytest.raises(CheckpointError, match=r"differ in the adapter, .* set share_A in adapter_config.json"):
            PeftModel.from_pretrained(base_model("llama"), tmp_path)

    def test_beside_another_adapter(self):
        model = llama(share_A=[0, 2])
        first = logits(model)
        model.add_adapter("other", LoR2CConfig(r=2, lor2c_dropout=0.0, share_A=[0, 1]))
        assert owners(model, "default") == [0, 0, 1]
        assert owners(model, "other") == [0, 1, 1]
        move(model, seed=5)
        model.set_adapter("other")
        assert not torch.equal(logits(model), first)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(base_model("llama")))
        model.delete_adapter("default")
        assert owners(model, "other") == [0, 1, 1]

    def test_a_group_without_modules_has_no_A_in_use(self):
        model = llama(share_A=[0, 1], injectable=True)
        blocks = AdaptedBlocks(model)
        blocks.fuse(1, 2)
        assert blocks.num_parameters() == 32 * 4 * (2 + 2)
        blocks.fuse(0, 1)
        assert blocks.num_parameters() == 32 * 4 * (1 + 1)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"share_A": [1, 2]},
                r"share_A=\[1, 2\] must be true, false or a list of the blocks at which a group begins",
            ),
            ({"share_A": [0, 2, 2]}, "ascending from 0"),
            ({"share_A": [0, True]}, "ascending from 0"),
            ({"share_A": []}, "ascending from 0"),
            ({"share_A": 2}, "share_A=2 must be"),
            ({"share_A": [0, 3]}, "there is no block 3, the adapter goes around blocks 0 to 2"),
            (
                {"share_A": [0, 1], "rank_pattern": {"layers.2": 2}},
                r"blocks of a group, here 1 to 2, not widths \[32\] and ranks \[2, 4\]",
            ),
        ],
    )
    def test_refused(self, options, message):
        model = base_model("llama")
        keys = list(model.state_dict())
        with pytest.raises(ConfigError, match=message):
            get_peft_model(model, LoR2CConfig(r=4, **options))
        assert list(model.state_dict()) == keys

    def test_each_group_may_have_a_rank_of_its_own(self):
        layers = AdaptedBlocks(llama(share_A=[0, 1], rank_pattern={"layers.0": 2})).layers
        assert [layer.r["default"] for layer in layers] == [2, 4, 4]


def test_recipes():
    adapted = attach(base_model("bert"), AdapterConfig(method="sharelor2c", share_A=[0, 2]), "classification").model
    assert owners(adapted) == [0, 0, 1]
    for settings, message in (
        ({"method": "lor2c", "share_A": [0, 2]}, "share_A is for sharelor2c, not for method='lor2c'"),
        ({"method": "sharelor2c", "share_A": [2]}, r"share_A=\[2\] must be a list of the blocks"),
    ):
        with pytest.raises(ConfigError, match=message):
            AdapterConfig(**settings)


def test_counts_that_leave_open_which_A_stays():
    assert lor2c_parameters(64, 6, 8, [0, 3], fuses=2) == 64 * 8 * (2 + 4)
    assert lor2c_parameters(64, 2, 8, [0, 1], injections=2) == lor2c_parameters(64, 2, 8, True, injections=2)
    with pytest.raises(ValueError, match="may take the last module of a group of 2"):
        lor2c_parameters(64, 6, 8, [0, 4], fuses=1, injections=1)
    for starts in ([], [1, 3], [0, 3, 3], [0, 6]):
        with pytest.raises(ValueError, match="names no groups of 6 blocks"):
            lor2c_parameters(64, 6, 8, starts)


def loss_by_dense_matrices(model, starts, r):
    """What is left of the stacked [d, d] updates of each group beyond their r largest singular values."""
    blocks = AdaptedBlocks(model)
    updates = [scaling * B.detach().double() @ A.detach().double() for A, B, scaling in
               (blocks.factors(span) for span in blocks.structure.spans)]  # fmt: skip
    lost = [
        torch.linalg.svdvals(torch.cat(updates[first:end]))[r:].square().sum()
        for first, end in pairwise([*starts, len(updates)])
    ]
    return float(sum(lost) / sum(update.square().sum() for update in updates))


class TestGroupsFromSpectra:
    @pytest.mark.parametrize("r", [1, 3, None])
    def test_the_best_of_all_cuts(self, r):
        model = with_lor2c(base_model("t5"), rank_pattern={"decoder.*": 2})
        for groups in (1, 2, 3, 4):
            losses = {
                starts: loss_by_dense_matrices(model, starts, r or 4)
                for starts in ((0, *rest) for rest in combinations(range(1, 4), groups - 1))
            }
            found = share_groups(model, groups, r)
            assert tuple(found.starts) == min(losses, key=losses.get)
            assert found.lost == pytest.approx(losses[tuple(found.starts)], abs=1e-12)
            for starts, lost in losses.items():
                assert sharing_loss(model, starts, r).lost == pytest.approx(lost, abs=1e-12)

    @pytest.mark.parametrize("share_A", [[0, 1], [0, 2]])
    def test_finds_the_groups_that_an_adapter_shares(self, share_A):
        found = share_groups(llama(share_A=share_A), groups=2)
        assert found.starts == share_A
        assert found.lost == pytest.approx(0, abs=1e-12)
        assert found.lost_by_group == pytest.approx([0, 0], abs=1e-12)

    def test_shares_by_group(self):
        model = llama(r=6)
        apart = [sharing_loss(model, [0, 2], 4).lost_by_group, sharing_loss(model, [0], 4).lost_by_group]
        assert apart[1] == [pytest.approx(sharing_loss(model, [0], 4).lost)]
        assert 0 < apart[0][1] < apart[0][0] < 1

    def test_refused(self):
        model = llama(injectable=True)
        for call, message in (
            (lambda: share_groups(model, 0), "groups=0 must be from 1 to 3"),
            (lambda: share_groups(model, 4), "groups=4 must be from 1 to 3"),
            (lambda: share_groups(model, 2, r=0), "r=0 must be at least 1"),
            (lambda: sharing_loss(model, [1]), r"starts=\[1\] must be ascending"),
            (lambda: sharing_loss(model, [0, 3]), r"starts=\[0, 3\] must be ascending"),
            (lambda: share_groups(with_lor2c(base_model("llama"), moved=False), 2), "updates are all zero"),
            (lambda: share_groups(base_model("llama"), 2), "no LoR2C adapter"),
        ):
            with pytest.raises(ConfigError, match=message):
                call()
        model.base_model.fuse(0, 1)
        with pytest.raises(ConfigError, match="1 fuses and 0 injections"):
            share_groups(model, 2)
