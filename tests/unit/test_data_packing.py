"""Packing against a slow, obviously right reference."""

import random

import numpy as np
import pytest
import torch
from transformers.masking_utils import find_packed_sequence_indices

from crosslayer.data.packing import (
    BLOCK_COLUMNS,
    IGNORE_INDEX,
    DocumentPacker,
    cut_blocks,
    join_documents,
    padded_block,
)

START, END, PAD = 1, 2, 0


class LetterTokenizer:
    """One token a character (ids from 10), with the attributes that packing asks for."""

    name_or_path = "letters"
    bos_token_id, eos_token_id, pad_token_id = START, END, PAD

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(letter) - ord("a") + 10 for letter in text] for text in texts]}


def reference(documents, block_size, pad_last):
    """Blocks as lists of (id, position, label), built one token at a time."""
    stream = []
    for document in documents:
        stream.append((START, True))
        stream.extend((token, False) for token in document)
        stream.append((END, False))
    blocks, first = [], 0
    while first + 1 < len(stream):
        block, position = [], 0
        for offset in range(block_size):
            index = first + offset
            if index >= len(stream):
                block.append((PAD, 0, IGNORE_INDEX))
                continue
            token, is_start = stream[index]
            restart = is_start or offset == 0
            position = 0 if restart else position + 1
            block.append((token, position, IGNORE_INDEX if restart else token))
        if first + block_size <= len(stream) or pad_last:
            blocks.append(block)
        first += block_size - 1
    return blocks


def pack(documents, block_size, pad_last, batch_size=3):
    """The same blocks from DocumentPacker, fed batch by batch as `Dataset.map` does."""
    texts = ["".join(chr(token - 10 + ord("a")) for token in document) for document in documents]
    packer = DocumentPacker(LetterTokenizer(), block_size, pad_last=pad_last, rows=len(texts))
    blocks = []
    for first in range(0, len(texts), batch_size):
        batch = texts[first : first + batch_size]
        columns = packer({"text": batch}, list(range(first, first + len(batch))))
        assert {column.dtype for column in columns.values()} == {np.dtype(np.int32)}
        rows = np.stack([columns[name] for name in BLOCK_COLUMNS], axis=-1)
        blocks += [[tuple(cell) for cell in block] for block in rows.tolist()]
    return blocks, packer.statistics()


def random_documents(seed):
    random.seed(seed)
    count = random.choice([1, 2, 5, 17])
    longest = random.choice([1, 4, 30])
    return [[random.randrange(10, 36) for _ in range(random.randrange(longest + 1))] for _ in range(count)]


@pytest.mark.parametrize("pad_last", [False, True])
@pytest.mark.parametrize("block_size", [2, 3, 5, 8, 13, 64])
def test_blocks_equal_the_reference(block_size, pad_last):
    for seed in range(25):
        documents = random_documents(seed)
        for batch_size in (1, 4, 100):
            blocks, _ = pack(documents, block_size, pad_last, batch_size)
            assert blocks == reference(documents, block_size, pad_last)


@pytest.mark.parametrize("block_size", [2, 3, 7, 16])
def test_every_token_but_the_starts_is_a_label_exactly_once_and_in_order(block_size):
    for seed in range(25):
        documents = random_documents(seed)
        blocks, statistics = pack(documents, block_size, pad_last=True)
        labels = [label for block in blocks for _, _, label in block if label != IGNORE_INDEX]
        assert labels == [token for document in documents for token in [*document, END]]
        assert statistics.predicted_tokens == len(labels)
        assert statistics.tokens == len(labels) + len(documents)
        assert statistics.documents == len(documents)
        assert statistics.bytes == sum(map(len, documents))
        assert statistics.blocks == len(blocks)


