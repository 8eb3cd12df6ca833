"""A decoder block as a table of stages: what CR-Net's forward, backward and memory policies know of a family.

    stage     x   = function(what it reads)                  reads: the hidden states h, or Y of earlier stages
              Y_p = b Y_p of the block below + increment(x)  for each position whose linear reads x
              h   = h + Y_p                                  where the stage adds

Letters: [B, T, D] batch, tokens, hidden size; F the output width of a position.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .cross_layer_linear import build_linear
from .functions import Attention, CarriedRMSNorm, GatedMLP, carry_dtype


@dataclass(frozen=True)
class Stage:
    """One row of a block's table. It names things and holds no modules: PEFT and quantisation may replace those.

    Args:
        reads: ("h",), or names of positions of earlier stages.
        function: path of the module between them and the linears.
        positions: names of the positions whose linears read what the function gives.
        adds: those of them whose outputs are added to h.
        through: path of a module that stands between Y and h where the stage adds (a norm, a dropout).
        takes_arguments: whether the function also gets the block's keyword arguments (masks, rotations, the cache).
    """

    reads: tuple[str, ...]
    function: str
    positions: tuple[str, ...]
    adds: tuple[str, ...] = ()
    through: str | None = None
    takes_arguments: bool = False

    @property
    def reads_h(self) -> bool:
        """Whether it reads the hidden states; else it reads Y of earlier stages."""
        return self.reads == ("h",)


class CrossLayerBlock(GradientCheckpointingLayer):
    """A decoder block. A family's own sets `stages` and makes the modules that they name, then calls `add_linears`.

    `places` are its positions by name (`CrossLayerFields.places`), `carried` the names that travel from block to block,
    whether this block has them or hands them on.
    """

    stages: tuple[Stage, ...] = ()

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.places = config.places(layer_idx)
        self.carried = config.carried_positions

    def add_linears(self, config) -> None:
        """Puts the linear of every position where the table of positions says."""
        for name, place in self.places.items():
            if place.mixture is None:
                parent, _, attribute = place.module.rpartition(".")
                self.get_submodule(parent).add_module(attribute, build_linear(config, self.layer_idx, name))

    def find(self, path: str) -> nn.Module:
        """The module at this path, looked up anew: it may have been replaced."""
        module: nn.Module = self
        for part in path.split("."):
            module = getattr(module, part)
        return module

    def linear(self, position: str) -> nn.Module:
        """The module of a position, looked up as `find` does."""
        return self.find(self.places[position].module)

    def forward(
        self, hidden_states: torch.Tensor, *carried: torch.Tensor | None, tape=None, **arguments
    ) -> tuple[torch.Tensor | None, ...]:
        """hidden_states [B, T, D] and Y of every carried position, [B, T, F] or None; none at all in the first block.

        Returns (hidden states [B, T, D], Y of every carried position); the hidden states alone where nothing is
        carried, or where a tape carries the Y (tape.py).
        """
        if tape is not None:
            hidden_states, *beside = tape.run(self, hidden_states)
            self.hand_out(beside)
            return (hidden_states,)
        Y: dict[str, Any] = dict(zip(self.carried, carried, strict=False))
        beside, dtype = [], hidden_states.dtype
        for stage in self.stages:
            x = self.input_of(stage, hidden_states, Y, dtype, arguments)
            # In which functions read Y, which may be carried in a wider one.
            dtype = x.dtype if stage.reads_h else dtype
            for name in stage.positions:
                Y[name], *more = self.project(name, x, Y.get(name))
                beside += more
                if name in stage.adds:
                    y = Y[name]
                    hidden_states = hidden_states + (y if stage.through is None else self.find(stage.through)(y))
        self.hand_out(beside)
        return hidden_states, *(Y.get(name) for name in self.carried)

    def input_of(self, stage: Stage, h: torch.Tensor, Y, dtype: torch.dtype, arguments: dict) -> torch.Tensor:
        """x of a stage: [B, T, in]."""
        inputs = (h,) if stage.reads_h else [Y[name].to(dtype) for name in stage.reads]
        x = self.find(stage.function)(*inputs, **(arguments if stage.takes_arguments else {}))
        return x[0] if isinstance(x, tuple) else x

    def project(self, name: str, x: torch.Tensor, below: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """(Y of one position [B, T, F], and whatever its module returns beside it)."""
        place = self.places[name]
        y = self.linear(name)(x) if below is None or not place.carries else self.linear(name)(x, below)
        y, *beside = y if isinstance(y, tuple) else (y,)
        return (y.to(carry_dtype(y.dtype)) if place.carries else y, *beside)

    def hand_out(self, beside) -> None:
        """What positions returned beside Y, for whoever records it; a mixture's router logits, in families with one."""


class LlamaBlock(CrossLayerBlock):
    """Llama's block. Families that change only its attention or its norms start from it."""

    attention_class = Attention
    norm_class = CarriedRMSNorm
    activation_field = "hidden_act"
    stages: tuple[Stage, ...] = (
        Stage(("h",), "input_layernorm", ("q", "k", "v")),
        Stage(("q", "k", "v"), "self_attn", ("o",), adds=("o",), takes_arguments=True),
        Stage(("h",), "post_attention_layernorm", ("gate", "up")),
        Stage(("gate", "up"), "mlp", ("down",), adds=("down",)),
    )

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.add_functions(config, layer_idx)
        self.add_linears(config)

    def add_functions(self, config, layer_idx: int) -> None:
        """Makes the modules that `stages` name, without the linears. A family with others overrides it."""
        self.self_attn = self.attention_class(config, layer_idx)
        self.mlp = GatedMLP(getattr(config, self.activation_field))
        self.input_layernorm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)
