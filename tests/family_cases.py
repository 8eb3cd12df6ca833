"""One table of all families: tiny models with odd shapes, each beside transformers' own.

A family that is not built in (docs/new-family.md) is a `FamilyCase` as well, so that the same checks apply to it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers

import crosslayer.crnet as crnet
import model_cases

VOCABULARY, PAD = 101, 0
SLIDING, FULL = "sliding_attention", "full_attention"

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # at 0.02 a tiny model is nearly linear
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {"intermediate_size": 130, "num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 36, "num_experts_per_tok": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
QWEN3_MOE = {**GATED, **EXPERTS, "head_dim": 20, "num_experts": 6, "norm_topk_prob": True}
DEEPSEEK_V3 = {
    **GATED,
    **EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 18,
    "q_lora_rank": 22,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 14,
}


def same_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state


def unfused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GPT-2's weights, or their gradients, by our names: Conv1D holds them transposed, and q, k and v in one."""
    ours = {}
    for name, tensor in state.items():
        if "c_attn" in name:
            for position, part in zip("qkv", tensor.chunk(3, -1), strict=True):
                ours[name.replace("c_attn", f"{position}_proj")] = part.t().contiguous()
        elif name.endswith(("c_proj.weight", "c_fc.weight")):
            ours[name] = tensor.t().contiguous()
        else:
            ours[name] = tensor
    return ours


@dataclass(frozen=True)
class FamilyCase:
    """One row of the table.

    Args:
        family: prefix of the classes, "CRNetQwen3".
        their_config, their_model: transformers' classes.
        fields: of both configurations, beside `SIZES`.
        own: of ours alone.
        to_ours: their state dict by our names.
        has_experts: whether some block is a mixture.
    """

    family: str
    their_config: type[Any]
    their_model: type[Any]
    fields: dict[str, Any] = field(default_factory=dict)
    to_ours: Callable[[dict], dict] = same_names
    has_experts: bool = False
    own: dict[str, Any] = field(default_factory=dict)
    module: Any = crnet
    causal_suffix: str = "ForCausalLM"

    def cls(self, suffix: str) -> type[Any]:
        return getattr(self.module, f"{self.family}{suffix}")

    @property
    def causal_class(self) -> type[Any]:
        return self.cls(self.causal_suffix)

    def all_fields(self, **fields: Any) -> dict[str, Any]:
        """With a kind for every layer, where layers have kinds."""
        fields = SIZES | self.fields | fields
        if kinds := fields.get("layer_types"):
            fields["layer_types"] = [kinds[index % len(kinds)] for index in range(fields["num_hidden_layers"])]
        return fields

    def config(self, **fields: Any) -> Any:
        return self.cls("Config")(**self.all_fields(**{"rank": 5, **self.own, **fields}))

    def model(self, dtype=torch.float32, attention="sdpa", suffix=None, **fields) -> Any:
        """A model of ours in evaluation mode, no parameter of which is neutral, every b at least 0.5 from zero."""
        model_class = self.cls(suffix) if suffix else self.causal_class
        model = model_class._from_config(self.config(**fields), attn_implementation=attention, dtype=dtype)
        if self.has_experts and dtype == torch.float64:  # transformers' grouped products of dense experts have none
            model.config._experts_implementation = "eager"
        return away_from_zero(randomize(model)).eval()

    def theirs(self, dtype=torch.float32, attention="sdpa") -> Any:
        config = self.their_config(**self.all_fields())
        return randomize(self.their_model._from_config(config, attn_implementation=attention, dtype=dtype)).eval()

    def but(self, **fields: Any) -> "FamilyCase":
        return replace(self, fields=self.fields | fields)


@torch.no_grad()
def randomize(model):
    """As `model_cases.randomize`, which knows no bias of a norm, none of GPT-2's names, no buffer of a router."""
    model_cases.randomize(model)
    for name, parameter in model.named_parameters():
        if ".ln_" in name and name.endswith("weight"):
            parameter.add_(1)
        elif "norm" in name and name.endswith("bias"):
            parameter.sub_(1)
        elif name.endswith(("wte.weight", "wpe.weight")):
            parameter.mul_(0.5 * parameter.shape[-1] ** 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.3, 0.3, buffer.numel()))
    return model


@torch.no_grad()
def away_from_zero(model):
    """No b so small that inversion would lose digits by it."""
    for name, parameter in model.named_parameters():
        if name.endswith("beta") and abs(parameter.item()) < 0.5:
            parameter.fill_(0.7)
    return model


tokens = model_cases.tokens


def _case(name: str, fields: dict, config: str | None = None, suffix="ForCausalLM", **more) -> FamilyCase:
    """The row of CRNet<name>; transformers' names are the same but for Gemma's configuration and Llama's prefix."""
    theirs = name or "Llama"
    config_class = getattr(transformers, config or f"{theirs}Config")
    causal = getattr(transformers, f"{theirs}{suffix}")
    return FamilyCase(f"CRNet{name}", config_class, causal, fields, causal_suffix=suffix, **more)


_GPT2 = _case("GPT2", NO_DROPOUT, suffix="LMHeadModel", to_ours=unfused)
_GEMMA3 = _case(
    "Gemma3",
    {
        **GATED,
        "head_dim": 20,
        "sliding_window": 6,
        "layer_types": [SLIDING, FULL, SLIDING],
        "query_pre_attn_scalar": 24,
    },
    config="Gemma3TextConfig",
)
_QWEN3_MOE = _case("Qwen3Moe", QWEN3_MOE, has_experts=True)
_DEEPSEEK_V3 = _case("DeepseekV3", DEEPSEEK_V3, has_experts=True)
_COHERE = _case("Cohere", GATED)

FAMILY_CASES = {
    "llama": _case("", GATED),
    "mistral": _case("Mistral", {**GATED, "sliding_window": 6}),
    "qwen2": _case("Qwen2", GATED),
    "qwen3": _case("Qwen3", {**GATED, "head_dim": 20}),
    "gemma3": _GEMMA3,
    # One key for all queries, as in Gemma 3 1B: with a window, attention repeats it without copying it.
    "gemma3_softcapping": _GEMMA3.but(final_logit_softcapping=2.0, num_key_value_heads=1),
    "gpt2": _GPT2,
    "gpt2_dropout": _GPT2.but(resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1),
    "qwen3_moe_dense_first": _QWEN3_MOE.but(mlp_only_layers=[0]),
    "qwen3_moe_interleaved": _QWEN3_MOE.but(decoder_sparse_step=2),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v3_one_query": _DEEPSEEK_V3.but(q_lora_rank=None, rope_interleave=False),
    "deepseek_v3_kv_b_carries": replace(_DEEPSEEK_V3, own={"carries": {"kv_b": True}}),  # the whole cache
    "cohere": _COHERE,
    "cohere_qk_norm": _COHERE.but(use_qk_norm=True),
}
