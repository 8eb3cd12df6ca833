"""Training Transformers through low-rank structure across layers.

Importing the package registers its models with transformers' Auto classes and LoR2C with PEFT. Only the command line,
which has to answer `--help` at once, puts that off until a verb needs it; public names are loaded on first use there.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

_IS_COMMAND_LINE = Path(sys.argv[0]).stem in ("crosslayer", "-m")  # "-m": python -m crosslayer

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


if not _IS_COMMAND_LINE:
    import_module("crosslayer.crnet.registration")
    import_module("crosslayer.lor2c")

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
