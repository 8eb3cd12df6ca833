"""Configuration of CR-Net on Gemma 3's block (text)."""

from huggingface_hub.dataclasses import strict
from transformers import Gemma3TextConfig

from .configuration_cross_layer import CrossLayerFields


@strict
class CRNetGemma3Config(CrossLayerFields, Gemma3TextConfig):
    """CR-Net on Gemma 3's block: `Gemma3TextConfig` with the fields of `CrossLayerFields`."""

    __doc__ = CrossLayerFields.__doc__  # for help(): the fields
    model_type = "crnet_gemma3"
    unsupported = ("use_bidirectional_attention", "attn_logit_softcapping")

    def norm_parameters(self, layer_idx: int | None) -> int:
        """Four norms a block, and one each for a head's query and key."""
        return self.hidden_size if layer_idx is None else 4 * self.hidden_size + 2 * self.head_dim
