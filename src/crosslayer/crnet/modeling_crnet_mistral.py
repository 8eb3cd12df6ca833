"""CR-Net on Mistral's block, which is Llama's with a window over the last tokens."""

from .block import LlamaBlock
from .configuration_crnet_mistral import CRNetMistralConfig
from .model import (
    CrossLayerForCausalLM,
    CrossLayerForSequenceClassification,
    CrossLayerModel,
    CrossLayerPreTrainedModel,
)


class CRNetMistralDecoderLayer(LlamaBlock):
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
