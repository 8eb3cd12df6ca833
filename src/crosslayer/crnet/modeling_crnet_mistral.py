"""CR-Net on Mistral's block, which is Llama's with a window over the last tokens."""

from .configuration_crnet_mistral import CRNetMistralConfig
from .model import (
    CrossLayerForCausalLM,
    CrossLayerForSequenceClassification,
    CrossLayerModel,
    CrossLayerPreTrainedModel,
)
from .modeling_crnet import CRNetDecoderLayer


class CRNetMistralDecoderLayer(CRNetDecoderLayer):
    pass


class CRNetMistralPreTrainedModel(CrossLayerPreTrainedModel):
    config_class = CRNetMistralConfig
    _no_split_modules = ["CRNetMistralDecoderLayer"]


class CRNetMistralModel(CrossLayerModel, CRNetMistralPreTrainedModel):
    block_class = CRNetMistralDecoderLayer


class CRNetMistralForCausalLM(CrossLayerForCausalLM, CRNetMistralPreTrainedModel):
    body_class = CRNetMistralModel


class CRNetMistralForSequenceClassification(CrossLayerForSequenceClassification, CRNetMistralPreTrainedModel):
    body_class = CRNetMistralModel


__all__ = [
    "CRNetMistralForCausalLM",
    "CRNetMistralForSequenceClassification",
    "CRNetMistralModel",
    "CRNetMistralPreTrainedModel",
]
