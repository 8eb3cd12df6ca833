"""What the models of all families share: embeddings, the way through the blocks, memory policies, heads.

A family's modelling file names its configuration and its block, and says what is different (modeling_crnet.py is the
shortest). Everything that is not CR-Net's (rotary embeddings, masks, caches, the attention interface, the loss) is
transformers'. With `factorization="dense"` a model is transformers' own of that family.

Letters: [B, T, D] batch, tokens, hidden size; V vocabulary.
"""

from inspect import unwrap
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .block import CrossLayerBlock
from .cross_layer_linear import CrossLayerLinear, LowRankLinear, starting_std
from .drift import DriftMeter
from .functions import Attention, CarriedOffsetRMSNorm, CarriedRMSNorm, carry_dtype, lengths_of_documents
from .local_graph import Call
from .loss import fused_cross_entropy
from .policies import current_name
from .tape import Tape, read_b

logger = logging.get_logger(__name__)


class CrossLayerPreTrainedModel(PreTrainedModel):
    """Initialisation, memory policies, and what transformers asks of every class of a family."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    # b multiplies itself over the layers: eight bits of mantissa are too few for it.
    _keep_in_fp32_modules_strict = ["beta"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _supports_context_parallel = False
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CrossLayerBlock, "attentions": Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """All initialisation in one place.

        | part                                  | distribution                                             |
        |---------------------------------------|----------------------------------------------------------|
        | embeddings, head, dense matrices      | N(0, initializer_range^2), as Llama                      |
        | A of a cross-layer linear             | N(0, 1 / in)                                             |
        | B of a cross-layer linear             | 0: every layer starts as a copy of the one before        |
        | beta                                  | beta_init                                                |
        | A, B without a carried output         | N(0, s^2), A B as large as a dense matrix: `starting_std`|
        | biases 0, norms 1 (0 where 1 is added)|                                                          |

        The paper's initialisation is not public; beta = 1 with B = 0 is our choice (docs/deviations.md).
        """
        super()._init_weights(module)
        if isinstance(module, CarriedOffsetRMSNorm):
            init.zeros_(module.weight)
        elif isinstance(module, CrossLayerLinear):
            init.normal_(module.A.weight, std=module.A.in_features**-0.5)
            init.zeros_(module.B.weight)
            init.constant_(module.beta, module.beta_init)
        elif isinstance(module, LowRankLinear):
            std = starting_std(self.config, module.A.in_features, module.B.out_features, module.A.out_features)
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
        config, model = self.config, self.base_model
        before = config.recompute, config.recompute_interval
        config.recompute, config.recompute_interval = current_name(recompute), interval
        try:
            config.validate_architecture()
        except ValueError:
            config.recompute, config.recompute_interval = before
            raise
        model._drifted = False
        model._drift = DriftMeter()
        if config.factorization == "cross_layer":  # the explicit word wins
            super()._set_gradient_checkpointing(enable=False)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """As in transformers; the style of our plans is known from here on (tensor_parallel.py)."""
        from .tensor_parallel import check_distribution

        check_distribution(distributed_config)
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    @property
    def recompute_drift(self) -> float | None:
        """Largest relative difference between a kept state and the one rebuilt in its place, in the latest backward.

        None where nothing was compared: no backward yet, or a policy that does not invert.
        """
        return self.base_model._drift.value()

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, every_n_layers=1):
        """Activation checkpointing means whole layers, except in CR-Net: there a layer boundary is as wide as eight
        tensors, and the policy `invert` takes its place unless the config names another."""

        def checkpoint_func(function, *args):  # on a tape the policy stands in for the checkpoint of a whole block
            on_tape = function.keywords.get("tape") is not None
            return function(*args) if on_tape else gradient_checkpointing_func(function, *args)

        super()._set_gradient_checkpointing(enable, checkpoint_func, every_n_layers)
        if self.config.factorization == "cross_layer" and enable and every_n_layers != 1:
            logger.warning_once("every_n_layers counts whole-layer checkpoints; CR-Net reads recompute_interval.")

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers; the folder also names every Auto class, so that vLLM and `AutoModel` find the code."""
        if self._auto_class is not None:
            self.config.auto_map = self.auto_map()
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def auto_map(cls) -> dict[str, str]:
        """Auto class -> "file.Class" of this family, as config.json has it."""
        config = cls.config_class
        family = config.__name__.removesuffix("Config")
        configuration, modeling = f"configuration_{config.model_type}", f"modeling_{config.model_type}"
        return {
            "AutoConfig": f"{configuration}.{config.__name__}",
            "AutoModel": f"{modeling}.{family}Model",
            "AutoModelForCausalLM": f"{modeling}.{family}{cls.causal_suffix}",
            "AutoModelForSequenceClassification": f"{modeling}.{family}ForSequenceClassification",
        }

    causal_suffix = "ForCausalLM"


