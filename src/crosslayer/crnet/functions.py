"""What a block computes between its linears: norms, the gate of an MLP, attention.

Linears hang on these modules under transformers' names; the block (block.py) calls them. Attention is cut in two,
`prepare` (heads, rotation: cheap, made again for the backward) and `core` (what it saves may wait). Letters: [B, T, D]
batch, tokens, hidden size; F the output width of a position.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward


def carry_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which hidden states and carried outputs travel: at least float32."""
    return torch.promote_types(dtype, torch.float32)


@torch.compiler.disable
def lengths_of_documents(position_ids: torch.Tensor) -> dict[str, Any]:
    """What FlashAttention wants to know of documents that restarts in position_ids [B, T] tell apart.

    Read from the device once, for all layers. (transformers looks for restarts in every layer, and only where there is
    a single row: in several, documents would see each other.)
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff() != 1
    bounds = [*starts.flatten().cpu().numpy().nonzero()[0].tolist(), starts.numel()]
    lengths, longest = torch.tensor(bounds, dtype=torch.int32), max(end - start for start, end in pairwise(bounds))
    lengths = lengths.to(position_ids.device, non_blocking=True)
    return {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": longest, "max_length_k": longest}


class CarriedRMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 or, for float64 input, in float64.

    The result has the weight's dtype, so that the products after it run in the model's precision even when the hidden
    states are carried in float32. (transformers' Llama norm computes float64 input in float32.)
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def scale(self, dtype: torch.dtype) -> torch.Tensor:
        """What the normed values are multiplied with, [D]."""
        return self.weight.to(dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`scale` h / sqrt(mean(h^2) + eps): [..., D] -> [..., D]."""
        dtype = carry_dtype(hidden_states.dtype)
        normed = nn.functional.rms_norm(
            hidden_states.to(dtype), self.weight.shape, self.scale(dtype), self.variance_epsilon
        )
        return normed.to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Shape of the weight and eps, for `print(model)`."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class CarriedOffsetRMSNorm(CarriedRMSNorm):
    """The same with 1 + weight, as in Gemma."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps)
        nn.init.zeros_(self.weight)

    def scale(self, dtype: torch.dtype) -> torch.Tensor:
        """1 + weight, [D]."""
        return 1.0 + self.weight.to(dtype)


class CarriedLayerNorm(nn.Module):
    """Layer norm over the last axis, computed and returned as `CarriedRMSNorm` does; with or without a bias."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """w (h - mean(h)) / sqrt(var(h) + eps) + bias: [..., D] -> [..., D]."""
        dtype = carry_dtype(hidden_states.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        normed = nn.functional.layer_norm(
            hidden_states.to(dtype), self.weight.shape, self.weight.to(dtype), bias, self.variance_epsilon
        )
        return normed.to(self.weight.dtype)

    extra_repr = CarriedRMSNorm.extra_repr


class GatedMLP(nn.Module):
    """act(Y_gate) Y_up."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.act_fn = ACT2FN[activation]

    def forward(self, y_gate: torch.Tensor, y_up: torch.Tensor) -> torch.Tensor:
        """Two [B, T, F] -> [B, T, F]."""
        return self.act_fn(y_gate) * y_up


class Attention(nn.Module):
    """Multi-head attention with rotary embeddings, from Y_q, Y_k and Y_v to what the output projection reads."""

    rotate: Callable = staticmethod(apply_rotary_pos_emb)

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        shape = config.attention_shape(layer_idx)
        self.head_dim = shape.key_dim
        self.num_key_value_groups = shape.heads // shape.key_value_heads
        self.scaling = shape.key_dim**-0.5
        self.attention_dropout = getattr(config, "attention_dropout", 0.0)
        self.sliding_window = shape.window
        self.is_causal = True

    def prepare(
        self, y_q, y_k, y_v, position_embeddings=None, rotate=None, **arguments: Any
    ) -> tuple[torch.Tensor, ...]:
        """Y_q, Y_k, Y_v -> queries [B, heads, T, head_dim], keys and values [B, key-value heads, T, head_dim]."""
        query, key, value = (y.view(*y.shape[:-1], -1, self.head_dim) for y in (y_q, y_k, y_v))
        query, key = self.normalise(query, key)
        if position_embeddings is not None:  # ahead of the transpose, while memory is in order
            query, key = (rotate or self.rotate)(query, key, *position_embeddings, unsqueeze_dim=2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def normalise(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys [B, T, heads, head_dim] ahead of the rotation: for families with q/k norms."""
        return query, key

    def core(
        self, query, key, value, past_key_values=None, attention_mask=None, **arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns (attended values [B, T, heads * head_dim], attention weights or None)."""
        arguments.pop("position_embeddings", None)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if self.sliding_window is not None:
            arguments["sliding_window"] = self.sliding_window
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        arguments |= {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        attended, weights = attend(self, query, key, value, attention_mask, **arguments)
        return attended.reshape(query.shape[0], query.shape[2], -1).contiguous(), weights

    def forward(self, *outputs: torch.Tensor, **arguments) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Y of the positions that it reads, [B, T, F] each -> (attended [B, T, heads * head_dim], weights or None)."""
        return self.core(*self.prepare(*outputs, **arguments), **arguments)


class HeadNormAttention(Attention):
    """With a norm over each head's queries and keys, ahead of the rotation."""

    norm_class = CarriedRMSNorm

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.q_norm = self.norm_class(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = self.norm_class(self.head_dim, eps=config.rms_norm_eps)

    def normalise(self, query, key):
        """Queries and keys [B, T, heads, head_dim], each head normed."""
        return self.q_norm(query), self.k_norm(key)
