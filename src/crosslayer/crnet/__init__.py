"""CR-Net: language models whose linear outputs build on the previous layer's (arXiv 2509.18993)."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_crnet import POSITIONS, CRNetConfig
from .cross_layer_linear import CrossLayerLinear, LowRankLinear
from .modeling_crnet import (
    CRNetForCausalLM,
    CRNetForSequenceClassification,
    CRNetModel,
    CRNetPreTrainedModel,
)

AutoConfig.register(CRNetConfig.model_type, CRNetConfig)
CRNetConfig.register_for_auto_class()
for _auto_class, _model_class in (
    (AutoModel, CRNetModel),
    (AutoModelForCausalLM, CRNetForCausalLM),
    (AutoModelForSequenceClassification, CRNetForSequenceClassification),
):
    _auto_class.register(CRNetConfig, _model_class)
    _model_class.register_for_auto_class(_auto_class.__name__)

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
