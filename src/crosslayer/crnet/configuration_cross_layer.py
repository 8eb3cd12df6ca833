"""The fields that CR-Net adds to a configuration of transformers, whatever the family (arXiv 2509.18993)."""

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .policies import POLICIES, check_policy, current_name
from .positions import AttentionShape, Position, decoder_positions

FORMAT = 2


@dataclass(kw_only=True)
class CrossLayerFields:
    r"""Low-rank structure across layers; every field of the family's own configuration keeps its meaning.

    Args:
        rank (`int`, *optional*):
            Rank of every increment X A B. None: `hidden_size // 4`, and no more than half of the rank at which a
            position's factors would have as many parameters as its matrix, in out / (in + out).
        rank_pattern (`dict[str, int]`, *optional*, defaults to `{}`):
            Ranks that differ: {regular expression over "layers.N.position": rank}, with the family's position names. As
            in PEFT, a key matches the whole name or its end after a dot. It speaks of low-rank linears only. A key
            that matches none of them is an error, and so are two that disagree about one: saving sorts the keys, so
            that no order among them would survive.
        first_layer_rank (`int`, *optional*):
            Rank of the first layer. None: full rank in CR-Net; in `low_rank` and `cola`, which have no full-rank
            layer, the rank used elsewhere.
        factorization (`str`, defaults to `"cross_layer"`):
            `"cross_layer"` (CR-Net, Y_l = b Y_{l-1} + X A B), `"low_rank"` (X A B alone), `"cola"` (silu(X A) B,
            arXiv 2502.10940) or `"dense"` (X W, the family's own model). All four run through the same block code.
        carries (`dict[str, bool]`, defaults to `{}`):
            Positions that carry or not, where it differs from the family's default: {"experts": False}. One that does
            not is Y_l = X A B in CR-Net too.
        increment_activation (`str`, *optional*):
            None (the paper) or `"silu"` between A and B of a cross-layer increment (our option).
        low_rank_initializer_range (`float`, *optional*):
            How A and B start where nothing is carried: their spectral norms give that of a dense matrix whose numbers
            have this standard deviation. None: `initializer_range`. `"cola"`: numbers of A B of (in + out)^(-1/2), as
            in CoLA's code, which is too much for narrow models (our measurement: docs/ablations.md).
        beta_init (`float`, defaults to 1.0):
            Starting value of every beta.
        beta_epsilon (`float`, defaults to 1e-6):
            eps in b = s(beta) (|beta| + eps), which keeps b away from zero.
        beta_trainable (`bool`, defaults to True):
            Whether beta is learned.
        recompute (`str`, defaults to `"none"`):
            Memory policy while training: `"none"`, `"invert"`, `"replay"` or `"reversible"` (docs/memory.md).
            Evaluation and generation never use it.
        recompute_interval (`int`, *optional*):
            The full state is kept every so many layers. None, the policy's own rule: `replay` about the root of the
            number of layers, `reversible` 8, `invert` where `recompute_error_bound` asks for it.
        recompute_error_bound (`float`, defaults to 1e-5):
            `invert` and `reversible` keep a full state before the estimated relative error of a rebuilt one passes
            this bound: the rounding error of the carried dtype times the sum of the products of 1 / abs(b).
        recompute_drift_bound (`float`, *optional*):
            Where a kept state is met on the way down, a rebuilt one may differ from it by this much (relative norm);
            past it the run goes on with `replay`. None: 1e-4, or 4 times the products' machine epsilon if larger.
        crosslayer_format (`int`, defaults to 2):
            Set by crosslayer. 1 in checkpoints of 0.1: another default rank, and any rank up to min(in, out).

    Raises:
        huggingface_hub.errors.StrictDataclassError: a field of the wrong type or outside its closed set; a rank that
            saves nothing (the layer and the largest rank that does are named); heads that do not divide the width,
            key-value heads that do not divide the heads; a `rank_pattern` key that matches nothing; a position in
            `carries`, a memory policy or an interval that does not exist for the model.
    """

    rank: int | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    first_layer_rank: int | None = None
    factorization: Literal["cross_layer", "low_rank", "cola", "dense"] = "cross_layer"
    carries: dict[str, bool] = field(default_factory=dict)
    increment_activation: Literal["silu"] | None = None
    low_rank_initializer_range: int | float | Literal["cola"] | None = None
    beta_init: int | float = 1.0
    beta_epsilon: int | float = 1e-6
    beta_trainable: bool = True
    recompute: str = "none"
    recompute_interval: int | None = None
    recompute_error_bound: int | float = 1e-5
    recompute_drift_bound: int | float | None = None
    crosslayer_format: int = FORMAT

    base_model_tp_plan = {"layers.*": "crosslayer_block"}  # tensor_parallel.py
    base_model_pp_plan = None  # pipeline stages would have to pass on every carried Y

    unsupported = tuple[str, ...]()
    """Switches of the family's own configuration that its CR-Net does not know."""

    def __post_init__(self, **kwargs) -> None:
        self.recompute = current_name(self.recompute)
        super().__post_init__(**kwargs)  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers. A configuration without `crosslayer_format` is one of 0.1."""
        is_old = "rank" in config_dict and "crosslayer_format" not in config_dict
        config_dict = {**config_dict, "crosslayer_format": 1} if is_old else config_dict
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    # The table of names, widths and biases: accounting, spectra and reports read it too

    def positions(self, layer_idx: int) -> dict[str, Position]:
        """The positions of a block by name: those of a Llama block. Families with others say which."""
        config: Any = self
        shape = self.attention_shape(layer_idx)
        query_width, key_value_width = shape.heads * shape.key_dim, shape.key_value_heads * shape.key_dim
        return decoder_positions(
            config.hidden_size, config.intermediate_size, query_width, key_value_width, *self.linear_biases()
        )

    def linear_biases(self) -> tuple[bool, bool, bool]:
        """Whether q, k and v have biases; o; the MLP."""
        attention = getattr(self, "attention_bias", False)
        return attention, attention, getattr(self, "mlp_bias", False)

    def attention_shape(self, layer_idx: int) -> AttentionShape:
        """Heads, key-value heads, their width, and the window where the block's attention slides."""
        config: Any = self
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        window = config.sliding_window if self.layer_kind(layer_idx) == "sliding_attention" else None
        return AttentionShape(heads, getattr(config, "num_key_value_heads", heads), width, width, window)

    def norm_parameters(self, layer_idx: int | None) -> int:
        """Parameters of the norms of a block; with None, of the one after the last block."""
        hidden_size: int = self.hidden_size  # type: ignore[attr-defined]
        return hidden_size if layer_idx is None else 2 * hidden_size

    def layer_kind(self, layer_idx: int) -> str:
        """ "full_attention" or "sliding_attention": which mask, and which rotation, the block's attention takes."""
        kinds = getattr(self, "layer_types", None)
        if kinds:
            return kinds[layer_idx]
        return "sliding_attention" if getattr(self, "sliding_window", None) else "full_attention"

    def places(self, layer_idx: int) -> dict[str, Position]:
        """`positions` with `carries` applied: without CR-Net nothing carries."""
        is_cross_layer = self.factorization == "cross_layer"
        return {
            name: replace(position, carries=is_cross_layer and self.carries.get(name, position.carries))
            for name, position in self.positions(layer_idx).items()
        }

    def starts_chain(self, layer_idx: int, position: str) -> bool:
        """Whether the position carries, and no block below has it: in CR-Net it is full rank there."""
        place = self.places(layer_idx).get(position)
        if place is None or not place.carries:
            return False
        return not any(position in self.positions(below) for below in range(layer_idx))

    @property
    def carried_positions(self) -> tuple[str, ...]:
        """Every position that carries, in the order in which the outputs travel from block to block."""
        names: dict[str, None] = {}
        for layer_idx in range(self.num_hidden_layers):  # type: ignore[attr-defined]
            names |= {name: None for name, place in self.places(layer_idx).items() if place.carries}
        return tuple(names)

    def linear_shape(self, position: str, layer_idx: int = 0) -> tuple[int, int]:
        """(in, out) features of a position."""
        place = self.positions(layer_idx)[position]
        return place.in_features, place.out_features

    def linear_rank(self, layer_idx: int, position: str) -> int | None:
        """Rank of the linear at layer `layer_idx` (from 0) and `position`; None where it is full rank."""
        if self.factorization == "dense":
            return None
        if layer_idx == 0 and self.first_layer_rank is not None:
            return self.first_layer_rank
        if self.factorization == "cross_layer" and (layer_idx == 0 or self.starts_chain(layer_idx, position)):
            return None
        for pattern, rank in self.rank_pattern.items():
            if _matches(pattern, f"layers.{layer_idx}.{position}"):
                return rank
        if self.rank is not None:
            return self.rank
        place, hidden_size = self.positions(layer_idx)[position], self.hidden_size  # type: ignore[attr-defined]
        if self.crosslayer_format == 1:
            return min(hidden_size // 4, place.in_features, place.out_features)
        return place.default_rank(hidden_size)

    # Checks across fields; called at construction and before saving

    def validate_architecture(self) -> None:
        """Raises ValueError where fields do not fit one another; `Raises` of the class lists them."""
        getattr(super(), "validate_architecture", lambda: None)()
        for name in self.unsupported:
            if value := getattr(self, name):
                raise ValueError(f"{name}={value!r} is not supported by {type(self).__name__}; leave it out.")
        hidden_size, heads = self.hidden_size, self.num_attention_heads  # type: ignore[attr-defined]
        if hidden_size % heads != 0 and not getattr(self, "head_dim", None):
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of num_attention_heads={heads}.")
        width = getattr(self, "qk_rope_head_dim", None) or getattr(self, "head_dim", None) or hidden_size // heads
        if width % 2 and hasattr(self, "rope_parameters"):
            raise ValueError(f"a head that rotations turn is {width} wide; choose an even width: they turn pairs.")
        for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
            if not 0 <= getattr(self, name, 0) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside 0..1: it is the share that is dropped.")
        if (window := getattr(self, "sliding_window", None)) is not None and window < 1:
            raise ValueError(f"sliding_window={window} must be at least 1 token; null turns it off.")
        key_value_heads = getattr(self, "num_key_value_heads", heads)
        if key_value_heads < 1 or heads % key_value_heads != 0:
            raise ValueError(f"num_key_value_heads={key_value_heads} does not divide num_attention_heads={heads}.")
        self._validate_recompute()
        if self.increment_activation is not None and self.factorization != "cross_layer":
            raise ValueError(
                f"increment_activation={self.increment_activation!r} belongs to factorization='cross_layer', not "
                f"{self.factorization!r}; remove it."
            )
        if not self.beta_epsilon > 0:
            raise ValueError(f"beta_epsilon={self.beta_epsilon} must be above 0: it keeps b away from zero.")
        for name in ("low_rank_initializer_range", "recompute_error_bound", "recompute_drift_bound"):
            if (value := getattr(self, name)) not in (None, "cola") and not value > 0:
                raise ValueError(f"{name}={value} must be above 0.")
        places = {n: p for index in range(self.num_hidden_layers) for n, p in self.positions(index).items()}  # type: ignore[attr-defined]
        for m in (place.mixture for place in places.values() if place.mixture is not None):
            if not 1 <= m.active <= m.experts:
                raise ValueError(f"num_experts_per_tok={m.active} is outside 1..{m.experts}, the number of experts.")
        if unknown := sorted(self.carries.keys() - places.keys()):
            raise ValueError(
                f"carries names positions {unknown} that the model has not; it has {', '.join(sorted(places))}."
            )
        self._validate_ranks()

    def _validate_recompute(self) -> None:
        check_policy(self.recompute, self.factorization)
        layers = self.num_hidden_layers  # type: ignore[attr-defined]
        if self.recompute_interval is not None:
            if self.recompute == "none":
                raise ValueError(
                    f"recompute_interval={self.recompute_interval} needs a policy that rebuilds states: choose "
                    f"recompute={', '.join(repr(name) for name in list(POLICIES)[1:])}, or remove the interval."
                )
            if not 1 <= self.recompute_interval <= layers:
                raise ValueError(
                    f"recompute_interval={self.recompute_interval} is outside 1..{layers}, the number "
                    "of layers; with the number of layers itself no state is kept in between."
                )

    def _validate_ranks(self) -> None:
        for pattern in self.rank_pattern:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"rank_pattern key {pattern!r} is not a regular expression: {error}.") from error
        unmatched, positions = set(self.rank_pattern), {}
        for layer_idx in range(self.num_hidden_layers):  # type: ignore[attr-defined]
            for position, place in self.positions(layer_idx).items():
                positions[position] = place
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
                self._check_rank(rank, name, place)
        if unmatched and self.factorization != "dense":
            raise ValueError(
                f"rank_pattern keys {sorted(unmatched)} match no low-rank linear; names are layers.N.position with N "
                f"below {self.num_hidden_layers} and position one of {', '.join(positions)}."  # type: ignore[attr-defined]
            )

    def _check_rank(self, rank: int, name: str, place: Position) -> None:
        shape = f"{place.matrices[0][0]} x {place.matrices[0][1]}"
        change = "change `rank`, `rank_pattern` or `first_layer_rank`"
        is_old = self.crosslayer_format == 1
        limit = min(place.in_features, place.out_features) if is_old else place.largest_rank
        if rank < 1 or limit < 1:
            raise ValueError(f"rank={rank} of {name} ({shape}) is outside 1..{max(limit, 0)}; {change}.")
        if rank > limit:
            raise ValueError(
                f"rank={rank} of {name} ({shape}) saves nothing: its factors have fewer parameters than the matrix up "
                f"to rank {limit}; {change}."
            )


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
