"""Configuration of CR-Net on Qwen3's block."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config

from .configuration_cross_layer import CrossLayerFields


@strict
class CRNetQwen3Config(CrossLayerFields, Qwen3Config):
    """CR-Net on Qwen3's block: `Qwen3Config` with the fields of `CrossLayerFields`."""

    __doc__ = CrossLayerFields.__doc__  # for help(): the fields
    model_type = "crnet_qwen3"

    def norm_parameters(self, layer_idx: int | None) -> int:
        """Llama's, and in a block one norm each for a head's query and key."""
        of_heads = 0 if layer_idx is None else 2 * self.head_dim
        return super().norm_parameters(layer_idx) + of_heads
