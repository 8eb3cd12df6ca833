"""CR-Net on Qwen3's block: Llama's, with a norm over each head's queries and keys, and heads as wide as they like."""

from .configuration_crnet_qwen3 import CRNetQwen3Config
from .functions import Attention, CarriedRMSNorm
from .model import (
    CrossLayerForCausalLM,
    CrossLayerForSequenceClassification,
    CrossLayerModel,
    CrossLayerPreTrainedModel,
)
from .modeling_crnet import CRNetDecoderLayer


class CRNetQwen3Attention(Attention):
    norm_class = CarriedRMSNorm

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.q_norm = self.norm_class(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = self.norm_class(self.head_dim, eps=config.rms_norm_eps)

    def normalise(self, query, key):
        return self.q_norm(query), self.k_norm(key)


class CRNetQwen3DecoderLayer(CRNetDecoderLayer):
    attention_class = CRNetQwen3Attention


class CRNetQwen3PreTrainedModel(CrossLayerPreTrainedModel):
    config_class = CRNetQwen3Config
    _no_split_modules = ["CRNetQwen3DecoderLayer"]


class CRNetQwen3Model(CrossLayerModel, CRNetQwen3PreTrainedModel):
    block_class = CRNetQwen3DecoderLayer


class CRNetQwen3ForCausalLM(CrossLayerForCausalLM, CRNetQwen3PreTrainedModel):
    body_class = CRNetQwen3Model


class CRNetQwen3ForSequenceClassification(CrossLayerForSequenceClassification, CRNetQwen3PreTrainedModel):
    body_class = CRNetQwen3Model


__all__ = [
    "CRNetQwen3ForCausalLM",
    "CRNetQwen3ForSequenceClassification",
    "CRNetQwen3Model",
    "CRNetQwen3PreTrainedModel",
]
