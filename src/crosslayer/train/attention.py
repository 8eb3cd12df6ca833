"""Which attention a run goes through: packed documents must not see each other, and a [T, T] mask is to be spared.

    attention              keeps documents apart by            memory beside q, k, v   where
    sdpa, eager            a mask [B, 1, T, T]                 T^2                     everywhere
    sdpa_documents         a call of sdpa for each document    none                    everywhere; made for CPUs
    flex_attention         a block mask, once for all layers   (T / 128)^2             CUDA (on a CPU no backward)
    flash_attention_2, 3   lengths of documents, once          none                    CUDA in bf16 or fp16

`auto`, the default, takes the last of them that the device, the packages and the model allow; short rows stay with
sdpa. Letters: [B, T] batch, tokens.
"""

from collections.abc import Callable
from importlib.util import find_spec
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_torch_flex_attn_available

from ..errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .recipe import Recipe

ATTENTION = "attn_implementation"
"""The field of a recipe's section `model`."""

AUTO, DOCUMENTS = "auto", "sdpa_documents"

FLASH: dict[str, Callable[..., bool]] = {
    "flash_attention_3": is_flash_attn_3_available,
    "flash_attention_2": is_flash_attn_2_available,
}
"""The best first -> whether it is installed."""

LONG = 1024
"""Tokens of a row from which on a mask is spared: a step on a CPU is then 1.45 times as fast by document, 1.04 times at
256 (benchmarks/packed_attention.py)."""


def attention_of(recipe: "Recipe", config: Any, arguments: "TrainingArguments") -> tuple[str, str]:
    """(the attention of a run by transformers' name for it, why). Device and precision are the arguments'.

    Raises ConfigError for one that cannot train this model here.
    """
    asked, block_size = recipe.model.get(ATTENTION) or AUTO, recipe.data.block_size
    device, problems = arguments.device.type, _problems(config, arguments)
    if asked != AUTO:
        if asked in problems:
            raise ConfigError(f"attn_implementation={asked} {problems[asked]}; leave it out, or give auto or sdpa")
        return asked, "the recipe says so"
    for name, is_installed in FLASH.items() if device == "cuda" else ():
        if name not in problems and is_installed():
            return name, "installed; documents by their lengths"
    if block_size < LONG:
        return "sdpa", f"rows of {block_size} tokens: a mask is small"
    if device == "cuda" and "flex_attention" not in problems:
        return "flex_attention", f"rows of {block_size} tokens: a block mask for all layers"
    if device == "cpu":
        return DOCUMENTS, f"rows of {block_size} tokens: one document at a time, no mask"
    return "sdpa", f"on {device} with what is installed"


def _problems(config: Any, arguments: "TrainingArguments") -> dict[str, str]:
    """Attention -> why it cannot be had."""
    device, dropout = arguments.device.type, getattr(config, "attention_dropout", 0.0)
    found = {}
    if device == "cpu":
        found["flex_attention"] = "has no backward on a CPU (torch)"
    elif not is_torch_flex_attn_available() or find_spec("triton") is None:
        found["flex_attention"] = "needs triton, which is not installed"
    if dropout:
        found["flex_attention"] = found["flash_attention_3"] = f"takes no attention_dropout={dropout:g}"
    half = arguments.bf16 or arguments.fp16 or config.dtype in (torch.bfloat16, torch.float16)
    for name, is_installed in FLASH.items():
        if device != "cuda":
            found[name] = f"runs on CUDA, and this is {device}"
        elif not half:
            found[name] = "multiplies in bf16 or fp16 alone, and the run is in float32 (bf16=true)"
        elif not is_installed(kernels_fallback_ok=True):
            found[name] = "is not installed"
    return found


def attend_by_document(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa` of each document alone: query [B, heads, T, head_dim] -> [B, T, heads, head_dim].

    Where `position_ids` [B, T] restart, a document begins. With a mask, or more keys than queries, it is sdpa.
    """
    (rows, _, length, _), documents = query.shape, []
    if attention_mask is not None or length == 1 or length != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    positions = torch.arange(length)[None] if position_ids is None else position_ids
    for row, of_row in enumerate(positions.expand(rows, -1)):
        starts = [0, *(of_row.diff() != 1).nonzero().flatten().add(1).tolist(), length]
        for is_one_token, spans in groupby(pairwise(starts), key=lambda span: span[1] - span[0] == 1):
            found = list(spans)
            if is_one_token:  # padding: all of it in one call
                run = slice(found[0][0], found[-1][1])
                given = (x[row, :, run].transpose(0, 1)[:, :, None] for x in (query, key, value))
                documents.append(sdpa_attention_forward(module, *given, None, **arguments)[0].transpose(0, 1))
                continue
            for start, end in found:
                given = (x[row : row + 1, :, start:end] for x in (query, key, value))
                mask = _window(end - start, sliding_window, query.device)
                documents.append(sdpa_attention_forward(module, *given, mask, **arguments)[0])
    return torch.cat(documents, 1).view(rows, length, *documents[0].shape[2:]), None


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Mask [1, 1, T, T] of a document that is longer than the window."""
    if window is None or length <= window:
        return None
    whole = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
    return whole.tril() & whole.triu(1 - window)


def _mask(*, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **arguments: Any):
    """None where `attend_by_document` needs no mask: whole rows without padding."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **arguments)


AttentionInterface.register(DOCUMENTS, attend_by_document)
AttentionMaskInterface.register(DOCUMENTS, _mask)
