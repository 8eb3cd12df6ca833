"""CR-Net on Llama's block: CRNetModel, CRNetForCausalLM, CRNetForSequenceClassification."""

from .block import CrossLayerBlock, Stage
from .configuration_crnet import CRNetConfig
from .functions import Attention, CarriedRMSNorm, GatedMLP
from .model import (
    CrossLayerForCausalLM,
    CrossLayerForSequenceClassification,
    CrossLayerModel,
    CrossLayerPreTrainedModel,
)


class CRNetDecoderLayer(CrossLayerBlock):
    """Llama's block. Families that change only its attention or its norms take it from here."""

    attention_class = Attention
    norm_class = CarriedRMSNorm
    activation_field = "hidden_act"
    stages: tuple[Stage, ...] = (
        Stage(("h",), "input_layernorm", ("q", "k", "v")),
        Stage(("q", "k", "v"), "self_attn", ("o",), adds=("o",), takes_arguments=True),
        Stage(("h",), "post_attention_layernorm", ("gate", "up")),
        Stage(("gate", "up"), "mlp", ("down",), adds=("down",)),
    )

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.add_functions(config, layer_idx)
        self.add_linears(config)

    def add_functions(self, config, layer_idx: int) -> None:
        self.self_attn = self.attention_class(config, layer_idx)
        self.mlp = GatedMLP(getattr(config, self.activation_field))
        self.input_layernorm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)


class CRNetPreTrainedModel(CrossLayerPreTrainedModel):
    config_class = CRNetConfig
    _no_split_modules = ["CRNetDecoderLayer"]


class CRNetModel(CrossLayerModel, CRNetPreTrainedModel):
    block_class = CRNetDecoderLayer


class CRNetForCausalLM(CrossLayerForCausalLM, CRNetPreTrainedModel):
    body_class = CRNetModel


class CRNetForSequenceClassification(CrossLayerForSequenceClassification, CRNetPreTrainedModel):
    body_class = CRNetModel


__all__ = ["CRNetForCausalLM", "CRNetForSequenceClassification", "CRNetModel", "CRNetPreTrainedModel"]
