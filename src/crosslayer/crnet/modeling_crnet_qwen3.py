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
    """Llama's block, with normed queries and keys."""

    attention_class = HeadNormAttention


class CRNetQwen3PreTrainedModel(CrossLayerPreTrainedModel):
    """Base of every CR-Net on Qwen3's block: configuration, initialisation, memory policies."""

    config_class = CRNetQwen3Config
    _no_split_modules = ["CRNetQwen3DecoderLayer"]


class CRNetQwen3Model(CrossLayerModel, CRNetQwen3PreTrainedModel):
    """The decoder, with the interface of `Qwen3Model`: token ids [B, T] -> hidden states [B, T, D]."""

    block_class = CRNetQwen3DecoderLayer


class CRNetQwen3ForCausalLM(CrossLayerForCausalLM, CRNetQwen3PreTrainedModel):
    """The decoder with a language-modelling head: token ids [B, T] -> logits [B, T, V], and a loss with labels."""

    body_class = CRNetQwen3Model


class CRNetQwen3ForSequenceClassification(CrossLayerForSequenceClassification, CRNetQwen3PreTrainedModel):
    """The decoder with a classifier on the last token that is not padding: [B, T] -> logits [B, num_labels]."""

    body_class = CRNetQwen3Model
