"""What accounting needs to know of a model: its shape. Plain numbers, so that a plan needs neither torch nor a model.

Shape.of(config)                  from a CRNetConfig, any LLaMA-family configuration, or a mapping of its fields
named_shape("llama_7b", "cola")   from the table of the field's sizes
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError

POSITIONS = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION_POSITIONS = POSITIONS[:4]

SIZES = {
    # hidden, MLP, heads, key-value heads, layers: GaLore's, SLTrain's and CoLA's configurations, and LLaMA 2's 70B.
    "llama_60m": (512, 1376, 8, 8, 8),
    "llama_130m": (768, 2048, 12, 12, 12),
    "llama_350m": (1024, 2736, 16, 16, 24),
    "llama_1b": (2048, 5461, 32, 32, 24),
    "llama_3b": (2560, 6848, 32, 32, 32),
    "llama_7b": (4096, 11008, 32, 32, 32),
    "llama_13b": (5120, 13824, 40, 40, 40),
    "llama_70b": (8192, 28672, 64, 8, 80),
}
SIZES_VOCABULARY = 32000


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Widths and ranks of a LLaMA-family model.

    `factorization` as in `CRNetConfig`, and "sltrain" (W = B A + S, arXiv 2406.02214). `ranks[layer][position]` is None
    where the linear is full rank; `density` is the share of non-zeros in SLTrain's S.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    factorization: str = "dense"
    ranks: tuple[tuple[int | None, ...], ...] = ()
    density: float = 0.0
    increment_activation: str | None = None
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """The shape of a configuration (its `linear_rank` decides the ranks, where it has one) or of a mapping."""
        if isinstance(config, cls):
            return config
        if isinstance(config, Mapping):
            return _from_mapping(config)
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        linear_rank = getattr(config, "linear_rank", lambda layer_idx, position: None)
        return cls(
            **{name: getattr(config, name) for name in _REQUIRED},
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            factorization=getattr(config, "factorization", "dense"),
            ranks=tuple(tuple(linear_rank(layer, p) for p in POSITIONS) for layer in range(layers)),
            increment_activation=getattr(config, "increment_activation", None),
            hidden_act=getattr(config, "hidden_act", "silu"),
            tie_word_embeddings=getattr(config, "tie_word_embeddings", False),
            attention_bias=getattr(config, "attention_bias", False),
            mlp_bias=getattr(config, "mlp_bias", False),
        )

    def factorized(self, factorization: str, rank: int | None = None, density: float = 0.0) -> "Shape":
        """The same widths with other linears. `rank` None is hidden_size // 4, at most the narrower side.

        Raises ConfigError for an unknown factorization, and for a rank outside 1..min(in, out) of a position.
        """
        if factorization not in ("dense", "cross_layer", "low_rank", "cola", "sltrain"):
            raise ConfigError(
                f"factorization={factorization!r} is unknown; allowed: dense, cross_layer, low_rank, cola, sltrain"
            )
        shape = replace(self, factorization=factorization, density=density, increment_activation=None)
        layers = range(self.num_hidden_layers)
        if factorization == "dense":
            return replace(shape, ranks=tuple((None,) * len(POSITIONS) for _ in layers))
        row = []
        for position in POSITIONS:
            limit = min(self.linear_shape(position))
            chosen = min(self.hidden_size // 4, limit) if rank is None else rank
            if not 1 <= chosen <= limit:
                raise ConfigError(
                    f"rank={rank} is outside 1..{limit}, the smaller width of {position}_proj "
                    f"{self.linear_shape(position)}; lower it"
                )
            row.append(chosen)
        full_first = factorization == "cross_layer"
        none = (None,) * len(POSITIONS)
        return replace(shape, ranks=tuple(none if full_first and i == 0 else tuple(row) for i in layers))

    def linear_shape(self, position: str) -> tuple[int, int]:
        """(in, out) features of a linear position."""
        query = self.num_attention_heads * self.head_dim
        key_value = self.num_key_value_heads * self.head_dim
        return {
            "q": (self.hidden_size, query),
            "k": (self.hidden_size, key_value),
            "v": (self.hidden_size, key_value),
            "o": (query, self.hidden_size),
            "gate": (self.hidden_size, self.intermediate_size),
            "up": (self.hidden_size, self.intermediate_size),
            "down": (self.intermediate_size, self.hidden_size),
        }[position]

    def linear_rank(self, layer_idx: int, position: str) -> int | None:
        """None where the linear is full rank."""
        return self.ranks[layer_idx][POSITIONS.index(position)] if self.ranks else None

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def carried_width(self) -> int:
        """Width of the seven Y together, 5 D + 2 F when all heads have keys of their own."""
        return sum(self.linear_shape(position)[1] for position in POSITIONS)

    def carries(self, layer_idx: int) -> bool:
        """Whether the layer adds b Y_{l-1}."""
        return self.factorization == "cross_layer" and layer_idx > 0


def named_shape(name: str, factorization: str = "dense", rank: int | None = None, density: float = 0.0) -> Shape:
    """A size of the field's table. Raises ConfigError for a name that is not in it, with the nearest one."""
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, n=1, cutoff=0.5)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise ConfigError(
            f"model={name!r} is unknown{hint}; allowed: {', '.join(SIZES)}, a config.json or a recipe (.yaml)"
        )
    hidden, mlp, heads, key_value_heads, layers = SIZES[name]
    shape = Shape(
        vocab_size=SIZES_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=hidden // heads,
    )
    return shape.factorized(factorization, rank, density)


_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LLAMA_DEFAULTS = dict(zip(_REQUIRED, (32000, 4096, 11008, 32, 32), strict=True))


def _from_mapping(fields: Mapping[str, Any]) -> Shape:
    """From the fields of a recipe's model section or of a config.json, with LlamaConfig's defaults."""
    values = {name: fields.get(name, default) for name, default in _LLAMA_DEFAULTS.items()}
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}={value!r} of the model is not a whole number of at least 1")
    if fields.get("rank_pattern") or fields.get("first_layer_rank"):
        raise ConfigError("rank_pattern and first_layer_rank are read by crosslayer.accounting from a CRNetConfig only")
    heads = values["num_attention_heads"]
    shape = Shape(
        **values,
        num_key_value_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or values["hidden_size"] // heads,
        hidden_act=fields.get("hidden_act", "silu"),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        attention_bias=bool(fields.get("attention_bias", False)),
        mlp_bias=bool(fields.get("mlp_bias", False)),
    )
    default = "cross_layer" if fields.get("model_type", "crnet") == "crnet" else "dense"
    return shape.factorized(fields.get("factorization", default), fields.get("rank"))


__all__ = ["ATTENTION_POSITIONS", "POSITIONS", "SIZES", "Shape", "named_shape"]
