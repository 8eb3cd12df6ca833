"""Configuration of CR-Net on Qwen2's block."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config

from .configuration_cross_layer import CrossLayerFields


@strict
class CRNetQwen2Config(CrossLayerFields, Qwen2Config):
    __doc__ = CrossLayerFields.__doc__
    model_type = "crnet_qwen2"

    def linear_biases(self) -> tuple[bool, bool, bool]:
        return True, False, False
