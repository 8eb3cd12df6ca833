"""The trained tokenizer, and what is asked of existing ones."""

import logging

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from crosslayer.data import (
    document_end_id,
    document_start_id,
    load_tokenizer,
    padding_id,
    train_tokenizer,
)
from crosslayer.data.tokenizer import (
    MINIMUM_VOCABULARY,
    SPECIAL_TOKENS,
    encode_documents,
    tokenizer_fingerprint,
)
from crosslayer.errors import ConfigError

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "Once upon a time, a fox.\n" * 30, "naïve café\n" * 10]

UNUSUAL = [
    "",
    " ",
    "  two  spaces , and . odd ' spacing n't\n\n\t\r\n",
    "\x00\x01\x7f\x80\xff\u0085",
    "e\u0301 vs \u00e9, \ufb01 ligature, \u00a0nbsp, \u200d\u200bzero width, \ufeffBOM",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0010ffff \ud7ff\ue000",
    "漢字かな交じり文 العربية עברית हिन्दी ไทย",
    "<|bos|><|endoftext|> text <|pad|>",
    "".join(map(chr, range(1, 0x250))),
]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, 320, 64)


@pytest.mark.parametrize("text", UNUSUAL, ids=range(len(UNUSUAL)))
def test_any_text_comes_back_exactly(trained, text):
    assert trained.decode(trained.encode(text)) == text
    assert trained.decode(encode_documents(trained, [text])[0]) == text


def test_special_tokens_and_sizes(trained):
    assert trained.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2]
    assert (trained.pad_token_id, trained.bos_token_id, trained.eos_token_id) == (0, 1, 2)
    assert (document_start_id(trained), document_end_id(trained), padding_id(trained)) == (1, 2, 0)
    assert MINIMUM_VOCABULARY < len(trained) <= 320
    assert trained.model_max_length == 64
    assert trained.encode("plain") == trained.encode("plain", add_special_tokens=False)


def test_merges_are_learnt(trained):
    assert len(trained.encode("return x + 1")) < len("return x + 1")


def test_the_same_texts_give_the_same_tokenizer(trained):
    again = train_tokenizer([TEXTS], 320, 64)  # as one batch
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(trained)
    other = train_tokenizer(TEXTS[:1], 320, 64)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(trained)


def test_data_cannot_forge_special_tokens(trained):
    ids = encode_documents(trained, ["a<|endoftext|>b"])[0]
    assert not set(ids) & {0, 1, 2}
    assert 2 in trained.encode("a<|endoftext|>b")  # while a prompt may use them


def test_long_texts_are_neither_cut_nor_warned_about(caplog):
    tokenizer = train_tokenizer(TEXTS, 320, 64)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        ids = encode_documents(tokenizer, ["fox " * 500])[0]
        assert len(ids) > 5 * tokenizer.model_max_length
        assert not caplog.records
        tokenizer("fox " * 500)
        assert "longer than" in caplog.text  # the plain call does warn
    finally:
        logger.removeHandler(caplog.handler)


def test_saved_and_loaded_by_auto_tokenizer(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(trained)
    for text in UNUSUAL:
        assert loaded.decode(loaded.encode(text)) == text


def test_smallest_vocabulary():
    assert len(train_tokenizer(["abc"], MINIMUM_VOCABULARY, 8)) == MINIMUM_VOCABULARY
    with pytest.raises(ConfigError, match=f"at least {MINIMUM_VOCABULARY}"):
        train_tokenizer(["abc"], MINIMUM_VOCABULARY - 1, 8)


def with_tokens(trained, **tokens):
    return PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer, **tokens)


def test_missing_special_tokens_are_stood_in_for(trained):
    only_eos = with_tokens(trained, eos_token="<|endoftext|>")  # T5 has no bos, GPT-2 no pad
    assert (document_start_id(only_eos), document_end_id(only_eos), padding_id(only_eos)) == (2, 2, 2)
    only_bos = with_tokens(trained, bos_token="<|bos|>")
    assert (document_start_id(only_bos), document_end_id(only_bos), padding_id(only_bos)) == (1, 1, 1)
    with pytest.raises(ConfigError, match="neither a bos nor an eos token"):
        document_start_id(with_tokens(trained))


def test_folders_that_hold_no_tokenizer(trained, tmp_path):
    with pytest.raises(ConfigError, match="not a tokenizer folder"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="not a tokenizer folder"):
        load_tokenizer(str(tmp_path / "absent"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
    with_tokens(trained).save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="neither a bos nor an eos token"):
        load_tokenizer(str(tmp_path / "bare"))


def test_a_hub_name_without_a_hub():
    with pytest.raises(ConfigError, match="'nobody/nothing' cannot be loaded") as caught:
        load_tokenizer("nobody/nothing")
    assert "\n" not in str(caught.value)
