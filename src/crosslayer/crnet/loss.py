"""The loss of a language model without its logits."""

from typing import Any

import torch
from torch import nn

from .cross_layer_linear import is_watched

FLOAT32_CHUNKS = ("cpu",)
"""Where torch multiplies chunks in float32 whatever their dtype, so that under autocast they better stay in it."""


def fused_cross_entropy(
    hidden_states: torch.Tensor,
    lm_head: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """Next-token cross entropy without the [B, T, V] logits, where torch offers that (2.13).

    Same arguments and result as transformers' `ForCausalLMLoss`: the sum over predicted tokens divided by
    `num_items_in_batch`, or their mean. Older torch, a compiled graph (torch's chunks would break it) and a head that
    is no plain `nn.Linear` (LoRA, quantised, hooked, offloaded) take the logits in one piece.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(hidden_states.device)
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    if _takes_chunks(lm_head):
        weight, kind, options = lm_head.weight, flat.device.type, nn.LinearCrossEntropyOptions()
        autocasts = torch.is_autocast_enabled(kind)
        if autocasts and kind not in FLOAT32_CHUNKS:  # torch's chunks do not know autocast
            flat, weight = (x.to(torch.get_autocast_dtype(kind)) for x in (flat, weight))
            autocasts = False
        # Per-token losses of half-precision models are summed in float32: torch's own sum comes back in bfloat16.
        half = flat.dtype in (torch.float16, torch.bfloat16) and not autocasts
        given = {"linear_bias": lm_head.bias, "ignore_index": ignore_index, "reduction": "none" if half else "sum"}
        loss = nn.functional.linear_cross_entropy(flat, weight, target, **given, options=options)
        loss = loss.float().sum() if half else loss
    else:
        loss = nn.functional.cross_entropy(lm_head(flat).float(), target, ignore_index=ignore_index, reduction="sum")
    if num_items_in_batch is None:
        num_items_in_batch = (target != ignore_index).sum()
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _takes_chunks(lm_head: Any) -> bool:
    if not hasattr(nn, "LinearCrossEntropyOptions") or torch.compiler.is_compiling():
        return False
    return type(lm_head) is nn.Linear and not is_watched(lm_head) and lm_head.weight.device.type != "meta"
