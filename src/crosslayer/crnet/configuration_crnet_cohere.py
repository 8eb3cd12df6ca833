"""Configuration of CR-Net on Cohere's parallel block."""

from huggingface_hub.dataclasses import strict
from transformers import CohereConfig

from .configuration_cross_layer import CrossLayerFields


@strict
class CRNetCohereConfig(CrossLayerFields, CohereConfig):
    """CR-Net on Cohere's block: `CohereConfig` with the fields of `CrossLayerFields`."""

    __doc__ = CrossLayerFields.__doc__  # for help(): the fields
    model_type = "crnet_cohere"

    attribute_map = {"rms_norm_eps": "layer_norm_eps"}

    def norm_parameters(self, layer_idx: int | None) -> int:
        """One norm a block without a bias, and with `use_qk_norm` those of every head."""
        if layer_idx is None or not self.use_qk_norm:
            return self.hidden_size
        shape = self.attention_shape(layer_idx)
        return self.hidden_size + (shape.heads + shape.key_value_heads) * shape.key_dim
