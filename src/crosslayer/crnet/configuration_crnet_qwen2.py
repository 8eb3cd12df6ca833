"""Configuration of CR-Net on Qwen2's block."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config

from .configuration_cross_layer import CrossLayerFields


@strict
class CRNetQwen2Config(CrossLayerFields, Qwen2Config):
    """CR-Net on Qwen2's block: `Qwen2Config` with the fields of `CrossLayerFields`."""

    __doc__ = CrossLayerFields.__doc__  # for help(): the fields
    model_type = "crnet_qwen2"

    def linear_biases(self) -> tuple[bool, bool, bool]:
        """On q, k and v alone."""
        return True, False, False
