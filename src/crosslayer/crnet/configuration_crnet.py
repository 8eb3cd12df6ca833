"""Configuration of CR-Net on Llama's block (arXiv 2509.18993)."""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from .configuration_cross_layer import CrossLayerFields

POSITIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""The seven linear positions of a Llama block, in the order in which their outputs are carried from layer to layer."""


@strict
class CRNetConfig(CrossLayerFields, LlamaConfig):
    """CR-Net on Llama's block (arXiv 2509.18993): `LlamaConfig` with the fields of `CrossLayerFields`."""

    __doc__ = CrossLayerFields.__doc__  # for help(): the fields
    model_type = "crnet"
