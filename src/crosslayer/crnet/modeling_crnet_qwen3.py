"""CR-Net on Qwen3's block: Llama's, with a norm over each head's queries and keys, and heads as wide as they like."""

from .block import LlamaBlock
from .configuration_crnet_qwen3 import CRNetQwen3Config
from .functions import HeadNormAttention
from .model import (
    CrossLayerForCausalLM,
    CrossLayerForSequenceClassification,
    CrossLayerModel,
    CrossLayerPreTrainedModel,
)


class CRNetQwen3DecoderLayer(LlamaBlock):
    attention_class = HeadNormAttention


class CRNetQwen3PreTrainedModel(CrossLayerPreTrainedModel):
    config_class = CRNetQwen3Config
    _no_split_modules = ["CRNetQwen3DecoderLayer"]


class CRNetQwen3Model(CrossLayerModel, CRNetQwen3PreTrainedModel):
    block_class = CRNetQwen3DecoderLayer


class CRNetQwen3ForCausalLM(CrossLayerForCausalLM, CRNetQwen3PreTrainedModel):
    body_class = CRNetQwen3Model


class CRNetQwen3ForSequenceClassification(CrossLayerForSequenceClassification, CRNetQwen3PreTrainedModel):
    body_class = CRNetQwen3Model
