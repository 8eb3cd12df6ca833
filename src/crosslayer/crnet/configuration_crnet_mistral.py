"""Configuration of CR-Net on Mistral's block."""

from huggingface_hub.dataclasses import strict
from transformers import MistralConfig

from .configuration_cross_layer import CrossLayerFields


@strict
class CRNetMistralConfig(CrossLayerFields, MistralConfig):
    """CR-Net on Mistral's block: `MistralConfig` with the fields of `CrossLayerFields`."""

    __doc__ = CrossLayerFields.__doc__  # for help(): the fields
    model_type = "crnet_mistral"
