"""Whether a tokenizer and a model belong together: ids and embedding, special tokens, lengths and positions."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .tokenizer import document_end_id, document_start_id, padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 128
_log = logging.getLogger(__name__)


def ids_needed(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs: one more than the largest id that a text or its frame can yield.

    Special tokens that frame nothing are not among them: T5's tokenizer has 32,100 entries, the field's models 32,000.
    """
    special = set(tokenizer.all_special_ids)
    frame = (getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "cls", "sep", "mask", "unk"))
    used = [i for i in frame if i is not None]
    return max([*(i for i in tokenizer.get_vocab().values() if i not in special), *used], default=-1) + 1


def check_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, label: str) -> None:
    """Raises ConfigError where the tokenizer yields ids that the model's embedding does not have."""
    rows, needed = model.get_input_embeddings().weight.shape[0], ids_needed(tokenizer)
    if needed > rows:
        raise ConfigError(
            f"{label}: the tokenizer yields ids up to {needed - 1}, the embedding has {rows} rows; give the tokenizer "
            "that the model was trained with, or enlarge the embedding (resize_token_embeddings)"
        )
    if max(tokenizer.get_vocab().values(), default=0) >= rows:  # sentinels: a text that spells one is a text
        tokenizer.split_special_tokens = True


def check_special_tokens(tokenizer: Any, config: Any, label: str) -> None:
    """Raises ConfigError where a model that crosslayer pre-trained names other special tokens than the tokenizer.

    Their ids come from the tokenizer when such a model is trained; where they differ, it is another tokenizer.
    """
    named = {
        "bos_token_id": document_start_id(tokenizer),
        "eos_token_id": document_end_id(tokenizer),
        "pad_token_id": padding_id(tokenizer),
    }
    for name, found in named.items():
        value = getattr(config, name, None)
        known = value if isinstance(value, list | tuple) else [value]
        if value is not None and found not in known:
            raise ConfigError(
                f"{label}: the model's {name} is {value}, the tokenizer's {found}; give the tokenizer that the model "
                f"was trained with, or set {name} in config.json"
            )


def first_id(value: Any) -> int | None:
    """An id, the first of a list of them, or None."""
    if isinstance(value, list | tuple):
        return value[0] if value else None
    return value


def position_limit(model: PreTrainedModel) -> int | None:
    """Longest input in tokens that a model has positions for; None where it has no such limit.

    Models that count positions from their padding id (RoBERTa's kin) have a few less than their configuration says.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    return limit


def input_length(max_length: int, model: PreTrainedModel) -> int:
    """`max_length` where the model has positions for it; the default gives way to a smaller model's positions.

    Raises ConfigError where it was chosen and is longer.
    """
    limit = position_limit(model)
    if limit is None or max_length <= limit:
        return max_length
    if max_length == DEFAULT_MAX_LENGTH:
        _log.info("inputs are cut at %d tokens, the model's positions", limit)
        return limit
    raise ConfigError(f"max_length={max_length} is longer than the model's {limit} positions; give at most {limit}")


def block_length(block_size: int | None, tokenizer: Any, model: PreTrainedModel, most: int = 1024) -> int:
    """`block_size`, or what the tokenizer and the model were made for, at most `most`.

    Raises ConfigError where it was chosen and is longer than the model's positions.
    """
    limit = position_limit(model)
    if block_size is None:
        return min(int(tokenizer.model_max_length), most if limit is None else limit, most)
    if limit is not None and block_size > limit:
        raise ConfigError(f"block_size={block_size} is longer than the model's {limit} positions; give at most {limit}")
    return block_size


def room_for(prompt: int, wanted: int | None, model: PreTrainedModel, default: int = 200) -> int:
    """New tokens after a prompt of so many tokens: those wanted, or up to `default` where none are named.

    Raises ConfigError where the model has no positions for them.
    """
    limit = position_limit(model)
    if limit is None:
        return default if wanted is None else wanted
    if prompt >= limit:
        raise ConfigError(f"the prompt has {prompt} tokens, the model {limit} positions; shorten the prompt")
    if wanted is not None and prompt + wanted > limit:
        raise ConfigError(
            f"max_new_tokens={wanted} after a prompt of {prompt} tokens is more than the model's {limit} positions; "
            f"give at most {limit - prompt}"
        )
    return min(default, limit - prompt) if wanted is None else wanted
