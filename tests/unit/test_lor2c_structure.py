"""From spectra to decisions: hand-made spectra, and every rule against what it must not do."""

import pytest
import torch

from crosslayer.errors import ConfigError
from crosslayer.lor2c.structure import (
    Span,
    Structure,
    alignment,
    choose_fuse,
    choose_inject,
    choose_owner,
    joint_sfs,
    module_score,
    paper_interval,
    sfs,
    singular_values,
    stable_rank,
)

FLAT = torch.tensor([1.0, 1.0, 1.0, 1.0])
STEEP = torch.tensor([7.0, 2.0, 0.5, 0.5])
ZERO = torch.zeros(4)


def single(n, stack="layers"):
    return Structure.of_single_blocks([(stack, number) for number in range(n)])


@pytest.mark.parametrize(("r", "d_in", "d_out"), [(4, 33, 33), (8, 5, 7), (1, 16, 9), (6, 6, 40)])
def test_core_spectrum_is_that_of_the_full_matrix(r, d_in, d_out):
    A, B = torch.randn(r, d_in, dtype=torch.float64), torch.randn(d_out, r, dtype=torch.float64)
    full = torch.linalg.svdvals(-0.5 * B @ A)
    core = singular_values(A, B, -0.5)
    torch.testing.assert_close(core, full[: len(core)])
    assert (full[len(core) :] < 1e-12).all()


def test_scores_of_hand_made_spectra():
    assert sfs(FLAT) == pytest.approx(0.5)
    assert sfs(STEEP) == pytest.approx(0.1)
    assert sfs(STEEP, k=1) == pytest.approx(0.3)
    assert sfs(ZERO) == 1.0  # the published code's share is 0 there
    assert module_score(STEEP, "official") == pytest.approx(0.9)
    assert module_score(ZERO, "official") == 0.0
    assert module_score(STEEP, "mean_singular_value") == pytest.approx(2.5)
    assert module_score(STEEP, "mean_singular_value", width=100) == pytest.approx(0.1)
    assert stable_rank(FLAT) == pytest.approx(4.0)
    assert stable_rank(STEEP) == pytest.approx((49 + 4 + 0.25 + 0.25) / 49)
    assert stable_rank(ZERO) == 0.0
    with pytest.raises(ConfigError, match="criterion='sft' is none of sfs, official"):
        module_score(FLAT, "sft")


def test_alignment_and_joint_spectrum():
    A, B = torch.randn(3, 20), torch.randn(20, 3)
    assert alignment(A, B, 2 * A, 3 * B) == pytest.approx(1.0)
    assert alignment(A, B, -A, B) == pytest.approx(-1.0)
    assert alignment(A, B, A, 0 * B) == 0.0
    other_A, other_B = torch.randn(3, 20), torch.randn(20, 3)
    expected = torch.nn.functional.cosine_similarity((B @ A).flatten(), (other_B @ other_A).flatten(), dim=0)
    assert alignment(A, B, other_A, other_B) == pytest.approx(float(expected), abs=1e-6)

    assert joint_sfs((A, B, 1.0), (A, B, 1.0)) == pytest.approx(0.0, abs=1e-6)  # one module does the work of both
    spectrum = torch.linalg.svdvals((0.5 * B @ A + 2.0 * other_B @ other_A).double())
    expected = float(spectrum[3:].sum() / spectrum.sum())
    assert joint_sfs((A, B, 0.5), (other_A, other_B, 2.0)) == pytest.approx(expected, rel=1e-5)


