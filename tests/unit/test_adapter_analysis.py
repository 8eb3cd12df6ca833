"""Gradients per block, SFS over training, and the structure picture, on runs and histories made by hand."""

import pytest
import torch
from torch import nn

from crosslayer.analysis.adapters import GradientRecorder, SFSRecorder, draw_gradient_ratio, draw_sfs, gradient_by_block
from crosslayer.analysis.structure_plot import Module, draw_structure, structure_over_time
from crosslayer.lor2c import AdaptedBlocks
from crosslayer.train.finetune import train_once
from tiny_finetune import tiny_recipe, write_encoder, write_task

HISTORY = [
    {"step": 10, "action": "fuse", "blocks": [2, 3]},
    {"step": 10, "action": "inject", "blocks": [0]},
    {"step": 20, "action": "fuse", "blocks": [1, 2, 3]},
]


def test_structure_over_time():
    assert structure_over_time(HISTORY, blocks=4, steps=30) == [
        Module(0, 0, 0, 10),
        Module(1, 1, 0, 20),
        Module(2, 2, 0, 10),
        Module(3, 3, 0, 10),
        Module(0, 0, 10, 30, injected=True),
        Module(2, 3, 10, 20),
        Module(1, 3, 20, 30),
    ]


def test_pictures(tmp_path):
    records = [{"step": s, "blocks": b, "sfs": 0.1 * s} for s in (1, 2) for b in ([0], [1, 2])]
    assert draw_structure(tmp_path / "structure.png", HISTORY, 4, 30)
    assert draw_gradient_ratio(tmp_path / "ratio.png", [1.0, 2.0], [2.0, 0.0])
    assert draw_sfs(tmp_path / "sfs.png", records)
    for name in ("structure", "ratio", "sfs"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_gradient_by_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A = nn.ParameterDict({"default": nn.Parameter(torch.zeros(2, 3))})
            self.weight = nn.Parameter(torch.zeros(3))

    model = nn.ModuleDict({"layers": nn.ModuleList([Block() for _ in range(3)])})
    for number, block in enumerate(model["layers"]):
        block.weight.grad = torch.full((3,), 100.0)  # of the base: not counted
        if number:
            block.lora_A["default"].grad = torch.full((2, 3), float(number))
    assert gradient_by_block(model) == pytest.approx([0.0, 1.0, 2.0])


def test_recorders_in_a_run(tmp_path):
    write_encoder(tmp_path / "encoder")
    write_task(tmp_path / "sst2")
    recipe = tiny_recipe(tmp_path, tmp_path / "encoder", tmp_path / "sst2", eval_strategy="no", max_steps=4)
    gradients, sfs = GradientRecorder(every=2), SFSRecorder(every=2)
    measured = train_once(recipe, [gradients, sfs])
    assert measured.steps == 4
    assert gradients.steps == [0, 2]
    assert len(gradients.mean()) == 4
    assert all(value > 0 for value in gradients.mean())
    assert [(r["step"], r["blocks"]) for r in sfs.records] == [(s, [b]) for s in (2, 4) for b in range(4)]
    last = AdaptedBlocks(measured.attached.model).scores("sfs")
    assert [r["sfs"] for r in sfs.records[-4:]] == list(last.values())
