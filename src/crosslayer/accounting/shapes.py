"""What accounting needs to know of a model: its shape. Plain numbers, so that a plan needs neither torch nor a model.

Shape.of(config)                  from a configuration of ours or of a family that we know, or a mapping of its fields
named_shape("llama_7b", "cola")   from the table of the field's sizes

A shape is a list of layers, and a layer its positions by name: those of `config.places(layer)`, whatever they are.
Parameters, operations and bytes go over them, so that another family of models needs no change here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

from ..crnet import crnet_config
from ..crnet.configuration_cross_layer import CrossLayerFields
from ..crnet.families import FAMILIES, config_class, field_names
from ..crnet.positions import AttentionShape, Position
from ..errors import ConfigError, nearest_hint

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
T = TypeVar("T")
FACTORIZATIONS = ("dense", "cross_layer", "low_rank", "cola", "sltrain")
Factor = tuple[float, float, int, int]
"""(in, out, how many a token meets, how many there are) of matrices of one kind."""
READ_AT_ONCE = ("crnet", "llama", "crnet_mistral", "mistral")
"""Values of `model_type` whose blocks are Llama's: their fields are read without importing transformers."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A position of one layer.

    Args:
        position: where it lies and how wide it is; `position.carries`: whether it would in a CR-Net.
        rank: None where it is full rank.
        carries: whether its Y is part of the state that a block hands to the next.
        builds: whether it adds b Y of the block below.
    """

    position: Position
    rank: int | None = None
    carries: bool = False
    builds: bool = False

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.position.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.position.out_features

    @property
    def is_mixture(self) -> bool:
        """Whether it is the same position of several experts."""
        return self.position.mixture is not None

    @property
    def router(self) -> int:
        """Of a mixture: parameters of its router; 0 elsewhere."""
        return 0 if self.position.mixture is None else self.position.mixture.router

    @property
    def dense_entries(self) -> int:
        """Entries of its matrices if they are full rank, every expert's."""
        return sum(i * o * count for i, o, count in self.position.matrices)

    def factor_entries(self, rank: int) -> int:
        """Entries of A and B of that rank beside its matrices, every expert's."""
        return sum(rank * (i + o) * count for i, o, count in self.position.matrices)

    def factors(self, is_dense: bool = False) -> tuple[Factor, ...]:
        """Its matrices in order: the dense one, or A and B; those of a mixture's experts."""
        found: list[Factor] = []
        for i, o, count in self.position.matrices:
            mixture, rank = self.position.mixture, self.rank
            active = count if mixture is None else count * mixture.active // mixture.experts
            widths = [(i, o)] if rank is None or is_dense else [(i, rank), (rank, o)]
            found += [(inner, outer, active, count) for inner, outer in widths]
        return tuple(found)

    @property
    def kept_width(self) -> int:
        """Elements per token from which its increment follows: X A, or the increment itself of a mixture."""
        if self.is_mixture:
            return self.out_features
        if self.rank is None:  # its X is at hand where it starts a chain of carried Y
            return 0 if self.carries else self.out_features
        return self.rank


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A block: its linears by name, in the order of the forward, its attention, and parameters that are in neither.

    Args:
        norms: parameters of its norms.
        others: parameters of anything else; routers belong to their mixture.
    """

    linears: Mapping[str, Linear]
    attention: AttentionShape
    norms: int
    others: int = 0

    @cached_property
    def carried_width(self) -> int:
        """Width of the Y that the layer hands on, 5 D + 2 F in a Llama block whose heads have keys of their own."""
        return sum(linear.out_features for linear in self.linears.values() if linear.carries)

    def built_width(self, tensor: int = 1) -> float:
        """Width of the sums b Y_{l-1} + X A B, on one of `tensor` devices that split them."""
        return sum(x.out_features / self.split_of(name, tensor) for name, x in self.linears.items() if x.builds)

    @cached_property
    def low_rank_width(self) -> int:
        """Width of all X A together, those within mixtures left out."""
        return sum(linear.rank or 0 for linear in self.linears.values() if not linear.is_mixture)

    def split_of(self, name: str, tensor: int) -> int:
        """Over how many of `tensor` devices a position's output is split.

        What adds to the hidden states is summed, so whole; keys and values are where their heads are too few.
        """
        return 1 if self.adds(name) or not self.is_split(name, tensor) else tensor

    def is_split(self, name: str, tensor: int) -> bool:
        """Whether a position is split at all over `tensor` devices, by its outputs or by its inputs."""
        return not (name in ("k", "v") and self.attention.key_value_heads % tensor)

    def factors_on_one(self, name: str, tensor: int, is_dense: bool = False) -> tuple[Factor, ...]:
        """The matrices of a position, on one of `tensor` devices that split it.

        Layout R (crnet/tensor_parallel.py): of factors, the side that faces the split is split, the other whole.
        """
        linear, by_rows = self.linears[name], self.adds(name)
        factors = linear.factors(is_dense)
        if tensor == 1 or not self.is_split(name, tensor):
            return factors
        is_pair = not (linear.rank is None or linear.is_mixture or is_dense)
        is_split = [(index == 0) == by_rows if is_pair else True for index in range(len(factors))]
        return tuple(
            (i / (tensor if split and by_rows else 1), o / (tensor if split and not by_rows else 1), active, count)
            for (i, o, active, count), split in zip(factors, is_split, strict=True)
        )

    def in_attention(self, name: str) -> bool:
        """Whether a position lies in the attention, by its path in the block; otherwise in the MLP."""
        return "attn" in self.linears[name].position.module.partition(".")[0]

    def adds(self, name: str) -> bool:
        """Whether a position's output is added to the hidden states: o, down, a mixture, by name."""
        return self.linears[name].is_mixture or name.rpartition("_")[2] in ("o", "down")

    def group(self, *, attention: bool, adds: bool) -> tuple[str, ...]:
        """Positions of the attention or of the MLP that do or do not add to the hidden states."""
        return self._groups[attention, adds]

    @cached_property
    def _groups(self) -> dict[tuple[bool, bool], tuple[str, ...]]:
        kinds = ((attention, adds) for attention in (True, False) for adds in (True, False))
        return {
            kind: tuple(name for name in self.linears if (self.in_attention(name), self.adds(name)) == kind)
            for kind in kinds
        }

    @cached_property
    def query_width(self) -> int:
        """Width of all queries together."""
        return self.attention.heads * self.attention.key_dim

    @cached_property
    def value_width(self) -> int:
        """Width of the attention's output."""
        return self.attention.heads * self.attention.value_dim

    @cached_property
    def key_value_width(self) -> int:
        """Width of keys and values together."""
        return self.attention.key_value_heads * (self.attention.key_dim + self.attention.value_dim)

    @cached_property
    def mlp_width(self) -> int:
        """Width inside the MLP, of all active experts together."""
        total = 0
        for name in self.group(attention=False, adds=True):
            mixture = self.linears[name].position.mixture
            total += self.linears[name].in_features if mixture is None else mixture.active * mixture.width
        return total

    @cached_property
    def is_gated(self) -> bool:
        """Whether the MLP is act(gate) * up, not act(up) alone."""
        names = self.group(attention=False, adds=False)
        return not names or any("gate" in name for name in names)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Widths and ranks of a decoder.

    Args:
        factorization: as in `CRNetConfig`, and "sltrain" (W = B A + S, arXiv 2406.02214).
        density: the share of non-zeros in SLTrain's S.
        final_norm: parameters of the norm after the last block.
        position_embeddings: parameters of learned positions.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    factorization: str = "dense"
    density: float = 0.0
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    final_norm: int = 0
    position_embeddings: int = 0

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """The shape of a configuration or of a mapping of its fields; of a shape, itself.

        Ours say themselves which positions they have (`places`, `linear_rank`, `attention_shape`, `norm_parameters`);
        of others the CR-Net configuration of their family does. A mapping with `base` is a recipe's, which names the
        model whose shape it takes. Raises ConfigError for a family that is not known, and for fields that do not fit.
        """
        if isinstance(config, cls):
            return config
        if isinstance(config, Mapping):
            return _from_mapping(config)
        if not hasattr(config, "places"):
            return _from_mapping(config.get_text_config().to_dict())
        layers: list[Layer] = []
        for index in range(config.num_hidden_layers):
            places, own = config.places(index), config.positions(index)
            linears = {
                name: Linear(
                    position=replace(place, carries=config.carries.get(name, own[name].carries)),
                    rank=config.linear_rank(index, name),
                    carries=place.carries,
                    builds=place.carries and not config.starts_chain(index, name),
                )
                for name, place in places.items()
            }
            layer = Layer(
                linears=linears,
                attention=config.attention_shape(index),
                norms=config.norm_parameters(index),
                others=getattr(config, "other_parameters", lambda layer_idx: 0)(index),
            )
            layers.append(layers[-1] if layers and layers[-1] == layer else layer)
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            layers=tuple(layers),
            factorization=config.factorization,
            hidden_act=getattr(config, "hidden_act", "silu"),
            tie_word_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
            final_norm=config.norm_parameters(None),
            position_embeddings=getattr(config, "position_embedding_parameters", 0),
        )

    def factorized(self, factorization: str, rank: int | None = None, density: float = 0.0) -> "Shape":
        """The same widths with other linears; `rank` None is each position's default.

        Raises ConfigError for an unknown factorization, and for a rank at which factors save nothing.
        """
        _check_factorization(factorization)
        is_cross_layer = factorization == "cross_layer"
        layers: list[Layer] = []
        begun: set[str] = set()
        for index, layer in enumerate(self.layers):
            linears = {}
            for name, linear in layer.linears.items():
                carries = is_cross_layer and linear.position.carries
                is_full = factorization == "dense" or (
                    is_cross_layer and (index == 0 or (carries and name not in begun))
                )
                linears[name] = Linear(
                    position=linear.position,
                    rank=None if is_full else self._rank(name, linear, rank),
                    carries=carries,
                    builds=carries and name in begun,
                )
            begun |= linears.keys()
            made = replace(layer, linears=linears)
            layers.append(layers[-1] if layers and layers[-1] == made else made)
        return replace(self, factorization=factorization, density=density, layers=tuple(layers))

    def _rank(self, name: str, linear: Linear, rank: int | None) -> int:
        position = linear.position
        if rank is None:
            return position.default_rank(self.hidden_size)
        if not 1 <= rank <= position.largest_rank:
            raise ConfigError(
                f"rank={rank} is outside 1..{position.largest_rank}, the ranks at which the factors of {name}, "
                f"{position.matrices[0][0]} x {position.matrices[0][1]}, have fewer parameters than the matrix"
            )
        return rank

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @cached_property
    def chain_ends(self) -> tuple[tuple[int, int, str], ...]:
        """(last layer, first layer that carries it again or the number of layers, name) of each Y that ends below."""
        found, ended = [], dict[str, int]()
        for index in range(1, self.num_hidden_layers):
            above, below = self.layers[index], self.layers[index - 1]
            if above is below:
                continue
            for name, linear in below.linears.items():
                if linear.carries and not (name in above.linears and above.linears[name].carries):
                    ended[name] = index - 1
            for name, linear in above.linears.items():
                if linear.carries and name in ended:
                    found.append((ended.pop(name), index, name))
        return (*found, *((end, self.num_hidden_layers, name) for name, end in ended.items()))

    @property
    def rank(self) -> int | None:
        """The largest rank of the last layer; None where nothing is low rank."""
        return max((linear.rank for linear in self.layers[-1].linears.values() if linear.rank), default=None)

    @property
    def has_one_rank(self) -> bool:
        """Whether all that is low rank has the same."""
        return len({linear.rank for _, _, linear in self.linears() if linear.rank}) == 1

    def of_layers(self, count: Callable[[int], T]) -> list[T]:
        """What `count` gives for the index of each layer; asked once for layers in a row that are one object."""
        found: list[T] = []
        for index, layer in enumerate(self.layers):
            found.append(found[-1] if index and self.layers[index - 1] is layer else count(index))
        return found

    def linears(self) -> Iterator[tuple[int, str, Linear]]:
        """(layer, name, linear) of the whole model."""
        for index, layer in enumerate(self.layers):
            for name, linear in layer.linears.items():
                yield index, name, linear


