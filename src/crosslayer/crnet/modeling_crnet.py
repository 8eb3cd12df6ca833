"""CR-Net language models on transformers' own Llama parts.

What CR-Net changes in a Llama block, and all that is written here: each of the seven linears may also read the output
that the same position had in the previous layer. Those seven outputs travel from layer to layer beside the hidden
states, as positional arguments. Everything else (rotary embeddings, masks, caches, the attention interface, the loss)
is transformers'. With `factorization="dense"` the model is transformers' Llama, key for key.

A flat file that imports only torch, transformers and its neighbours, so that a saved checkpoint can carry it.

Letters: [B, T, D] batch, tokens, hidden size; F the output width of a position; V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_crnet import POSITIONS, CRNetConfig
from .cross_layer_linear import CrossLayerLinear, LowRankLinear
from .hand_written_layer import Call
from .memory_policies import POLICIES, DriftMeter, Tape

logger = logging.get_logger(__name__)

NOTHING_CARRIED = (None,) * len(POSITIONS)


class CRNetRMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 or, for float64 input, in float64.

    The result has the weight's dtype, so that the products after it run in the model's precision even when the hidden
    states are carried in float32. (transformers' Llama norm computes float64 input in float32.)
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = carry_dtype(hidden_states.dtype)
        normed = nn.functional.rms_norm(
            hidden_states.to(dtype), self.weight.shape, self.weight.to(dtype), self.variance_epsilon
        )
        return normed.to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def carry_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which hidden states and carried outputs travel: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def build_linear(config: CRNetConfig, layer_idx: int, position: str, bias: bool) -> nn.Module:
    """The linear of one position: dense, low rank or cross-layer, as the configuration says."""
    in_features, out_features = config.linear_shape(position)
    rank = config.linear_rank(layer_idx, position)
    if rank is None:
        return nn.Linear(in_features, out_features, bias=bias)
    if config.factorization == "cross_layer":
        if layer_idx == 0:
            return LowRankLinear(in_features, out_features, rank, bias, config.increment_activation)
        return CrossLayerLinear(
            in_features,
            out_features,
            rank,
            bias,
            config.increment_activation,
            config.beta_init,
            config.beta_epsilon,
            config.beta_trainable,
        )
    return LowRankLinear(in_features, out_features, rank, bias, "silu" if config.factorization == "cola" else None)


def project(linear: nn.Module, x: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
    """Y of one position: [B, T, in] and, from the second CR-Net layer on, the previous layer's Y -> [B, T, F]."""
    return linear(x) if previous is None else linear(x, previous)


