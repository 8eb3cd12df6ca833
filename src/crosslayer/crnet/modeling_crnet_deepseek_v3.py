"""CR-Net on DeepSeek-V3's block: latent attention (MLA), and a mixture of experts beside a shared one.

The latent kv_a is read twice, by the norm ahead of kv_b and by attention, which takes the shared rotated key from it.
"""

import torch
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

from .block import LlamaBlock, Stage
from .configuration_crnet_deepseek_v3 import CRNetDeepseekV3Config
from .functions import Attention, CarriedRMSNorm, GatedMLP
from .mixture import MixtureBlock, MixtureModel, RouterLogits, build_mixture
from .model import (
    CrossLayerForCausalLM,
    CrossLayerForSequenceClassification,
    CrossLayerModel,
    CrossLayerPreTrainedModel,
)


class CRNetDeepseekV3LatentRMSNorm(CarriedRMSNorm):
    """The norm of a latent; what stands behind it in the same vector is left out."""

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """[B, T, latent + what stands behind it] -> [B, T, latent]."""
        return super().forward(latent[..., : self.weight.shape[0]])


class CRNetDeepseekV3Attention(Attention):
    """Multi-head latent attention (arXiv 2405.04434): keys and values of all heads from one latent a token."""

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.scaling = theirs.yarn_apply_mscale(config.rope_parameters, self.head_dim**-0.5)
        self.caches_latent = not config.places(layer_idx)["kv_b"].carries
        if config.q_lora_rank is not None:
            self.q_a_layernorm = CRNetDeepseekV3LatentRMSNorm(config.q_lora_rank)
        self.kv_a_layernorm = CRNetDeepseekV3LatentRMSNorm(config.kv_lora_rank)

    def prepare(self, y_q, y_kv_a, y_kv_b, position_embeddings=None, past_key_values=None, **arguments):  # type: ignore
        """Y_q [B, T, heads * key_dim], Y_kv_a [B, T, latent + rotated], Y_kv_b -> queries, keys and values by head.

        With a cache it holds latents where these say all, [B, 1, T, latent] and [B, 1, T, rotated].
        """
        config = self.config
        rotate = theirs.apply_rotary_pos_emb_interleave if config.rope_interleave else theirs.apply_rotary_pos_emb
        query = y_q.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, query_rotated = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        key_rotated = y_kv_a[..., config.kv_lora_rank :].unsqueeze(1)
        query_rotated, key_rotated = rotate(query_rotated, key_rotated, *position_embeddings)
        if past_key_values is not None and self.caches_latent:
            latent = self.kv_a_layernorm(y_kv_a).unsqueeze(1)
            latent, key_rotated = past_key_values.update(latent, key_rotated, self.layer_idx)
            y_kv_b = self.kv_b_proj(latent.squeeze(1))  # type: ignore[operator]
        key, value = (
            y_kv_b.unflatten(-1, (config.num_attention_heads, -1))
            .transpose(1, 2)
            .split([config.qk_nope_head_dim, config.v_head_dim], -1)
        )
        key_rotated = key_rotated.expand(-1, key.shape[1], -1, -1)
        return torch.cat([query, query_rotated], -1), torch.cat([key, key_rotated], -1), value

    def core(self, query, key, value, past_key_values=None, attention_mask=None, **arguments):
        """As in `Attention`; a cache of latents was filled by `prepare`, and is not passed on."""
        cache = None if self.caches_latent else past_key_values
        return super().core(query, key, value, cache, attention_mask, **arguments)


class CRNetDeepseekV3Router(theirs.DeepseekV3TopkRouter):
    """transformers' router, which can also weigh experts that were chosen before."""

    def weights_of(self, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Sigmoids of those chosen, as in `forward`."""
        weights = logits.sigmoid().gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if self.norm_topk_prob else weights
        return weights * self.routed_scaling_factor


class CRNetDeepseekV3DecoderLayer(MixtureBlock, LlamaBlock):
    """DeepSeek-V3's block (arXiv 2412.19437): latent attention, then an MLP or experts beside a shared one."""

    attention_class = CRNetDeepseekV3Attention

    def add_functions(self, config, layer_idx: int) -> None:
        """As in Llama's block, or a mixture in place of the MLP; then the `stages` that go with them."""
        super().add_functions(config, layer_idx)
        mlp = self.stages[2:]
        if config.is_sparse(layer_idx):
            self.mlp = build_mixture(config, layer_idx, CRNetDeepseekV3Router(config), theirs.DeepseekV3Experts)
            self.mlp.shared_experts = GatedMLP(config.hidden_act)
            self.router_logits = RouterLogits()
            positions = ("shared_gate", "shared_up", "experts")
            mlp = (
                Stage(("h",), "post_attention_layernorm", positions, adds=("experts",)),
                Stage(("shared_gate", "shared_up"), "mlp.shared_experts", ("shared_down",), adds=("shared_down",)),
            )
        query, first = ("q", "q") if config.q_lora_rank is None else ("q_b", "q_a")
        norm_of_query = Stage(("q_a",), "self_attn.q_a_layernorm", ("q_b",))
        self.stages = (
            Stage(("h",), "input_layernorm", (first, "kv_a")),
            *([] if query == first else [norm_of_query]),
            Stage(("kv_a",), "self_attn.kv_a_layernorm", ("kv_b",)),
            Stage((query, "kv_a", "kv_b"), "self_attn", ("o",), adds=("o",), takes_arguments=True),
            *mlp,
        )


class CRNetDeepseekV3PreTrainedModel(MixtureModel, CrossLayerPreTrainedModel):
    """Base of every CR-Net on DeepSeek-V3's block: configuration, initialisation, memory policies."""

    config_class = CRNetDeepseekV3Config
    _no_split_modules = ["CRNetDeepseekV3DecoderLayer"]


class CRNetDeepseekV3Model(CrossLayerModel, CRNetDeepseekV3PreTrainedModel):
    """The decoder, with the interface of `DeepseekV3Model`: token ids [B, T] -> hidden states [B, T, D]."""

    block_class = CRNetDeepseekV3DecoderLayer
    output_class = MoeModelOutputWithPast
    rotary_class = theirs.DeepseekV3RotaryEmbedding


class CRNetDeepseekV3ForCausalLM(CrossLayerForCausalLM, CRNetDeepseekV3PreTrainedModel):
    """The decoder with a language-modelling head: token ids [B, T] -> logits [B, T, V], and a loss with labels."""

    body_class = CRNetDeepseekV3Model


class CRNetDeepseekV3ForSequenceClassification(CrossLayerForSequenceClassification, CRNetDeepseekV3PreTrainedModel):
    """The decoder with a classifier on the last token that is not padding: [B, T] -> logits [B, num_labels]."""

    body_class = CRNetDeepseekV3Model
