"""CR-Net on GPT-2's block: biases, layer norms, learned positions, and the fused qkv as three positions."""

import torch
from torch import nn
from transformers import initialization as init

from .block import CrossLayerBlock, Stage
from .configuration_crnet_gpt2 import CRNetGPT2Config
from .functions import Attention, CarriedLayerNorm, GatedMLP
from .model import (
    CrossLayerForCausalLM,
    CrossLayerForSequenceClassification,
    CrossLayerModel,
    CrossLayerPreTrainedModel,
)


class CRNetGPT2Attention(Attention):
    """Attention without rotation; `scale_attn_weights` and `scale_attn_by_inverse_layer_idx` scale the scores."""

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.scaling = self.scaling if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.attention_dropout = config.attn_pdrop


class CRNetGPT2MLP(GatedMLP):
    """act(Y_up): there is no gate."""

    def forward(self, y_up: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """[B, T, F] -> [B, T, F]."""
        return self.act_fn(y_up)


class CRNetGPT2Block(CrossLayerBlock):
    """GPT-2's block: layer norms, an MLP without a gate, and dropout between Y and h if `resid_pdrop` > 0."""

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        attended, output = ("attended_dropout", "mlp_dropout") if config.resid_pdrop > 0 else (None, None)
        self.stages = (
            Stage(("h",), "ln_1", ("q", "k", "v")),
            Stage(("q", "k", "v"), "attn", ("o",), adds=("o",), through=attended, takes_arguments=True),
            Stage(("h",), "ln_2", ("up",)),
            Stage(("up",), "mlp", ("down",), adds=("down",), through=output),
        )
        self.ln_1 = CarriedLayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = CRNetGPT2Attention(config, layer_idx)
        self.ln_2 = CarriedLayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = CRNetGPT2MLP(config.activation_function)
        self.attended_dropout, self.mlp_dropout = nn.Dropout(config.resid_pdrop), nn.Dropout(config.resid_pdrop)
        self.add_linears(config)


class CRNetGPT2PreTrainedModel(CrossLayerPreTrainedModel):
    """Base of every CR-Net on GPT-2's block: configuration, initialisation, memory policies."""

    config_class = CRNetGPT2Config
    base_model_prefix = "transformer"
    causal_suffix = "LMHeadModel"
    _input_embed_layer = "wte"
    _no_split_modules = ["CRNetGPT2Block"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the other families; dense matrices that write to h are smaller by the root of their number (GPT-2)."""
        super()._init_weights(module)
        if isinstance(module, CRNetGPT2Attention | CRNetGPT2MLP) and type(module.c_proj) is nn.Linear:
            init.normal_(module.c_proj.weight, std=self.config.initializer_range / (2 * self.config.n_layer) ** 0.5)


class CRNetGPT2Model(CrossLayerModel, CRNetGPT2PreTrainedModel):
    """The decoder, with the interface of `GPT2Model`: token ids [B, T] -> hidden states [B, T, D]."""

    block_class = CRNetGPT2Block
    rotary_class = None

    def build(self, config) -> None:
        """Token and position embeddings, blocks and the last norm, under the names of transformers' GPT-2."""
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(CRNetGPT2Block(config, index) for index in range(config.num_hidden_layers))
        self.ln_f = CarriedLayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, bottom first."""
        return self.h

    def embed(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings plus those of the positions, with dropout: [B, T, D] -> [B, T, D]."""
        return self.drop(inputs_embeds + self.wpe(position_ids))

    def last(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The layer norm after the last block: [B, T, D] -> [B, T, D]."""
        return self.ln_f(hidden_states)


class CRNetGPT2LMHeadModel(CrossLayerForCausalLM, CRNetGPT2PreTrainedModel):
    """The decoder with a language-modelling head: token ids [B, T] -> logits [B, T, V], and a loss with labels."""

    body_class = CRNetGPT2Model
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}


class CRNetGPT2ForSequenceClassification(CrossLayerForSequenceClassification, CRNetGPT2PreTrainedModel):
    """The decoder with a classifier on the last token that is not padding: [B, T] -> logits [B, num_labels]."""

    body_class = CRNetGPT2Model