class CRNetAttention(nn.Module):
    """Llama's attention with cross-layer q, k, v and o."""

    def __init__(self, config: CRNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.carries = config.factorization == "cross_layer"

        self.q_proj = build_linear(config, layer_idx, "q", config.attention_bias)
        self.k_proj = build_linear(config, layer_idx, "k", config.attention_bias)
        self.v_proj = build_linear(config, layer_idx, "v", config.attention_bias)
        self.o_proj = build_linear(config, layer_idx, "o", config.attention_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        previous_q: torch.Tensor | None = None,
        previous_k: torch.Tensor | None = None,
        previous_v: torch.Tensor | None = None,
        previous_o: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns (Y_o [B, T, D], attention weights or None, Y_q, Y_k, Y_v [B, T, F]), the Y before RoPE."""
        y_q = carry(project(self.q_proj, hidden_states, previous_q), self.carries)
        y_k = carry(project(self.k_proj, hidden_states, previous_k), self.carries)
        y_v = carry(project(self.v_proj, hidden_states, previous_v), self.carries)

        assert position_embeddings is not None
        query, key, value = self.heads(y_q, y_k, y_v, hidden_states.dtype, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attended, attention_weights = self.attend(query, key, value, attention_mask, **kwargs)

        y_o = carry(project(self.o_proj, attended, previous_o), self.carries)
        return y_o, attention_weights, y_q, y_k, y_v

    def heads(
        self,
        y_q: torch.Tensor,
        y_k: torch.Tensor,
        y_v: torch.Tensor,
        dtype: torch.dtype,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        rotate: Callable = apply_rotary_pos_emb,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Y_q, Y_k, Y_v -> queries [B, heads, T, head_dim], keys and values [B, key-value heads, T, head_dim]."""
        head_shape = (*y_q.shape[:-1], -1, self.head_dim)
        query, key, value = (y.to(dtype).view(head_shape).transpose(1, 2) for y in (y_q, y_k, y_v))
        query, key = rotate(query, key, *position_embeddings)
        return query, key, value

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns (attended values [B, T, heads * head_dim], attention weights or None)."""
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, attention_weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return attended.reshape(*attended.shape[:2], -1).contiguous(), attention_weights


class CRNetMLP(nn.Module):
    """Llama's gated MLP with cross-layer gate, up and down."""

    def __init__(self, config: CRNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.carries = config.factorization == "cross_layer"
        self.gate_proj = build_linear(config, layer_idx, "gate", config.mlp_bias)
        self.up_proj = build_linear(config, layer_idx, "up", config.mlp_bias)
        self.down_proj = build_linear(config, layer_idx, "down", config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self,
        x: torch.Tensor,
        previous_gate: torch.Tensor | None = None,
        previous_up: torch.Tensor | None = None,
        previous_down: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns (Y_down [B, T, D], Y_gate, Y_up [B, T, F]), Y_gate before the activation."""
        y_gate = carry(project(self.gate_proj, x, previous_gate), self.carries)
        y_up = carry(project(self.up_proj, x, previous_up), self.carries)
        y_down = carry(project(self.down_proj, self.gated(y_gate, y_up, x.dtype), previous_down), self.carries)
        return y_down, y_gate, y_up

    def gated(self, y_gate: torch.Tensor, y_up: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """act(Y_gate) Y_up [B, T, F], computed in `dtype`."""
        return self.act_fn(y_gate.to(dtype)) * y_up.to(dtype)


def carry(y: torch.Tensor, carries: bool) -> torch.Tensor:
    """Y as it is carried on: at least float32 where layers build on one another, untouched elsewhere."""
    return y.to(carry_dtype(y.dtype)) if carries else y


class CRNetDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: CRNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.carries = config.factorization == "cross_layer"
        self.self_attn = CRNetAttention(config, layer_idx)
        self.mlp = CRNetMLP(config, layer_idx)
        self.input_layernorm = CRNetRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = CRNetRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *carried: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        tape: Tape | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, ...]:
        """hidden_states [B, T, D] and the previous layer's (Y_q, ..., Y_down), nothing in the first layer.

        Returns (hidden states [B, T, D], Y_q, Y_k, Y_v, Y_o, Y_gate, Y_up, Y_down); the hidden states alone where
        layers do not build on one another, or where a tape carries the Y (memory_policies.py).
        """
        if tape is not None:
            return (tape.run(self, hidden_states),)
        q, k, v, o, gate, up, down = carried or NOTHING_CARRIED

        y_o, _, y_q, y_k, y_v = self.self_attn(
            self.input_layernorm(hidden_states),
            q,
            k,
            v,
            o,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = hidden_states + y_o

        y_down, y_gate, y_up = self.mlp(self.post_attention_layernorm(hidden_states), gate, up, down)
        hidden_states = hidden_states + y_down

        if not self.carries:
            return (hidden_states,)
        return hidden_states, y_q, y_k, y_v, y_o, y_gate, y_up, y_down


class CRNetPreTrainedModel(PreTrainedModel):
    config_class = CRNetConfig
    config: CRNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CRNetDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # b multiplies itself over the layers: eight bits of mantissa are too few for it.
    _keep_in_fp32_modules_strict = ["beta"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _supports_context_parallel = False
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CRNetDecoderLayer, "attentions": CRNetAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """All initialisation in one place.

        | part                                  | distribution                                             |
        |---------------------------------------|----------------------------------------------------------|
        | embeddings, head, dense matrices      | N(0, initializer_range^2), as Llama                      |
        | A of a cross-layer linear             | N(0, 1 / in)                                             |
        | B of a cross-layer linear             | 0: every layer starts as a copy of the one before        |
        | beta                                  | beta_init                                                |
        | A, B without a carried output         | N(0, s^2), s = (in + out)^(-1/4) r^(-1/4) (CoLA's code)  |
        | biases 0, norms 1                     |                                                          |

        The paper's initialisation is not public; beta = 1 with B = 0 is our choice (docs/deviations.md).
        """
        super()._init_weights(module)
        if isinstance(module, CrossLayerLinear):
            init.normal_(module.A.weight, std=module.A.in_features**-0.5)
            init.zeros_(module.B.weight)
            init.constant_(module.beta, module.beta_init)
        elif isinstance(module, LowRankLinear):
            in_features, rank, out_features = module.A.in_features, module.A.out_features, module.B.out_features
            std = ((in_features + out_features) * rank) ** -0.25
            init.normal_(module.A.weight, std=std)
            init.normal_(module.B.weight, std=std)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside transformers the flag skips modules without parameters of their own, LowRankLinear for one.
        # It protects loaded parameters from careless initialisers; those in `_init_weights` look before they write.
        super()._initialize_weights(module, is_custom_code=False)

    def set_recompute(self, recompute: str, interval: int | None = None) -> None:
        """Chooses the memory policy of training from here on: `recompute` and `recompute_interval` of the config.

        Raises ValueError, and changes nothing, where the config would refuse them.
        """
        if recompute not in POLICIES:
            raise ValueError(f"recompute={recompute!r} does not exist; allowed: {', '.join(POLICIES)}.")
        config, model = self.config, self.base_model
        before = config.recompute, config.recompute_interval
        config.recompute, config.recompute_interval = recompute, interval  # type: ignore[assignment]
        try:
            config.validate_architecture()
        except ValueError:
            config.recompute, config.recompute_interval = before
            raise
        model._drifted = False
        model._drift = DriftMeter()
        if config.factorization == "cross_layer":
            model.gradient_checkpointing = False

    @property
    def recompute_drift(self) -> float | None:
        """Largest relative difference between a kept state and the one rebuilt in its place, in the latest backward.

        None where nothing was compared: no backward yet, or a policy that does not invert.
        """
        return self.base_model._drift.value()

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, every_n_layers=1):
        """Activation checkpointing means whole layers, except in CR-Net: there a layer boundary is as wide as eight
        tensors, and the policy `low_rank` takes its place unless the config names another."""
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)
        if self.config.factorization != "cross_layer":
            return
        if enable and every_n_layers != 1:
            logger.warning_once("every_n_layers counts whole-layer checkpoints; CR-Net reads recompute_interval.")
        for module in self.modules():
            if isinstance(module, CRNetDecoderLayer):
                module.gradient_checkpointing = False

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers; the folder also names every Auto class, so that vLLM and `AutoModel` find the code."""
        if self._auto_class is not None:
            self.config.auto_map = {
                "AutoConfig": "configuration_crnet.CRNetConfig",
                "AutoModel": "modeling_crnet.CRNetModel",
                "AutoModelForCausalLM": "modeling_crnet.CRNetForCausalLM",
                "AutoModelForSequenceClassification": "modeling_crnet.CRNetForSequenceClassification",
            }
        super().save_pretrained(save_directory, **kwargs)


class CRNetModel(CRNetPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: CRNetConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size

        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [CRNetDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = CRNetRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self._drift = DriftMeter()
        self._drifted = False  # whether inversion has been given up
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """As transformers' LlamaModel: input_ids [B, T] or inputs_embeds [B, T, D] -> last_hidden_state [B, T, D].

        Documents packed into one row are told apart by `position_ids` that restart (no `attention_mask`), with and
        without `use_cache`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        if position_ids is None:
            seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen_tokens
            position_ids = positions.unsqueeze(0)

        if use_cache and past_key_values is None and self._policy() not in (None, "none") and self._trains():
            logger.warning_once(f"A cache does not go with recompute={self._policy()!r}. Setting `use_cache=False`.")
            use_cache = False
        # Before a cache of our own is made: an empty one has the same mask, but hides packed documents from it.
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        arguments = {
            "attention_mask": causal_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids=position_ids),
            **kwargs,
        }
        hidden_states = carry(inputs_embeds, self.config.factorization == "cross_layer")
        if self._uses_tape(hidden_states, past_key_values, kwargs):
            hidden_states = self._forward_on_tape(hidden_states, arguments)
        else:
            carried: tuple[torch.Tensor, ...] = ()
            for layer in self.layers[: self.config.num_hidden_layers]:
                hidden_states, *carried = layer(hidden_states, *carried, **arguments)

        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    # Memory policies (memory_policies.py)

    def _policy(self) -> str | None:
        """The memory policy in force; None for factorizations that have none."""
        if self.config.factorization != "cross_layer":
            return None
        chosen = self.config.recompute
        if chosen == "none" and self.gradient_checkpointing:
            chosen = "low_rank"
        if chosen in ("low_rank", "reversible") and self._drifted:
            chosen = "replay"
        return chosen

    def _trains(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _uses_tape(self, hidden_states: torch.Tensor, past_key_values: Cache | None, options: dict) -> bool:
        policy = self._policy()
        if policy is None or not self._trains() or past_key_values is not None:
            return False
        if any(layer.gradient_checkpointing for layer in self.layers):  # set by hand: whole layers
            return False
        if policy == "none" and torch.compiler.is_compiling():  # plain autograd makes one graph of it
            return False
        if torch._C._are_functorch_transforms_active():  # torch.func differentiates operations, not our Function
            return False
        if options.get("output_attentions", getattr(self.config, "output_attentions", False)):
            if policy != "none":
                logger.warning_once(f"output_attentions: this call runs without recompute={policy!r}.")
            return False
        return torch.compiler.is_compiling() or type(hidden_states) is torch.Tensor  # no fake tensor, no DTensor

    @torch.compiler.disable
    def _forward_on_tape(self, hidden_states: torch.Tensor, arguments: dict) -> torch.Tensor:
        self._look_at_drift()
        policy = self._policy()
        assert policy is not None
        layers = list(self.layers[: self.config.num_hidden_layers])
        interval = self.config.recompute_interval if policy == self.config.recompute else None
        call = Call(arguments, hidden_states.device.type)
        tape = Tape(policy, interval, self.config.recompute_error_bound, layers, call, self._drift)
        for layer in layers:
            (hidden_states,) = layer(hidden_states, tape=tape)
        return hidden_states

    def _look_at_drift(self) -> None:
        """Past the bound, gradients are no longer to be trusted: from here on states are replayed, not inverted."""
        drift, bound = self._drift.value(), self._drift_bound()
        if dist.is_available() and dist.is_initialized() and hasattr(self.layers[0], "unshard"):
            drift = _largest_of_all_processes(drift, self.device)  # all of them gather the same layers
        self._drift.restart()
        if drift is not None and drift > bound and not self._drifted:
            self._drifted = True
            logger.warning(
                f"Rebuilt states of recompute={self.config.recompute!r} were {drift:.2g} away from the kept ones, more "
                f"than {bound:.2g} (recompute_drift_bound): the gradients of the last step may be off. Going on with "
                "recompute='replay', which rebuilds without dividing; model.set_recompute(...) chooses anew."
            )

    def _drift_bound(self) -> float:
        if self.config.recompute_drift_bound is not None:
            return self.config.recompute_drift_bound
        device, dtype = self.device.type, self.norm.weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return max(1e-4, 4 * torch.finfo(dtype).eps)


def _largest_of_all_processes(value: float | None, device: torch.device) -> float | None:
    largest = torch.tensor(-1.0 if value is None else value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return None if largest.item() < 0 else largest.item()


class CRNetForCausalLM(CRNetPreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head.

    `fused_loss` (an attribute, False; not saved): with labels, take the loss from the hidden states by vocabulary
    chunks and return no logits. Set it where memory for the logits matters and nobody reads them; crosslayer's own
    recipes do.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: CRNetConfig) -> None:
        super().__init__(config)
        self.model = CRNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.fused_loss = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As transformers' LlamaForCausalLM; labels [B, T] with -100 for tokens that are not predicted."""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)

        logits, loss = None, None
        if labels is not None and self.fused_loss:
            loss = fused_cross_entropy(hidden_states, self.lm_head, labels, **kwargs)
        else:
            logits = self.lm_head(hidden_states)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class CRNetForSequenceClassification(GenericForSequenceClassification, CRNetPreTrainedModel):
    """The decoder with a linear classifier on the last token that is not padding."""

    accepts_loss_kwargs = False  # the loss is a mean over the batch; the Trainer divides it by the batches of a step

    def __init__(self, config: CRNetConfig) -> None:
        # Not the generic constructor, which asks AutoModel: a checkpoint must load without a registry.
        CRNetPreTrainedModel.__init__(self, config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        self.model = CRNetModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


def fused_cross_entropy(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """Next-token cross entropy without the [B, T, V] logits, where torch offers that (2.13).

    Same arguments and result as transformers' `ForCausalLMLoss`: the sum over predicted tokens divided by
    `num_items_in_batch`, or their mean. Older torch, a compiled graph (torch's chunks would break it) and a head that
    is not a plain `nn.Linear` (LoRA, quantised) take the logits in one piece.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(hidden_states.device)
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    offered = hasattr(nn, "LinearCrossEntropyOptions") and not torch.compiler.is_compiling()
    if offered and type(lm_head) is nn.Linear:
        # Per-token losses of half-precision models are summed in float32: torch's own sum comes back in bfloat16.
        half = flat.dtype in (torch.float16, torch.bfloat16) and not torch.is_autocast_enabled(flat.device.type)
        loss = nn.functional.linear_cross_entropy(
            flat,
            lm_head.weight,
            target,
            linear_bias=lm_head.bias,
            ignore_index=ignore_index,
            reduction="none" if half else "sum",
            options=nn.LinearCrossEntropyOptions(),
        )
        loss = loss.float().sum() if half else loss
    else:
        loss = nn.functional.cross_entropy(lm_head(flat).float(), target, ignore_index=ignore_index, reduction="sum")
    if num_items_in_batch is None:
        num_items_in_batch = (target != ignore_index).sum()
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


__all__ = ["CRNetForCausalLM", "CRNetForSequenceClassification", "CRNetModel", "CRNetPreTrainedModel"]
