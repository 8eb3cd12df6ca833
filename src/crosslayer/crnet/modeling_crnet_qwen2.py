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
    """Llama's block; the configuration puts biases on q, k and v."""


class CRNetQwen2PreTrainedModel(CrossLayerPreTrainedModel):
    """Base of every CR-Net on Qwen2's block: configuration, initialisation, memory policies."""

    config_class = CRNetQwen2Config
    _no_split_modules = ["CRNetQwen2DecoderLayer"]


class CRNetQwen2Model(CrossLayerModel, CRNetQwen2PreTrainedModel):
    """The decoder, with the interface of `Qwen2Model`: token ids [B, T] -> hidden states [B, T, D]."""

    block_class = CRNetQwen2DecoderLayer


class CRNetQwen2ForCausalLM(CrossLayerForCausalLM, CRNetQwen2PreTrainedModel):
    """The decoder with a language-modelling head: token ids [B, T] -> logits [B, T, V], and a loss with labels."""

    body_class = CRNetQwen2Model


class CRNetQwen2ForSequenceClassification(CrossLayerForSequenceClassification, CRNetQwen2PreTrainedModel):
    """The decoder with a classifier on the last token that is not padding: [B, T] -> logits [B, num_labels]."""

    body_class = CRNetQwen2Model
