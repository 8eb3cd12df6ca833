"""CR-Net on Llama's block: CRNetModel, CRNetForCausalLM, CRNetForSequenceClassification."""

from .block import LlamaBlock
from .configuration_crnet import CRNetConfig
from .model import (
    CrossLayerForCausalLM,
    CrossLayerForSequenceClassification,
    CrossLayerModel,
    CrossLayerPreTrainedModel,
)


class CRNetDecoderLayer(LlamaBlock):
    pass


class CRNetPreTrainedModel(CrossLayerPreTrainedModel):
    config_class = CRNetConfig
    _no_split_modules = ["CRNetDecoderLayer"]


class CRNetModel(CrossLayerModel, CRNetPreTrainedModel):
    block_class = CRNetDecoderLayer


class CRNetForCausalLM(CrossLayerForCausalLM, CRNetPreTrainedModel):
    body_class = CRNetModel


class CRNetForSequenceClassification(CrossLayerForSequenceClassification, CRNetPreTrainedModel):
    body_class = CRNetModel
