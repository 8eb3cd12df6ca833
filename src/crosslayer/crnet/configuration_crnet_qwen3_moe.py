"""Configuration of CR-Net on Qwen3-MoE's block."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen3MoeConfig

from .configuration_cross_layer import CrossLayerFields
from .positions import Mixture, Position


@strict
class CRNetQwen3MoeConfig(CrossLayerFields, Qwen3MoeConfig):
    """CR-Net on Qwen3-MoE's block: `Qwen3MoeConfig` with the fields of `CrossLayerFields`."""

    __doc__ = CrossLayerFields.__doc__  # for help(): the fields
    model_type = "crnet_qwen3_moe"

    head_dim: int | None = None
    """Width of a head. None: hidden_size // num_attention_heads."""

    def is_sparse(self, layer_idx: int) -> bool:
        """Whether the block has experts: every `decoder_sparse_step`-th, but none of `mlp_only_layers`."""
        in_step = (layer_idx + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and in_step and layer_idx not in self.mlp_only_layers

    def positions(self, layer_idx: int) -> dict[str, Position]:
        """Qwen3's; in a sparse block "experts" takes the place of gate, up and down."""
        positions, h = super().positions(layer_idx), self.hidden_size
        if not self.is_sparse(layer_idx):
            return positions
        mixture = Mixture(self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size, self.num_experts * h)
        attention = {name: position for name, position in positions.items() if position.module.startswith("self_attn")}
        return attention | {"experts": Position("mlp", h, h, mixture=mixture)}

    def norm_parameters(self, layer_idx: int | None) -> int:
        """Llama's, and in a block one norm each for a head's query and key."""
        of_heads = 0 if layer_idx is None else 2 * self.attention_shape(layer_idx).key_dim
        return super().norm_parameters(layer_idx) + of_heads

    def validate_architecture(self) -> None:
        """As in every family; ValueError too where `decoder_sparse_step` is below 1."""
        if self.decoder_sparse_step < 1:
            raise ValueError(
                f"decoder_sparse_step={self.decoder_sparse_step} must be at least 1: every so many layers."
            )
        super().validate_architecture()
