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
    """Llama's block, as block.py has it."""


class CRNetPreTrainedModel(CrossLayerPreTrainedModel):
    """Base of every CR-Net on Llama's block: configuration, initialisation, memory policies."""

    config_class = CRNetConfig
    _no_split_modules = ["CRNetDecoderLayer"]


class CRNetModel(CrossLayerModel, CRNetPreTrainedModel):
    """The decoder, with the interface of `LlamaModel`: token ids [B, T] -> hidden states [B, T, D]."""

    block_class = CRNetDecoderLayer


class CRNetForCausalLM(CrossLayerForCausalLM, CRNetPreTrainedModel):
    """The decoder with a language-modelling head: token ids [B, T] -> logits [B, T, V], and a loss with labels."""

    body_class = CRNetModel


class CRNetForSequenceClassification(CrossLayerForSequenceClassification, CRNetPreTrainedModel):
    """The decoder with a classifier on the last token that is not padding: [B, T] -> logits [B, num_labels]."""

    body_class = CRNetModel
