"""Where the linears of a block lie, how wide they are, and which ranks pay.

Imports nothing heavy, so that accounting and the configurations share one table.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts as one position: gated MLPs of width `width`, `active` of `experts` for each token.

    `router` counts the parameters that choose them.
    """

    experts: int
    active: int
    width: int
    router: int


@dataclass(frozen=True)
class Position:
    """A linear of a block by name, for example "q".

    Args:
        module: where it lies in the block, "self_attn.q_proj".
        in_features, out_features: widths of X and Y.
        bias: whether it has one.
        carries: whether Y_l builds on Y_{l-1} in CR-Net; otherwise its increment stands alone.
        mixture: the experts, where the position is not one linear but a mixture of them.
    """

    module: str
    in_features: int
    out_features: int
    bias: bool = False
    carries: bool = True
    mixture: Mixture | None = None

    @property
    def matrices(self) -> tuple[tuple[int, int, int], ...]:
        """(in, out, how many of them) of its dense matrices: one, or gate, up and down of every expert."""
        if self.mixture is None:
            return ((self.in_features, self.out_features, 1),)
        experts, width = self.mixture.experts, self.mixture.width
        return ((self.in_features, width, 2 * experts), (width, self.out_features, experts))

    @property
    def largest_rank(self) -> int:
        """The largest rank at which its factors have fewer parameters than the matrices: r (in + out) < in out."""
        return min((i * o - 1) // (i + o) for i, o, _ in self.matrices)

    def default_rank(self, hidden_size: int) -> int:
        """A quarter of the hidden size (arXiv 2509.18993), and no more than half of what would save nothing.

        The second bound is our choice: in narrow matrices, such as fine-grained experts or shared keys, a quarter of
        the hidden size has more parameters than the matrix. In a mixture a multiple of 8, which grouped products want.
        """
        half = min(i * o // (2 * (i + o)) for i, o, _ in self.matrices)
        if self.mixture is not None and half > 8:
            half -= half % 8
        return max(1, min(hidden_size // 4, half))


@dataclass(frozen=True)
class AttentionShape:
    """Heads of a block's attention: queries and keys `key_dim` wide, values `value_dim`; `window` where it slides."""

    heads: int
    key_value_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None


def decoder_positions(
    hidden_size: int,
    intermediate_size: int,
    query_width: int,
    key_value_width: int,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
) -> dict[str, Position]:
    """The seven positions of a Llama block, in the order in which their outputs are carried from block to block."""
    return {
        "q": Position("self_attn.q_proj", hidden_size, query_width, qkv_bias),
        "k": Position("self_attn.k_proj", hidden_size, key_value_width, qkv_bias),
        "v": Position("self_attn.v_proj", hidden_size, key_value_width, qkv_bias),
        "o": Position("self_attn.o_proj", query_width, hidden_size, o_bias),
        **gated_mlp_positions("mlp", hidden_size, intermediate_size, mlp_bias),
    }


def gated_mlp_positions(
    module: str, hidden_size: int, width: int, bias: bool = False, prefix: str = ""
) -> dict[str, Position]:
    """gate, up and down of a gated MLP at `module`, with a prefix to their names."""
    return {
        f"{prefix}gate": Position(f"{module}.gate_proj", hidden_size, width, bias),
        f"{prefix}up": Position(f"{module}.up_proj", hidden_size, width, bias),
        f"{prefix}down": Position(f"{module}.down_proj", width, hidden_size, bias),
    }
