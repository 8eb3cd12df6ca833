"""Training Transformers through low-rank structure across layers.

With this package imported, transformers' Auto classes know its models and PEFT knows LoR2C, whether those are imported
before or after it. Importing it imports neither of them, and public names are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .on_import import after

_HOME_OF = {
    "CRNetConfig": "crosslayer.crnet",
    "CRNetForCausalLM": "crosslayer.crnet",
    "CRNetForSequenceClassification": "crosslayer.crnet",
    "CRNetModel": "crosslayer.crnet",
    "crnet_config": "crosslayer.crnet",
    "LoR2CConfig": "crosslayer.lor2c",
    "LoR2CModel": "crosslayer.lor2c",
    "LoR2CStructureCallback": "crosslayer.lor2c",
}

if TYPE_CHECKING:
    from crosslayer.crnet import (
        CRNetConfig,
        CRNetForCausalLM,
        CRNetForSequenceClassification,
        CRNetModel,
        crnet_config,
    )
    from crosslayer.lor2c import LoR2CConfig, LoR2CModel, LoR2CStructureCallback

    __version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata  # takes as long as the rest of this file ten times

        return metadata.version("crosslayer")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'crosslayer' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


_AUTO, _OURS = "transformers.models.auto", "crosslayer.crnet"
after((f"{_AUTO}.configuration_auto", f"{_OURS}.configuration_crnet*"), f"{_OURS}.registration:register_configs")
after((f"{_AUTO}.modeling_auto", f"{_OURS}.model"), f"{_OURS}.registration:register_models")
after(("peft",), "crosslayer.lor2c:")

__all__ = [
    "CRNetConfig",
    "CRNetForCausalLM",
    "CRNetForSequenceClassification",
    "CRNetModel",
    "LoR2CConfig",
    "LoR2CModel",
    "LoR2CStructureCallback",
    "crnet_config",
]
