"""LoR2C: fine-tuning with one low-rank residual around each whole block (arXiv 2503.00572), as a PEFT method.

Importing this registers `LOR2C` with PEFT, after which `get_peft_model`, `PeftModel.from_pretrained`, `AutoPeftModel*`,
`model.add_adapter` and TRL's `peft_config=` know it.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .blocks import AdaptedBlocks
from .callback import LoR2CStructureCallback
from .config import LoR2CConfig, LoR2CPeftType
from .layer import LoR2CLayer
from .methods import SETTINGS, lor2c_settings
from .model import LoR2CModel
from .structure import Span, Structure

# `peft.utils.register_peft_method` only takes names that PEFT's own enumeration knows; these tables are what it fills.
PEFT_TYPE_TO_CONFIG_MAPPING[LoR2CPeftType.LOR2C] = LoR2CConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[LoR2CPeftType.LOR2C] = LoR2CModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[LoR2CPeftType.LOR2C] = LoR2CModel.prefix  # type: ignore[index]

__all__ = [
    "SETTINGS",
    "AdaptedBlocks",
    "LoR2CConfig",
    "LoR2CLayer",
    "LoR2CModel",
    "LoR2CStructureCallback",
    "Span",
    "Structure",
    "lor2c_settings",
]
