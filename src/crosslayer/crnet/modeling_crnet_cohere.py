"""CR-Net on Cohere's block, in which attention and MLP read the same normed hidden states."""

import torch
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereRotaryEmbedding, apply_rotary_pos_emb

from .block import CrossLayerBlock, Stage
from .configuration_crnet_cohere import CRNetCohereConfig
from .functions import Attention, CarriedLayerNorm, GatedMLP
from .model import (
    CrossLayerForCausalLM,
    CrossLayerForSequenceClassification,
    CrossLayerModel,
    CrossLayerPreTrainedModel,
)


class CRNetCohereLayerNorm(CarriedLayerNorm):
    """Layer norm without a bias."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps, bias=False)


class CRNetCohereHeadLayerNorm(CarriedLayerNorm):
    """Layer norm over each head, with weights [heads, head_dim] of its own."""

    def __init__(self, heads: int, head_dim: int, eps: float) -> None:
        super().__init__(head_dim, eps, bias=False)
        self.weight = nn.Parameter(torch.ones(heads, head_dim))

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """[..., heads, head_dim] -> the same, each head normed in float32, in the weight's dtype."""
        width = heads.shape[-1:]
        normed = nn.functional.layer_norm(heads.float(), width, eps=self.variance_epsilon) * self.weight.float()
        return normed.to(self.weight.dtype)


class CRNetCohereAttention(Attention):
    """Attention whose rotation turns neighbouring pairs; with `use_qk_norm`, queries and keys are normed first."""

    rotate = staticmethod(apply_rotary_pos_emb)

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.use_qk_norm = config.use_qk_norm
        if config.use_qk_norm:
            shape = config.attention_shape(layer_idx)
            self.q_norm = CRNetCohereHeadLayerNorm(shape.heads, shape.key_dim, config.layer_norm_eps)
            self.k_norm = CRNetCohereHeadLayerNorm(shape.key_value_heads, shape.key_dim, config.layer_norm_eps)

    def normalise(self, query, key):
        """Queries and keys [B, T, heads, head_dim], each head normed if `use_qk_norm`."""
        return (self.q_norm(query), self.k_norm(key)) if self.use_qk_norm else (query, key)


class CRNetCohereDecoderLayer(CrossLayerBlock):
    """h_l = h + Y_o + Y_down, where attention and MLP both read one norm of h."""

    stages = (
        Stage(("h",), "input_layernorm", ("q", "k", "v", "gate", "up")),
        Stage(("q", "k", "v"), "self_attn", ("o",), adds=("o",), takes_arguments=True),
        Stage(("gate", "up"), "mlp", ("down",), adds=("down",)),
    )

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = CRNetCohereAttention(config, layer_idx)
        self.mlp = GatedMLP(config.hidden_act)
        self.input_layernorm = CRNetCohereLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.add_linears(config)


class CRNetCoherePreTrainedModel(CrossLayerPreTrainedModel):
    """Base of every CR-Net on Cohere's block: configuration, initialisation, memory policies."""

    config_class = CRNetCohereConfig
    _no_split_modules = ["CRNetCohereDecoderLayer"]


class CRNetCohereModel(CrossLayerModel, CRNetCoherePreTrainedModel):
    """The decoder, with the interface of `CohereModel`: token ids [B, T] -> hidden states [B, T, D]."""

    block_class = CRNetCohereDecoderLayer
    norm_class = CRNetCohereLayerNorm
    rotary_class = CohereRotaryEmbedding


class CRNetCohereForCausalLM(CrossLayerForCausalLM, CRNetCoherePreTrainedModel):
    """The decoder with a language-modelling head: token ids [B, T] -> logits [B, T, V], and a loss with labels."""

    body_class = CRNetCohereModel

    @property
    def has_plain_head(self) -> bool:
        """False: the logits are scaled, so that the fused loss does not apply."""
        return False

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> logits [B, T, V], times `logit_scale`."""
        return super().head(hidden_states) * self.config.logit_scale


class CRNetCohereForSequenceClassification(CrossLayerForSequenceClassification, CRNetCoherePreTrainedModel):
    """The decoder with a classifier on the last token that is not padding: [B, T] -> logits [B, num_labels]."""

    body_class = CRNetCohereModel
