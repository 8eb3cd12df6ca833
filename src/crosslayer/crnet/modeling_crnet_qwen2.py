"""CR-Net on Qwen2's block, which is Llama's with biases on q, k and v."""

from .block import LlamaBlock
from .configuration_crnet_qwen2 import CRNetQwen2Config
from .model import (
    CrossLayerForCausalLM,
    CrossLayerForSequenceClassification,
    CrossLayerModel,
    CrossLayerPreTrainedModel,
)


class CRNetQwen2DecoderLayer(LlamaBlock):
    pass


class CRNetQwen2PreTrainedModel(CrossLayerPreTrainedModel):
    config_class = CRNetQwen2Config
    _no_split_modules = ["CRNetQwen2DecoderLayer"]


class CRNetQwen2Model(CrossLayerModel, CRNetQwen2PreTrainedModel):
    block_class = CRNetQwen2DecoderLayer


class CRNetQwen2ForCausalLM(CrossLayerForCausalLM, CRNetQwen2PreTrainedModel):
    body_class = CRNetQwen2Model


class CRNetQwen2ForSequenceClassification(CrossLayerForSequenceClassification, CRNetQwen2PreTrainedModel):
    body_class = CRNetQwen2Model