@pytest.mark.parametrize("block_size", [2, 5, 9])
def test_training_drops_only_the_incomplete_block(block_size):
    for seed in range(25):
        documents = random_documents(seed)
        padded, _ = pack(documents, block_size, pad_last=True)
        whole, statistics = pack(documents, block_size, pad_last=False)
        assert whole == padded[: len(whole)]
        assert len(padded) - len(whole) <= 1
        assert 0 <= statistics.tokens - len(documents) - statistics.predicted_tokens < block_size + len(documents)


@pytest.mark.parametrize("block_size", [4, 11])
def test_transformers_sees_each_document_as_a_sequence_of_its_own(block_size):
    """Restarts must be visible as a step other than +1, one-token segments included."""
    documents = [[10], [], [11, 12, 13, 14, 15, 16, 17], [], [18], [19, 20]]
    blocks, _ = pack(documents, block_size, pad_last=True)
    positions = torch.tensor([[position for _, position, _ in block] for block in blocks])
    packed = find_packed_sequence_indices(positions)
    for block, sequence in zip(blocks, packed.tolist(), strict=True):
        expected, current = [], 0
        for offset, (token, _, label) in enumerate(block):
            is_pad = token == PAD
            if offset and (token == START or is_pad):
                current += 1
            expected.append(current)
            assert not (is_pad and label != IGNORE_INDEX)
        assert sequence == expected


def test_a_hand_written_example():
    ids, is_start = join_documents([[10, 11], [12]], START, END)
    assert ids.tolist() == [1, 10, 11, 2, 1, 12, 2]
    assert is_start.tolist() == [True, False, False, False, True, False, False]
    blocks, used = cut_blocks(ids, is_start, 3)
    assert blocks["input_ids"].tolist() == [[1, 10, 11], [11, 2, 1], [1, 12, 2]]
    assert blocks["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0], [0, 1, 2]]
    assert blocks["labels"].tolist() == [[-100, 10, 11], [-100, 2, -100], [-100, 12, 2]]
    assert used == 6
    left = padded_block(ids[:2], is_start[:2], 4, PAD)
    assert left["input_ids"].tolist() == [[1, 10, 0, 0]]
    assert left["position_ids"].tolist() == [[0, 1, 0, 0]]
    assert left["labels"].tolist() == [[-100, 10, -100, -100]]


def test_too_few_tokens_give_no_block_and_nothing_is_used_up():
    ids, is_start = join_documents([[10]], START, END)
    blocks, used = cut_blocks(ids, is_start, 4)
    assert blocks["input_ids"].shape == (0, 4)
    assert used == 0


def test_padding_needs_the_number_of_rows():
    with pytest.raises(ValueError, match="number of rows"):
        DocumentPacker(LetterTokenizer(), 4, pad_last=True)


def test_ten_million_tokens_pack_in_seconds():
    """The vectorised cut, on a tenth of that in a tenth of the time; a loop over tokens takes far longer."""
    import time

    is_start = np.zeros(1_000_000, np.bool_)
    is_start[::997] = True
    ids = np.arange(1_000_000, dtype=np.int32)
    begin = time.perf_counter()
    cut_blocks(ids, is_start, 256)
    assert time.perf_counter() - begin < 0.5


def test_little_text_is_tokenised_at_a_time(monkeypatch):
    """A tokenizer takes some 200 bytes for each of a text; its ids do not depend on how many texts it gets at once."""
    sizes = []

    class Counting(LetterTokenizer):
        def __call__(self, texts, **_):
            sizes.append(sum(map(len, texts)))
            return super().__call__(texts)

    texts = ["abc" * size for size in (30, 90, 1, 10, 300, 2, 4, 0, 100)]
    monkeypatch.setattr("crosslayer.data.packing._CHARACTERS", 300)
    little, all_at_once = DocumentPacker(Counting(), 50), DocumentPacker(LetterTokenizer(), 50)
    found = little.add(texts)
    assert sizes == [90, 273, 30, 900, 18, 300]  # one text is never divided
    monkeypatch.undo()
    for name, column in all_at_once.add(texts).items():
        assert (found[name] == column).all()
    assert little.statistics() == all_at_once.statistics()
