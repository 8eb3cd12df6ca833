"""Configuration of CR-Net on Qwen3's block."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config

from .configuration_cross_layer import CrossLayerFields


@strict
class CRNetQwen3Config(CrossLayerFields, Qwen3Config):
    __doc__ = CrossLayerFields.__doc__
    model_type = "crnet_qwen3"

    def norm_parameters(self, layer_idx: int | None) -> int:
        of_heads = 0 if layer_idx is None else 2 * self.head_dim
        return super().norm_parameters(layer_idx) + of_heads
