"""The five methods of the paper by name: what each one asks of the configuration and of the callback."""

from typing import Any

from ..methods import check_method

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # method: (LoR2CConfig, LoR2CStructureCallback). One fuse and three injections are the best pair that the paper
    # reports for RoBERTa, from a grid of 0 to 6 each (arXiv 2503.00572).
    "lor2c": ({}, {}),
    "sharelor2c": ({"share_A": True}, {}),
    "mergelor2c": ({}, {"max_fuses": 1}),
    "injectlor2c": ({"injectable": True}, {"max_injections": 3}),
    "imlor2c": ({"injectable": True}, {"max_fuses": 1, "max_injections": 3}),
}


def lor2c_settings(method: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keyword arguments of LoR2CConfig, of LoR2CStructureCallback) for a method; no callback where those are empty.

    Raises ConfigError for an unknown method, with the nearest name.
    """
    for_config, for_callback = SETTINGS[check_method(method, SETTINGS)]
    return dict(for_config), dict(for_callback)
