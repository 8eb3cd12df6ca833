"""Golden runs of every case, policy and precision, and a checkpoint of an earlier version."""

import json
from pathlib import Path

import golden_runs
import pytest
import torch

from crosslayer.crnet import CRNetForCausalLM

GOLDEN = json.loads(golden_runs.FILE.read_text())
SAME_MACHINE = GOLDEN["machine"] == golden_runs.machine()

# On another processor, or with another torch, products are summed in another order. 20 steps of AdamW amplify that.
ELSEWHERE = {"float32": 1e-3, "mixed": 5e-2}


@pytest.mark.parametrize("name", golden_runs.run_names())
def test_golden_run(name):
    expected, actual = GOLDEN["runs"][name], golden_runs.golden_run(name)
    if SAME_MACHINE:
        assert actual == expected
    for what, numbers in expected.items():
        assert actual[what] == pytest.approx(numbers, rel=ELSEWHERE[name.rpartition("/")[2]]), what


@pytest.mark.parametrize("precision", golden_runs.PRECISIONS)
@pytest.mark.parametrize("case", [case for case in golden_runs.CASES if "replay" in golden_runs.policies_of(case)])
def test_replay_is_none(case, precision):
    """In the file itself: equal to the last digit."""
    assert GOLDEN["runs"][f"{case}/replay/{precision}"] == GOLDEN["runs"][f"{case}/none/{precision}"]


def test_every_run_is_there():
    assert list(GOLDEN["runs"]) == golden_runs.run_names()


def test_a_run_that_differs_is_noticed():
    """Ten times the tolerance of a machine elsewhere lies between two policies' runs of different cases."""
    runs = GOLDEN["runs"]
    assert runs["cross_layer/none/float32"]["loss"][-1] != pytest.approx(
        runs["gqa/none/float32"]["loss"][-1], rel=10 * ELSEWHERE["float32"]
    )


CHECKPOINT = Path(__file__).parent / "checkpoint_0_1"


def test_a_checkpoint_of_0_1_loads_and_gives_the_same_logits():
    expected = json.loads((CHECKPOINT / "expected.json").read_text())
    with pytest.warns(FutureWarning, match="recompute='low_rank' is called 'invert' now"):
        model = CRNetForCausalLM.from_pretrained(CHECKPOINT).eval()
    assert model.config.recompute == "invert"
    logits = model(torch.tensor(expected["input_ids"])).logits[0]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=0, atol=1e-5)
