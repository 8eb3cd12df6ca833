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
    """Llama's block; `sliding_window` of the configuration is the window."""


class CRNetMistralPreTrainedModel(CrossLayerPreTrainedModel):
    """Base of every CR-Net on Mistral's block: configuration, initialisation, memory policies."""

    config_class = CRNetMistralConfig
    _no_split_modules = ["CRNetMistralDecoderLayer"]


class CRNetMistralModel(CrossLayerModel, CRNetMistralPreTrainedModel):
    """The decoder, with the interface of `MistralModel`: token ids [B, T] -> hidden states [B, T, D]."""

    block_class = CRNetMistralDecoderLayer


class CRNetMistralForCausalLM(CrossLayerForCausalLM, CRNetMistralPreTrainedModel):
    """The decoder with a language-modelling head: token ids [B, T] -> logits [B, T, V], and a loss with labels."""

    body_class = CRNetMistralModel


class CRNetMistralForSequenceClassification(CrossLayerForSequenceClassification, CRNetMistralPreTrainedModel):
    """The decoder with a classifier on the last token that is not padding: [B, T] -> logits [B, num_labels]."""

    body_class = CRNetMistralModel
