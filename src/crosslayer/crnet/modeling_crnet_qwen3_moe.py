"""CR-Net on Qwen3-MoE's block: attention as Qwen3's, the mixture of experts as one position (mixture.py)."""

import torch
from torch import nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.qwen3_moe import modeling_qwen3_moe as theirs

from .block import LlamaBlock, Stage
from .configuration_crnet_qwen3_moe import CRNetQwen3MoeConfig
from .functions import HeadNormAttention
from .mixture import MixtureBlock, MixtureModel, RouterLogits, build_mixture
from .model import (
    CrossLayerForCausalLM,
    CrossLayerForSequenceClassification,
    CrossLayerModel,
    CrossLayerPreTrainedModel,
)


class CRNetQwen3MoeRouter(theirs.Qwen3MoeTopKRouter):
    """transformers' router, which can also weigh experts that were chosen before."""

    def weights_of(self, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Softmax over all experts, at those chosen, as in `forward`."""
        weights = nn.functional.softmax(logits, dtype=torch.float, dim=-1).gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True) if self.norm_topk_prob else weights
        return weights.to(logits.dtype)


class CRNetQwen3MoeDecoderLayer(MixtureBlock, LlamaBlock):
    """Qwen3's block, or one whose MLP is a mixture."""

    attention_class = HeadNormAttention

    def add_functions(self, config, layer_idx: int) -> None:
        """As in Qwen3's block; in a sparse one the MLP and its two stages become one mixture."""
        super().add_functions(config, layer_idx)
        self.is_sparse = config.is_sparse(layer_idx)
        if not self.is_sparse:
            return
        self.stages = (*self.stages[:2], Stage(("h",), "post_attention_layernorm", ("experts",), adds=("experts",)))
        self.mlp = build_mixture(config, layer_idx, CRNetQwen3MoeRouter(config), theirs.Qwen3MoeExperts)
        self.router_logits = RouterLogits()


class CRNetQwen3MoePreTrainedModel(MixtureModel, CrossLayerPreTrainedModel):
    """Base of every CR-Net on Qwen3-MoE's block: configuration, initialisation, memory policies."""

    config_class = CRNetQwen3MoeConfig
    _no_split_modules = ["CRNetQwen3MoeDecoderLayer"]


class CRNetQwen3MoeModel(CrossLayerModel, CRNetQwen3MoePreTrainedModel):
    """The decoder, with the interface of `Qwen3MoeModel`: token ids [B, T] -> hidden states [B, T, D]."""

    block_class = CRNetQwen3MoeDecoderLayer
    output_class = MoeModelOutputWithPast


class CRNetQwen3MoeForCausalLM(CrossLayerForCausalLM, CRNetQwen3MoePreTrainedModel):
    """With `output_router_logits=True` and labels, the balancing loss is added to the loss, as in transformers."""

    body_class = CRNetQwen3MoeModel

    def output(self, outputs, loss, logits, attention_mask=None, **kwargs) -> MoeCausalLMOutputWithPast:
        """What `forward` returns, with the balancing loss of Switch Transformers (arXiv 2101.03961).

        `aux_loss` is there where router logits were recorded, over all their layers together; it is added to the loss
        if there is one.
        """
        balance, config = None, self.config
        if outputs.router_logits is not None:
            mask = attention_mask if torch.is_tensor(attention_mask) else None
            balance = theirs.load_balancing_loss_func(
                outputs.router_logits, config.num_experts, config.num_experts_per_tok, mask
            )
            loss = loss + config.router_aux_loss_coef * balance.to(loss.device) if loss is not None else loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=balance,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


class CRNetQwen3MoeForSequenceClassification(CrossLayerForSequenceClassification, CRNetQwen3MoePreTrainedModel):
    """The decoder with a classifier on the last token that is not padding: [B, T] -> logits [B, num_labels]."""

    body_class = CRNetQwen3MoeModel
