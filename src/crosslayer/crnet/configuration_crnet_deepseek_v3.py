"""Configuration of CR-Net on DeepSeek-V3's block: latent attention, and a mixture of experts beside a shared one."""

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV3Config

from .configuration_cross_layer import CrossLayerFields
from .positions import AttentionShape, Mixture, Position, gated_mlp_positions


@strict
class CRNetDeepseekV3Config(CrossLayerFields, DeepseekV3Config):
    """CR-Net on DeepSeek-V3's block (arXiv 2412.19437): `DeepseekV3Config` with `CrossLayerFields`."""

    __doc__ = CrossLayerFields.__doc__  # for help(): the fields
    model_type = "crnet_deepseek_v3"

    def is_sparse(self, layer_idx: int) -> bool:
        """Whether the block has experts: all but the first `first_k_dense_replace`."""
        return layer_idx >= self.first_k_dense_replace

    def attention_shape(self, layer_idx: int) -> AttentionShape:
        """Keys as wide as their plain and rotated parts together, values of `v_head_dim`; no heads share them."""
        heads = self.num_attention_heads
        return AttentionShape(heads, heads, self.qk_nope_head_dim + self.qk_rope_head_dim, self.v_head_dim)

    def positions(self, layer_idx: int) -> dict[str, Position]:
        """kv_b does not carry by default: if it did, keys and values would no longer follow from the latent, and the
        cache would have to hold them whole."""
        h, shape, bias = self.hidden_size, self.attention_shape(layer_idx), self.attention_bias
        query_width, latent = shape.heads * shape.key_dim, self.kv_lora_rank
        key_value_width = shape.heads * (self.qk_nope_head_dim + self.v_head_dim)
        if self.q_lora_rank is None:
            query = {"q": Position("self_attn.q_proj", h, query_width)}
        else:
            query = {
                "q_a": Position("self_attn.q_a_proj", h, self.q_lora_rank, bias),
                "q_b": Position("self_attn.q_b_proj", self.q_lora_rank, query_width),
            }
        attention = {
            **query,
            "kv_a": Position("self_attn.kv_a_proj_with_mqa", h, latent + self.qk_rope_head_dim, bias),
            "kv_b": Position("self_attn.kv_b_proj", latent, key_value_width, carries=False),
            "o": Position("self_attn.o_proj", shape.heads * self.v_head_dim, h, bias),
        }
        if not self.is_sparse(layer_idx):
            return attention | gated_mlp_positions("mlp", h, self.intermediate_size)
        experts, width = self.n_routed_experts, self.moe_intermediate_size
        mixture = Mixture(experts, self.num_experts_per_tok, width, experts * h)
        shared = gated_mlp_positions("mlp.shared_experts", h, width * self.n_shared_experts, prefix="shared_")
        return attention | shared | {"experts": Position("mlp", h, h, mixture=mixture)}

    def norm_parameters(self, layer_idx: int | None) -> int:
        """Llama's, and in a block one norm for each latent: of keys and values, of queries if they have one."""
        latents = 0 if layer_idx is None else self.kv_lora_rank + (self.q_lora_rank or 0)
        return super().norm_parameters(layer_idx) + latents

    def validate_architecture(self) -> None:
        """As in every family; ValueError too where `n_group` and `topk_group` do not fit the experts."""
        super().validate_architecture()
        experts, active, groups, chosen = self.n_routed_experts, self.num_experts_per_tok, self.n_group, self.topk_group
        if experts % groups or not 1 <= chosen <= groups or active > experts // groups * chosen:
            raise ValueError(
                f"n_group={groups} and topk_group={chosen} do not fit {experts} experts, {active} a token: "
                "groups divide the experts, and those chosen hold enough of them."
            )