class CrossLayerModel(CrossLayerPreTrainedModel):
    """The decoder without a head. A family sets `block_class`, and `norm_class` or `build` where it differs."""

    block_class: type[CrossLayerBlock]
    norm_class: type[nn.Module] = CarriedRMSNorm
    rotary_class: type[nn.Module] | None = LlamaRotaryEmbedding
    output_class: type[BaseModelOutputWithPast] = BaseModelOutputWithPast

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.build(config)
        self.gradient_checkpointing = False
        self._drift = DriftMeter()
        self._drifted = False  # whether inversion has been given up
        self.post_init()

    def build(self, config: Any) -> None:
        """Embeddings, blocks, the last norm, rotary embeddings: under the names of transformers' model."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(self.block_class(config, index) for index in range(config.num_hidden_layers))
        self.norm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)
        if self.rotary_class is not None:
            self.rotary_emb = self.rotary_class(config=config)

    # What a family may say otherwise

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, bottom first."""
        return self.layers

    def embed(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """What the first block reads: [B, T, D]."""
        return inputs_embeds

    def rotations(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """`position_embeddings` of the blocks, or a dictionary of them by kind of layer."""
        return self.rotary_emb(inputs_embeds, position_ids=position_ids) if self.rotary_class else None

    def last(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What follows the last block."""
        return self.norm(hidden_states)

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
        """As transformers' model: input_ids [B, T] or inputs_embeds [B, T, D] -> last_hidden_state [B, T, D].

        Documents packed into one row are told apart by `position_ids` that restart (no `attention_mask`), with and
        without `use_cache`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        given_positions = position_ids  # ours restart nowhere: the mask need not read them back from the device
        if position_ids is None:
            seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + seen_tokens

        if use_cache and past_key_values is None and self._policy() not in (None, "none") and self._trains():
            logger.warning_once(f"A cache does not go with recompute={self._policy()!r}. Setting `use_cache=False`.")
            use_cache = False
        seen_by_layers: torch.Tensor | None = position_ids
        if is_flash_attention_requested(self.config):  # has no masks, and would read the positions in every layer
            if given_positions is not None and attention_mask is past_key_values is kwargs.get("cu_seq_lens_q") is None:
                kwargs |= lengths_of_documents(given_positions.expand(len(inputs_embeds), -1))
            seen_by_layers = given_positions = None
        # Before a cache of our own is made: an empty one has the same mask, but hides packed documents from it.
        masks = attention_mask
        if not isinstance(attention_mask, dict):  # `generate` may have made them
            masks = create_masks_for_generate(
                self.config,
                inputs_embeds,
                attention_mask,
                past_key_values=past_key_values,
                position_ids=given_positions,
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        shared = {"position_ids": seen_by_layers, "past_key_values": past_key_values, "use_cache": use_cache, **kwargs}
        by_kind = {"attention_mask": masks, "position_embeddings": self.rotations(inputs_embeds, position_ids)}
        layers = list(self.blocks)[: self.config.num_hidden_layers]
        kinds = [self.config.layer_kind(index) for index in range(len(layers))]
        arguments = [
            shared | {name: value[kind] if isinstance(value, dict) else value for name, value in by_kind.items()}
            for kind in kinds
        ]
        hidden_states = self.embed(inputs_embeds, position_ids)
        if self.config.factorization != "dense":
            hidden_states = hidden_states.to(carry_dtype(hidden_states.dtype))
        if self._uses_tape(hidden_states, past_key_values, kwargs):
            hidden_states = self._forward_on_tape(hidden_states, layers, arguments, torch.compiler.is_compiling())
        else:
            carried: tuple[torch.Tensor, ...] = ()
            for layer, given in zip(layers, arguments, strict=True):
                hidden_states, *carried = layer(hidden_states, *carried, **given)

        return self.output_class(last_hidden_state=self.last(hidden_states), past_key_values=past_key_values)

    # Memory policies (policies.py, tape.py)

    def _policy(self) -> str | None:
        """The memory policy in force; None where there is none."""
        if self.config.factorization == "dense":
            return None
        chosen = self.config.recompute
        if chosen == "none" and self.config.factorization == "cross_layer" and self._checkpoints():
            chosen = "invert"
        if chosen in ("invert", "reversible") and self._drifted:
            chosen = "replay"
        return chosen

    def _checkpoints(self) -> bool:
        return self.gradient_checkpointing or any(layer.gradient_checkpointing for layer in self.blocks)

    def _trains(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _uses_tape(self, hidden_states: torch.Tensor, past_key_values: Cache | None, options: dict) -> bool:
        policy = self._policy()
        if policy is None or not self._trains() or past_key_values is not None:
            return False
        # Whole layers where nothing is carried; and plain autograd makes one graph of it.
        if policy == "none" and (self._checkpoints() or torch.compiler.is_compiling()):
            return False
        if torch._C._are_functorch_transforms_active():  # torch.func differentiates operations, not our Function
            return False
        if options.get("output_attentions", getattr(self.config, "output_attentions", False)):
            if policy != "none":
                logger.warning_once(f"output_attentions: this call runs without recompute={policy!r}.")
            return False
        if any(unwrap(type(layer).forward) is not unwrap(CrossLayerBlock.forward) for layer in self.blocks):
            logger.warning_once(f"A block with a forward of its own: training runs without recompute={policy!r}.")
            return False
        return torch.compiler.is_compiling() or type(hidden_states) is torch.Tensor  # no fake tensor, no DTensor

    @torch.compiler.disable
    def _forward_on_tape(self, hidden_states, layers: list, arguments: list[dict], compiles: bool) -> torch.Tensor:
        b, drift = read_b(layers, hidden_states.device, self._drift.latest)
        self._look_at_drift(drift)
        policy = self._policy()
        assert policy is not None
        interval = self.config.recompute_interval if policy == self.config.recompute else None
        bound, call = self.config.recompute_error_bound, Call(hidden_states.device.type, compiles)
        tape = Tape(policy, interval, bound, layers, arguments, b, call, self._drift)
        for layer in layers:
            (hidden_states,) = layer(hidden_states, tape=tape)
        return hidden_states

    def _look_at_drift(self, drift: float | None) -> None:
        """Past the bound, gradients are no longer to be trusted: from here on states are replayed, not inverted."""
        bound = self._drift_bound()
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
        device, dtype = self.device.type, self.get_input_embeddings().weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return max(1e-4, 4 * torch.finfo(dtype).eps)


class CrossLayerForCausalLM(CrossLayerPreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head. A family sets `body_class`.

    `fused_loss` (an attribute, False; not saved): with labels, take the loss from the hidden states by vocabulary
    chunks and return no logits. Set it where memory for the logits matters and nobody reads them; crosslayer's own
    recipes do.
    """

    body_class: type[CrossLayerModel]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.body_class(config))
        self.vocab_size, self.fused_loss = config.vocab_size, False
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> logits [B, T, V]."""
        return self.lm_head(hidden_states)

    @property
    def has_plain_head(self) -> bool:
        """Whether the logits are the head's product and nothing more, so that the fused loss applies."""
        return True

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
        """As transformers' model; labels [B, T] with -100 for tokens that are not predicted."""
        outputs: BaseModelOutputWithPast = self.base_model(
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
        if labels is not None and self.fused_loss and self.has_plain_head:
            loss = fused_cross_entropy(hidden_states, self.lm_head, labels, **kwargs)
        else:
            logits = self.head(hidden_states)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        return self.output(outputs, loss, logits, attention_mask=attention_mask)

    def output(self, outputs: BaseModelOutputWithPast, loss, logits, **arguments) -> CausalLMOutputWithPast:
        """What `forward` returns. `arguments` has the attention mask, for families that add a loss of their own."""
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions)


class CrossLayerForSequenceClassification(CrossLayerPreTrainedModel):
    """The decoder with a linear classifier on the last token that is not padding. A family sets `body_class`."""

    body_class: type[CrossLayerModel]
    # The forward alone: as a base, the generic class would call the decoder `model` in every family.
    forward = GenericForSequenceClassification.forward
    # Its loss is a mean over rows: a Trainer that accumulates has to divide it, not the model.
    accepts_loss_kwargs = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self.body_class(config))
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()
