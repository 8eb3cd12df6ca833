"""Which blocks tensor parallelism can split, and over how many ranks; tensor_parallel.py does it.

Imports nothing heavy, so that plans and models are refused by one rule.
"""

from collections.abc import Mapping

from .positions import AttentionShape, Position

COLUMNS, ROWS = ("q", "k", "v", "gate", "up"), ("o", "down")
"""Positions that tensor parallelism splits by their outputs, and by their inputs (tensor_parallel.py)."""


def check_split(name: str, places: Mapping[str, Position], attention: AttentionShape, ranks: int) -> None:
    """Raises ValueError for a block, by its positions, that cannot be split over so many ranks; says why."""
    if unknown := sorted(places.keys() - {*COLUMNS, *ROWS}):
        raise ValueError(
            f"tensor parallelism of {name} is not known: {', '.join(unknown)} (experts and latent attention) would "
            "need another layout. Use FSDP2: it shards every family."
        )
    widths = (("num_attention_heads", attention.heads), ("intermediate_size", places["down"].in_features))
    for what, count in widths:
        if count % ranks != 0:
            raise ValueError(f"{what}={count} cannot be split over {ranks} ranks; choose a number that divides it.")
    if attention.key_value_heads % ranks != 0 and ranks % attention.key_value_heads != 0:
        raise ValueError(
            f"num_key_value_heads={attention.key_value_heads} and {ranks} ranks: neither divides the other; choose "
            "another number of ranks."
        )
