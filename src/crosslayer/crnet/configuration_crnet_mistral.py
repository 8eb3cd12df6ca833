"""Configuration of CR-Net on Mistral's block."""

from huggingface_hub.dataclasses import strict
from transformers import MistralConfig

from .configuration_cross_layer import CrossLayerFields


@strict
class CRNetMistralConfig(CrossLayerFields, MistralConfig):
    __doc__ = CrossLayerFields.__doc__
    model_type = "crnet_mistral"
