"""Numbers of tokens and bytes as people write them."""

import re

from ..errors import ConfigError

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def parse_tokens(text: str, name: str = "tokens") -> float:
    """1M, 500k, 2.5B, 1_000_000 -> a number. Raises ConfigError."""
    match = re.fullmatch(r"\s*([\d_.,]+(?:e\d+)?)\s*([kmbgt]?)\s*", text.lower())
    try:
        assert match is not None
        return float(match[1].replace("_", "").replace(",", "")) * _UNITS[match[2]]
    except (AssertionError, ValueError):
        raise ConfigError(f"{name}={text!r} is not a number of tokens; write 1M, 500k, 20B or 1000000") from None


def parse_bytes(text: str, name: str = "gpu_memory") -> float:
    """80GB (10^9), 80GiB (2^30), 512MB -> bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt])(i?)b?\s*", text.lower())
    try:
        assert match is not None
        power = "kmgt".index(match[2]) + 1
        return float(match[1]) * (1024**power if match[3] else 1000**power)
    except (AssertionError, ValueError):
        raise ConfigError(f"{name}={text!r} is not a size of memory; write 80GB, 80GiB or 512MB") from None


def show_bytes(size: float) -> str:
    """In GB, or MB below one."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


__all__ = ["parse_bytes", "parse_tokens", "show_bytes"]
