"""CR-Net: language models whose linear outputs build on the previous layer's (arXiv 2509.18993).

Public names are loaded on first use, and the models registered with transformers then, so that `policies` and
`positions`, which accounting reads, cost neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME_OF = {
    "POSITIONS": "configuration_crnet",
    "CRNetConfig": "configuration_crnet",
    "CRNetForCausalLM": "modeling_crnet",
    "CRNetForSequenceClassification": "modeling_crnet",
    "CRNetModel": "modeling_crnet",
    "CRNetPreTrainedModel": "modeling_crnet",
    "CrossLayerLinear": "cross_layer_linear",
    "LowRankLinear": "cross_layer_linear",
}

if TYPE_CHECKING:
    from .configuration_crnet import POSITIONS, CRNetConfig
    from .cross_layer_linear import CrossLayerLinear, LowRankLinear
    from .modeling_crnet import (
        CRNetForCausalLM,
        CRNetForSequenceClassification,
        CRNetModel,
        CRNetPreTrainedModel,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(".registration", __name__)
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


__all__ = [
    "POSITIONS",
    "CRNetConfig",
    "CRNetForCausalLM",
    "CRNetForSequenceClassification",
    "CRNetModel",
    "CRNetPreTrainedModel",
    "CrossLayerLinear",
    "LowRankLinear",
]
