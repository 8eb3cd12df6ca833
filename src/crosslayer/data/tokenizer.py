"""Tokenizers: an existing one, or a byte-level BPE trained on the documents.

The work is done by `tokenizers` and `transformers`; here are only the choices. The trained tokenizer has
the ids that Llama configurations expect (bos 1, eos 2) and pad 0; it covers all 256 bytes, so any text
comes back exactly.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<|pad|>", "<|bos|>", "<|endoftext|>"
SPECIAL_TOKENS = (PAD_TOKEN, BOS_TOKEN, EOS_TOKEN)  # in the order of their ids: 0, 1, 2
MINIMUM_VOCABULARY = 256 + len(SPECIAL_TOKENS)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
)


def train_tokenizer(
    texts: Iterable[str] | Iterable[Sequence[str]], vocab_size: int, block_size: int
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; the same texts in the same order give the same tokenizer.

    texts: strings, or batches of strings (faster). vocab_size counts the special tokens; a small text may
    yield fewer entries. block_size becomes `model_max_length`, the context a model of these blocks is
    trained on. Raises ConfigError when vocab_size cannot hold the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MINIMUM_VOCABULARY:
        raise ConfigError(vocabulary_too_small(vocab_size))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=block_size,
        clean_up_tokenization_spaces=False,
    )


def vocabulary_too_small(vocab_size: int) -> str:
    """The message for a vocabulary that cannot hold all bytes and the special tokens."""
    return (
        f"tokenizer_vocab_size={vocab_size} is too small; a byte-level tokenizer needs at least "
        f"{MINIMUM_VOCABULARY}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load the tokenizer in a folder or on the hub, as it is: its vocabulary is never changed.

    Raises ConfigError when the folder holds no tokenizer, the hub cannot deliver it, it is not a fast
    tokenizer, or it has no token that could begin a document.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(os.path.expanduser(name))
    local = os.path.exists(folder) or name.startswith((".", "~")) or folder.is_absolute()
    if local and not any(os.path.isfile(folder / file) for file in _TOKENIZER_FILES):
        raise ConfigError(
            f"tokenizer={name!r} is not a tokenizer folder: it has none of {', '.join(_TOKENIZER_FILES)}; "
            "give a folder written by save_pretrained, a hub name, or leave it out to train one"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if local else name)
    except Exception as error:  # transformers, tokenizers and the hub each raise their own kinds
        raise ConfigError(
            f"tokenizer={name!r} cannot be loaded ({type(error).__name__}: {first_line(error)}); "
            "give a folder written by save_pretrained, a hub name, or leave it out to train one"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"tokenizer={name!r} is a {type(tokenizer).__name__}; a fast tokenizer is needed")
    document_start_id(tokenizer)
    return tokenizer


def document_start_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the token that begins a document: bos, or eos where there is none (T5). ConfigError without
    either."""
    return _first_id(tokenizer, "bos_token_id", "eos_token_id")


def document_end_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the token that ends a document: eos, or bos where there is none. ConfigError without either."""
    return _first_id(tokenizer, "eos_token_id", "bos_token_id")


def padding_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id that fills an incomplete block: pad, or eos where there is none (GPT-2)."""
    return _first_id(tokenizer, "pad_token_id", "eos_token_id", "bos_token_id")


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without start and end tokens.

    A text that spells out a special token ("<|endoftext|>") is encoded as ordinary characters, so that data
    cannot forge the end of a document. Never truncates, never warns about length.
    """
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash of everything that decides which ids a document gets."""
    ids = [document_start_id(tokenizer), document_end_id(tokenizer), padding_id(tokenizer)]
    content = tokenizer.backend_tokenizer.to_str() + json.dumps(ids)
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


def _first_id(tokenizer: PreTrainedTokenizerFast, *names: str) -> int:
    for name in names:
        value = getattr(tokenizer, name)
        if value is not None:
            return int(value)
    raise ConfigError(
        f"tokenizer {tokenizer.name_or_path!r} has neither a bos nor an eos token, so documents cannot be "
        "told apart; set one of them in its tokenizer_config.json, or use another tokenizer"
    )
