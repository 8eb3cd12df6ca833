"""CR-Net on Gemma 3's block: four norms of 1 + w, two of them between Y and h, and two kinds of layers.

h = h + norm(Y) can be run backwards as well as h = h + Y: Y is known.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding, Gemma3TextScaledWordEmbedding

from .block import LlamaBlock, Stage
from .configuration_crnet_gemma3 import CRNetGemma3Config
from .functions import CarriedOffsetRMSNorm, HeadNormAttention
from .model import (
    CrossLayerForCausalLM,
    CrossLayerForSequenceClassification,
    CrossLayerModel,
    CrossLayerPreTrainedModel,
)


class CRNetGemma3Attention(HeadNormAttention):
    """Attention with normed queries and keys; scores are scaled by query_pre_attn_scalar^(-1/2)."""

    norm_class = CarriedOffsetRMSNorm

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.scaling = config.query_pre_attn_scalar**-0.5


class CRNetGemma3DecoderLayer(LlamaBlock):
    """Llama's block with norms on both sides of attention and MLP: h + norm(Y) where Llama has h + Y."""

    attention_class = CRNetGemma3Attention
    norm_class = CarriedOffsetRMSNorm
    activation_field = "hidden_activation"
    stages = (
        Stage(("h",), "input_layernorm", ("q", "k", "v")),
        Stage(("q", "k", "v"), "self_attn", ("o",), ("o",), through="post_attention_layernorm", takes_arguments=True),
        Stage(("h",), "pre_feedforward_layernorm", ("gate", "up")),
        Stage(("gate", "up"), "mlp", ("down",), ("down",), through="post_feedforward_layernorm"),
    )

    def add_functions(self, config, layer_idx: int) -> None:
        """As in Llama's block, and the norms before and after the MLP."""
        super().add_functions(config, layer_idx)
        self.pre_feedforward_layernorm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)


class CRNetGemma3PreTrainedModel(CrossLayerPreTrainedModel):
    """Base of every CR-Net on Gemma 3's block: configuration, initialisation, memory policies."""

    config_class = CRNetGemma3Config
    _no_split_modules = ["CRNetGemma3DecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the other families; buffers of transformers' embedding and rotation are made again."""
        super()._init_weights(module)
        if isinstance(module, Gemma3TextScaledWordEmbedding):
            init.constant_(module.embed_scale, module.scalar_embed_scale)
        elif isinstance(module, Gemma3RotaryEmbedding):
            fresh = type(module)(module.config)
            for name, buffer in module.named_buffers():
                init.copy_(buffer, fresh.get_buffer(name))


class CRNetGemma3Model(CrossLayerModel, CRNetGemma3PreTrainedModel):
    """The decoder, with the interface of `Gemma3TextModel`: token ids [B, T] -> hidden states [B, T, D]."""

    block_class = CRNetGemma3DecoderLayer
    norm_class = CarriedOffsetRMSNorm
    rotary_class = Gemma3RotaryEmbedding

    def build(self, config) -> None:
        """As in the other families, but the embedding is multiplied by the root of `hidden_size`."""
        super().build(config)
        self.embed_tokens = Gemma3TextScaledWordEmbedding(
            config.vocab_size, config.hidden_size, self.padding_idx, embed_scale=config.hidden_size**0.5
        )

    def rotations(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> dict:
        """{kind of layer: (cos, sin)}, since full and sliding attention rotate with different bases."""
        return {kind: self.rotary_emb(inputs_embeds, position_ids, kind) for kind in set(self.config.layer_types)}


class CRNetGemma3ForCausalLM(CrossLayerForCausalLM, CRNetGemma3PreTrainedModel):
    """The decoder with a language-modelling head: token ids [B, T] -> logits [B, T, V], and a loss with labels."""

    body_class = CRNetGemma3Model

    @property
    def has_plain_head(self) -> bool:
        """Whether the logits are not capped, so that the fused loss applies."""
        return self.config.final_logit_softcapping is None

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> logits [B, T, V]; c tanh(logits / c) where c, `final_logit_softcapping`, is set."""
        logits, cap = super().head(hidden_states), self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap


class CRNetGemma3ForSequenceClassification(CrossLayerForSequenceClassification, CRNetGemma3PreTrainedModel):
    """The decoder with a classifier on the last token that is not padding: [B, T] -> logits [B, num_labels]."""

    body_class = CRNetGemma3Model