class TestDecisions:
    structure = single(4)
    scores = dict(zip(structure.spans, (0.4, 0.1, 0.3, 0.3), strict=True))
    pairs = structure.neighbours()

    def test_fuse_lowest_sum_first(self):
        assert choose_fuse(self.pairs, self.scores, "sfs") == 1  # 0.1 + 0.3
        assert choose_fuse(self.pairs, dict.fromkeys(self.structure.spans, 1.0), "sfs") == 0
        assert choose_fuse([], {}, "sfs") is None

    def test_official_runs_against_the_paper(self):
        shares = {span: 1 - score for span, score in self.scores.items()}
        assert choose_fuse(self.pairs, shares, "official") == 2  # lowest sum of shares = highest of SFS
        assert choose_inject(self.structure, shares, "official") == choose_inject(self.structure, self.scores, "sfs")

    def test_alignment_judges_pairs(self):
        assert choose_fuse(self.pairs, self.scores, "alignment", [0.2, -0.9, 0.7]) == 2
        assert choose_fuse(self.pairs, self.scores, "alignment", [0.7, -0.9, 0.7]) == 0
        with pytest.raises(ConfigError, match="judges pairs"):
            choose_fuse(self.pairs, self.scores, "alignment")

    @pytest.mark.parametrize(
        ("criterion", "block"), [("sfs", 1), ("stable_rank", 1), ("alignment", 1), ("mean_singular_value", 0)]
    )
    def test_inject(self, criterion, block):
        assert choose_inject(self.structure, self.scores, criterion).first == block

    def test_inject_leaves_fused_modules_alone(self):
        fused = self.structure.fuse(*self.pairs[0])
        scores = dict(zip(fused.spans, (0.0, 0.5, 0.2), strict=True))
        assert choose_inject(fused, scores, "sfs").first == 3
        everything = fused.fuse(*fused.neighbours()[0]).fuse(Span(0, 2, 0), Span(3, 3, 3))
        assert choose_inject(everything, {everything.spans[0]: 0.1}, "sfs") is None

    def test_survivor(self):
        lower, upper = self.pairs[0]
        assert choose_owner(lower, upper, self.scores, "first") == 0
        assert choose_owner(lower, upper, self.scores, "higher_score") == 0
        assert choose_owner(*self.pairs[1], self.scores, "higher_score") == 2
        with pytest.raises(ConfigError, match="survivor='last'"):
            choose_owner(lower, upper, self.scores, "last")


class TestStructure:
    def test_fuse_again_and_again(self):
        structure = single(4)
        structure = structure.fuse(Span(1, 1, 1), Span(2, 2, 2), owner=2)
        assert structure.spans == (Span(0, 0, 0), Span(1, 2, 2), Span(3, 3, 3))
        structure = structure.fuse(Span(0, 0, 0), Span(1, 2, 2))
        assert structure.spans == (Span(0, 2, 0), Span(3, 3, 3))
        assert (structure.fuses, structure.injections) == (2, 0)
        assert structure.span_of(1) == Span(0, 2, 0)

    def test_no_fuse_across_a_hole_a_gap_or_a_list(self):
        injected = single(3).inject(1)
        assert injected.neighbours() == []
        assert (injected.fuses, injected.injections) == (0, 1)
        with pytest.raises(ConfigError, match="do not touch"):
            injected.fuse(Span(0, 0, 0), Span(2, 2, 2))
        gap = Structure.of_single_blocks([("layers", 0), ("layers", 2), ("layers", 3)])
        assert gap.neighbours() == [(Span(1, 1, 1), Span(2, 2, 2))]
        halves = Structure.of_single_blocks([("encoder", 0), ("encoder", 1), ("decoder", 2), ("decoder", 3)])
        assert [(a.first, b.first) for a, b in halves.neighbours()] == [(0, 1), (2, 3)]

    def test_max_span(self):
        structure = single(4).fuse(Span(0, 0, 0), Span(1, 1, 1))
        assert [(a.first, b.last) for a, b in structure.neighbours(max_span=2)] == [(2, 3)]
        assert [(a.first, b.last) for a, b in structure.neighbours(max_span=3)] == [(0, 2), (2, 3)]

    def test_wrong_requests_name_the_reason(self):
        structure = single(3).fuse(Span(0, 0, 0), Span(1, 1, 1))
        with pytest.raises(ConfigError, match="fused over blocks 0-1"):
            structure.inject(1)
        with pytest.raises(ConfigError, match="no block 3"):
            structure.inject(3)
        with pytest.raises(ConfigError, match="has no LoR2C module"):
            single(3).inject(1).inject(1)
        with pytest.raises(ConfigError, match="owner=0"):
            single(3).fuse(Span(1, 1, 1), Span(2, 2, 2), owner=0)
        with pytest.raises(ConfigError, match="exactly one module"):
            Structure((("layers", 0), ("layers", 1)), (Span(0, 0, 0),))


@pytest.mark.parametrize(
    ("epochs", "count", "events"),
    [(30, 1, [8]), (30, 3, [3, 6, 9]), (30, 2, [4, 8]), (30, 6, [2, 4, 6, 8, 10, 12]), (3, 1, [1])],
)
def test_paper_schedule(epochs, count, events):
    interval = paper_interval(epochs, count)
    assert [epoch for epoch in range(1, epochs + 1) if epoch % interval == 0][:count] == events
