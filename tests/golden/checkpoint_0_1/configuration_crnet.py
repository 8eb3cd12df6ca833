"""Configuration of the CR-Net family of language models (arXiv 2509.18993).

A flat file that imports only transformers, so that a saved checkpoint can carry it and load anywhere.
"""

import re
from dataclasses import field
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

POSITIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""The seven linear positions of a block, in the order in which their outputs are carried from layer to layer."""


@strict
class CRNetConfig(LlamaConfig):
    r"""A LLaMA-family configuration plus the fields that describe low-rank structure across layers.

    Every field of [`~transformers.LlamaConfig`] keeps its meaning. The fields of our own:

    Args:
        rank (`int`, *optional*):
            Rank of every increment X A B. None means `hidden_size // 4`, at most min(in, out) of the position; the
            paper reports about half of the dense parameters there.
        rank_pattern (`dict[str, int]`, *optional*, defaults to `{}`):
            Ranks that differ: {regular expression over "layers.N.position": rank}, with position one of q, k, v, o,
            gate, up, down. As in PEFT, a key matches the whole name or its end after a dot. It speaks of low-rank
            linears only. A key that matches none of them is an error, and so are two that disagree about one:
            saving sorts the keys, so that no order among them would survive.
        first_layer_rank (`int`, *optional*):
            Rank of the first layer. None: full rank in CR-Net; in `low_rank` and `cola`, which have no full-rank
            layer, the rank used elsewhere.
        factorization (`str`, defaults to `"cross_layer"`):
            `"cross_layer"` (CR-Net, Y_l = b Y_{l-1} + X A B), `"low_rank"` (X A B alone), `"cola"` (silu(X A) B,
            arXiv 2502.10940) or `"dense"` (X W, transformers' Llama). All four run through the same block code.
        increment_activation (`str`, *optional*):
            None (the paper) or `"silu"` between A and B of a cross-layer increment (our option).
        beta_init (`float`, defaults to 1.0):
            Starting value of every beta.
        beta_epsilon (`float`, defaults to 1e-6):
            eps in b = s(beta) (|beta| + eps), which keeps b away from zero.
        beta_trainable (`bool`, defaults to True):
            Whether beta is learned.
        recompute (`str`, defaults to `"none"`):
            Memory policy while training, of `factorization="cross_layer"`: `"none"`, `"low_rank"`, `"replay"` or
            `"reversible"` (docs/memory.md). Evaluation and generation never use it.
        recompute_interval (`int`, *optional*):
            The full state is kept every so many layers. None, the policy's own rule: `replay` about the root of the
            number of layers, `reversible` 8, `low_rank` where `recompute_error_bound` asks for it.
        recompute_error_bound (`float`, defaults to 1e-5):
            `low_rank` and `reversible` keep a full state before the estimated relative error of a rebuilt one passes
            this bound: the rounding error of the carried dtype times the sum of the products of 1 / abs(b).
        recompute_drift_bound (`float`, *optional*):
            Where a kept state is met on the way down, a rebuilt one may differ from it by this much (relative norm);
            past it the run goes on with `replay`. None: 1e-4, or 4 times the products' machine epsilon if larger.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a field of the wrong type or outside its closed set; a rank below
            1 or above min(in, out) of a position (the layer is named); heads that do not divide the width, key-value
            heads that do not divide the heads; a `rank_pattern` key that matches nothing; a memory policy or an
            interval that does not exist for the model.
    """

    model_type = "crnet"
    # Splitting B over ranks would split the carried Y as well, and each rank would then see only its share of beta's
    # gradient. Linears without a plan are replicated, which is correct. Pipeline stages would have to pass on eight
    # tensors instead of one.
    base_model_tp_plan = None
    base_model_pp_plan = None

    rank: int | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    first_layer_rank: int | None = None
    factorization: Literal["cross_layer", "low_rank", "cola", "dense"] = "cross_layer"
    increment_activation: Literal["silu"] | None = None
    beta_init: int | float = 1.0
    beta_epsilon: int | float = 1e-6
    beta_trainable: bool = True
    recompute: Literal["none", "low_rank", "replay", "reversible"] = "none"
    recompute_interval: int | None = None
    recompute_error_bound: int | float = 1e-5
    recompute_drift_bound: int | float | None = None

    def linear_shape(self, position: str) -> tuple[int, int]:
        """(in, out) features of a linear position: one of `POSITIONS`."""
        query_width = self.num_attention_heads * self.head_dim
        key_value_width = self.num_key_value_heads * self.head_dim
        return {
            "q": (self.hidden_size, query_width),
            "k": (self.hidden_size, key_value_width),
            "v": (self.hidden_size, key_value_width),
            "o": (query_width, self.hidden_size),
            "gate": (self.hidden_size, self.intermediate_size),
            "up": (self.hidden_size, self.intermediate_size),
            "down": (self.intermediate_size, self.hidden_size),
        }[position]

    def linear_rank(self, layer_idx: int, position: str) -> int | None:
        """Rank of the linear at layer `layer_idx` (from 0) and `position`; None where it is full rank."""
        if self.factorization == "dense":
            return None
        if layer_idx == 0 and self.first_layer_rank is not None:
            return self.first_layer_rank
        if layer_idx == 0 and self.factorization == "cross_layer":
            return None
        for pattern, rank in self.rank_pattern.items():
            if _matches(pattern, f"layers.{layer_idx}.{position}"):
                return rank
        if self.rank is not None:
            return self.rank
        return min(self.hidden_size // 4, *self.linear_shape(position))

    def validate_architecture(self):
        """Checks across fields; called at construction and before saving."""
        super().validate_architecture()
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; choose key-value heads that divide the heads."
            )
        self._validate_recompute()
        if self.increment_activation is not None and self.factorization != "cross_layer":
            raise ValueError(
                f"increment_activation={self.increment_activation!r} belongs to factorization='cross_layer', not "
                f"{self.factorization!r}; remove it."
            )
        if not self.beta_epsilon > 0:
            raise ValueError(f"beta_epsilon={self.beta_epsilon} must be above 0: it keeps b away from zero.")
        self._validate_ranks()

    def _validate_recompute(self):
        if self.recompute != "none" and self.factorization != "cross_layer":
            raise ValueError(
                f"recompute={self.recompute!r} belongs to factorization='cross_layer'; {self.factorization!r} carries "
                "nothing to rebuild. Remove it; activation_checkpointing=True checkpoints whole layers there."
            )
        if self.recompute_interval is not None:
            if self.recompute == "none":
                raise ValueError(
                    f"recompute_interval={self.recompute_interval} needs a policy that rebuilds states: choose "
                    "recompute='low_rank', 'replay' or 'reversible', or remove the interval."
                )
            if not 1 <= self.recompute_interval <= self.num_hidden_layers:
                raise ValueError(
                    f"recompute_interval={self.recompute_interval} is outside 1..{self.num_hidden_layers}, the number "
                    "of layers; with the number of layers itself no state is kept in between."
                )
        for name in ("recompute_error_bound", "recompute_drift_bound"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0.")

    def _validate_ranks(self):
        for pattern in self.rank_pattern:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"rank_pattern key {pattern!r} is not a regular expression: {error}.") from error
        unmatched = set(self.rank_pattern)
        for layer_idx in range(self.num_hidden_layers):
            for position in POSITIONS:
                name = f"layers.{layer_idx}.{position}"
                rank = self.linear_rank(layer_idx, position)
                if rank is None:
                    continue
                matched = {key: value for key, value in self.rank_pattern.items() if _matches(key, name)}
                unmatched -= matched.keys()
                if len(set(matched.values())) > 1:
                    raise ValueError(
                        f"rank_pattern keys {sorted(matched)} give {name} different ranks; make each linear match one."
                    )
                limit = min(self.linear_shape(position))
                if not 1 <= rank <= limit:
                    raise ValueError(
                        f"rank={rank} of {name}_proj is outside 1..{limit}, the smaller of its two widths "
                        f"{self.linear_shape(position)}; change `rank`, `rank_pattern` or `first_layer_rank`."
                    )
        if unmatched and self.factorization != "dense":
            raise ValueError(
                f"rank_pattern keys {sorted(unmatched)} match no low-rank linear; names are layers.N.position with N "
                f"below {self.num_hidden_layers} and position one of {', '.join(POSITIONS)}."
            )


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


__all__ = ["POSITIONS", "CRNetConfig"]
