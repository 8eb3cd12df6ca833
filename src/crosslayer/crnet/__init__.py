# ruff: noqa: F401
"""CR-Net: language models whose linear outputs build on the previous layer's (arXiv 2509.18993).

Names are loaded on first use, so that the light tables (`policies`, `positions`) cost neither torch nor transformers.

The files here are flat: all but this one, `families` and `registration` import only torch, transformers and each other,
by relative imports, so that a saved checkpoint carries those that it needs and loads where crosslayer is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .families import FAMILIES, crnet_config

_HOME_OF = {
    "POSITIONS": "configuration_crnet",
    "CrossLayerLinear": "cross_layer_linear",
    "LowRankExperts": "mixture",
    "LowRankLinear": "cross_layer_linear",
} | {
    f"{prefix}{name}": f"{'configuration' if name == 'Config' else 'modeling'}_{stem}"
    for stem, prefix in FAMILIES.values()
    for name in (
        "Config",
        "Model",
        "PreTrainedModel",
        "LMHeadModel" if stem == "crnet_gpt2" else "ForCausalLM",
        "ForSequenceClassification",
    )
}

if TYPE_CHECKING:
    from .configuration_crnet import POSITIONS, CRNetConfig
    from .cross_layer_linear import CrossLayerLinear, LowRankLinear
    from .mixture import LowRankExperts
    from .modeling_crnet import CRNetForCausalLM, CRNetForSequenceClassification, CRNetModel, CRNetPreTrainedModel


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


__all__ = sorted([*_HOME_OF, "FAMILIES", "crnet_config"])