def named_shape(name: str, factorization: str = "dense", rank: int | None = None, density: float = 0.0) -> Shape:
    """A size of the field's table. Raises ConfigError for a name that is not in it, with the nearest one."""
    if name not in SIZES:
        raise ConfigError(
            f"model={name!r} is unknown{nearest_hint(name, SIZES)}; allowed: {', '.join(SIZES)}, a config.json or a "
            "recipe (.yaml)"
        )
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    shape = _from_mapping({**dict(zip(names, SIZES[name], strict=True)), "factorization": "dense"})
    return shape.factorized(factorization, rank, density)


@dataclass(kw_only=True)
class _LlamaFields:
    """LlamaConfig's fields and defaults, as far as they decide a shape."""

    model_type: str = "crnet"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} of the model is not a whole number of at least 1")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(kw_only=True)
class _Config(CrossLayerFields, _LlamaFields):
    """CRNetConfig without transformers: the ranks and their checks are the configuration's own."""


_SHAPING = {f.name for f in fields(_Config) if not f.name.startswith(("recompute", "beta"))}


def _from_mapping(given: Mapping[str, Any]) -> Shape:
    """From the fields of a recipe's model section or of a config.json."""
    model_type = given.get("model_type", "crnet")
    is_ours = "base" in given or str(model_type).startswith("crnet")
    factorization = given.get("factorization", "cross_layer" if is_ours else "dense")
    _check_factorization(factorization)
    is_sltrain = factorization == "sltrain"
    values = {**given, "factorization": "dense" if is_sltrain else factorization}
    if "transformers_version" in given and "rank" in given:  # a checkpoint's; without this field, one of 0.1
        values.setdefault("crosslayer_format", 1)
    try:
        if "base" in given or model_type not in READ_AT_ONCE:
            config = _of_family(model_type, values)
        else:
            config = _Config(**{name: value for name, value in values.items() if name in _SHAPING})
            config.validate_architecture()
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(" ".join(str(error.__cause__ or error).split()).removesuffix(".")) from None
    shape = Shape.of(config)
    return shape.factorized("sltrain", given.get("rank")) if is_sltrain else shape


def _of_family(model_type: str, values: dict[str, Any]) -> Any:
    """The CR-Net configuration of another family, from a base's name and what differs, or from its own fields."""
    values = {name: value for name, value in values.items() if not name.startswith("recompute")}
    if "base" in values:
        return crnet_config(values.pop("base"), **values)
    bases = {stem: name for name, (stem, _) in FAMILIES.items()}
    base_type = bases.get(model_type, model_type)
    if base_type in FAMILIES:  # a config.json holds more than the shape
        known = field_names(config_class(base_type)).keys() - {"model_type"}
        values = {name: value for name, value in values.items() if name in known}
    return crnet_config({**values, "model_type": base_type})


def _check_factorization(name: Any) -> None:
    if name not in FACTORIZATIONS:
        raise ConfigError(f"factorization={name!r} is unknown; allowed: {', '.join(FACTORIZATIONS)}")


__all__ = ["FACTORIZATIONS", "SIZES", "Factor", "Layer", "Linear", "Shape", "named_shape"]
