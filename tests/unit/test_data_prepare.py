"""Split, cache and the blocks that come out, from the configuration to what a Trainer collates."""

import hashlib
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import default_data_collator

from crosslayer.data import (
    IGNORE_INDEX,
    DataConfig,
    cache,
    load_documents,
    load_evaluation_data,
    prepare_data,
    train_tokenizer,
)
from crosslayer.data import prepare as prepare_module
from crosslayer.data import sources as sources_module
from crosslayer.data.tokenizer import encode_documents
from crosslayer.errors import ConfigError, DataError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared/data beside the checkout")

WORDS = "the a of red green blue tree house runs sleeps quickly slowly under".split()  # noqa: SIM905


def make_texts(count, seed=0):
    rng = random.Random(seed)
    return [f"Document {i}: " + " ".join(rng.choices(WORDS, k=rng.randrange(5, 80))) for i in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def make(tmp_path):
    """Configurations over 200 small documents, with a cache of the test's own."""
    path = write_jsonl(tmp_path / "docs.jsonl", make_texts(200))
    defaults = {
        "data": str(path),
        "cache_dir": str(tmp_path / "cache"),
        "tokenizer_vocab_size": 300,
        "block_size": 32,
        "validation_fraction": 0.1,
    }
    return lambda **fields: DataConfig(**{**defaults, **fields})


def documents_in(blocks, tokenizer):
    """The texts in packed blocks, joined again over block borders."""
    ids = [blocks[0]["input_ids"][0]]
    for block in blocks:
        padding = next(
            (i for i in range(1, len(block["labels"])) if block["input_ids"][i] == tokenizer.pad_token_id),
            None,
        )
        ids += block["input_ids"][1:padding]
    texts = tokenizer.decode(ids).split(tokenizer.bos_token)[1:]
    return [text.removesuffix(tokenizer.eos_token) for text in texts]


def cache_entries(config):
    return sorted(path.name for path in Path(config.cache_dir).iterdir())


# ------------------------------------------------------------------------------------------------ the blocks


def test_prepared_blocks_hold_the_documents_in_order(make):
    config = make()
    prepared = prepare_data(config)
    texts = make_texts(200)
    limit = 0.1 * 2**64
    held_out = [t for t in texts if int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) < limit]
    trained = [text for text in texts if text not in held_out]
    assert 5 < len(held_out) < 50

    assert documents_in(prepared.validation, prepared.tokenizer) == held_out
    found = documents_in(prepared.train, prepared.tokenizer)
    assert found[:-1] == trained[: len(found) - 1]  # the last block, incomplete, is dropped
    assert len(trained) - len(found) < 5

    train, validation = prepared.statistics.train, prepared.statistics.validation
    assert (train.documents, validation.documents) == (len(trained), len(held_out))
    assert train.bytes == sum(len(text.encode()) for text in trained)
    assert validation.bytes == sum(len(text.encode()) for text in held_out)
    assert validation.predicted_tokens == validation.tokens - validation.documents
    assert (train.blocks, validation.blocks) == (len(prepared.train), len(prepared.validation))
    labels = [label for block in prepared.validation for label in block["labels"] if label != IGNORE_INDEX]
    assert len(labels) == validation.predicted_tokens
    assert (prepared.statistics.skipped, prepared.statistics.duplicates) == (0, 0)
    assert prepared.statistics.vocab_size == len(prepared.tokenizer)


def test_columns_and_what_a_trainer_collates(make):
    prepared = prepare_data(make())
    for split in (prepared.train, prepared.validation):
        assert split.column_names == ["input_ids", "position_ids", "labels"]
        assert all(type(value) is int for column in split[0].values() for value in column)
        assert {len(column) for row in split for column in row.values()} == {32}
    batch = default_data_collator([prepared.train[0], prepared.train[1]])
    assert set(batch) == set(prepared.train.column_names)
    assert {(tuple(column.shape), column.dtype) for column in batch.values()} == {((2, 32), torch.int64)}


def test_changing_one_document_never_changes_the_logits_of_another(tmp_path, make):
    """Position restarts are all that transformers needs, as long as no cache is asked for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(make_texts(50), 300, 64)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.5, **shape)).eval()

    def logits_of_last_document(texts, use_cache=False):
        path = write_jsonl(tmp_path / "three.jsonl", texts)
        block = load_evaluation_data(make(data=str(path)), tokenizer, 64)[0][0]
        columns = {name: torch.tensor(block[name])[None] for name in ("input_ids", "position_ids")}
        starts = [i for i, token in enumerate(block["input_ids"]) if token == tokenizer.bos_token_id]
        with torch.no_grad():
            return model(**columns, use_cache=use_cache).logits[0, starts[2] : starts[2] + 3]

    expected = logits_of_last_document(["red tree", "green house", "blue"])
    for texts in (["red tree", "xyz", "blue"], ["a", "green house and more", "blue"]):
        torch.testing.assert_close(logits_of_last_document(texts), expected, rtol=1e-5, atol=1e-5)
        leaking = logits_of_last_document(texts, use_cache=True)  # a cache turns the packed mask off
        assert (leaking - expected).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------- the split


def test_the_split_depends_on_the_text_alone(tmp_path, make):
    first = prepare_data(make())
    texts = make_texts(200)
    random.Random(1).shuffle(texts)
    moved = write_jsonl(tmp_path / "moved.jsonl", texts + texts[:50])
    second = prepare_data(make(data=str(moved)))
    before = set(documents_in(first.validation, first.tokenizer))
    after = documents_in(second.validation, second.tokenizer)
    assert set(after) == before
    assert len(after) > len(before)  # duplicates stay on the side of their twins
    assert not before & set(documents_in(second.train, second.tokenizer))


def test_only_training_documents_reach_the_tokenizer(make, monkeypatch):
    seen = []

    def spy(texts, *arguments):
        seen.extend(text for batch in texts for text in batch)
        return train_tokenizer(seen, *arguments)

    monkeypatch.setattr(prepare_module, "train_tokenizer", spy)
    prepared = prepare_data(make())
    held_out = documents_in(prepared.validation, prepared.tokenizer)
    assert len(seen) + len(held_out) == 200
    assert not set(seen) & set(held_out)
    seen.clear()
    prepare_data(make(max_tokenizer_documents=7))
    assert len(seen) == 7


def test_validation_data_is_used_whole_and_kept_out_of_training(tmp_path, make):
    texts = make_texts(200)
    other = write_jsonl(tmp_path / "other.jsonl", [*texts[:3], "", "an unseen text"])
    prepared = prepare_data(make(validation_data=str(other)))
    assert documents_in(prepared.validation, prepared.tokenizer) == [*texts[:3], "an unseen text"]
    assert prepared.statistics.duplicates == 3
    assert prepared.statistics.train.documents == 197
    assert not set(texts[:3]) & set(documents_in(prepared.train, prepared.tokenizer))
    with pytest.raises(DataError, match="each of its 200 documents is also in validation_data"):
        prepare_data(make(validation_data=make().data))


@pytest.mark.parametrize("count", [2, 3, 11])
@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_few_documents_still_have_two_sides(tmp_path, make, caplog, count, fraction):
    """The one whose hash comes first is held out; where all would be, the one whose hash comes last is trained on."""
    texts = make_texts(count) * 2  # twins stay together
    path = write_jsonl(tmp_path / "few.jsonl", texts)
    config = make(data=str(path), validation_fraction=fraction, block_size=4)
    with caplog.at_level(logging.INFO, logger="crosslayer"):
        prepared = prepare_data(config)
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    held_out = set(by_hash[:1]) if fraction < 0.5 else set(by_hash[:-2])
    assert set(documents_in(prepared.validation, prepared.tokenizer)) == held_out
    assert prepared.statistics.train.documents + prepared.statistics.validation.documents == 2 * count
    assert "hash comes" in caplog.text
    blocks, _ = load_evaluation_data(config, prepared.tokenizer, part="validation")
    assert blocks[:] == prepared.validation[:]


def test_one_text_alone_cannot_be_split(tmp_path, make):
    path = write_jsonl(tmp_path / "twins.jsonl", make_texts(1) * 5)
    with pytest.raises(DataError, match="of 5 documents"):
        prepare_data(make(data=str(path)))


def test_a_short_stream_still_has_two_sides(tmp_path, make, monkeypatch):
    texts = make_texts(9)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()
    )
    monkeypatch.setattr(sources_module, "hub_revision", lambda name: "commit")
    first = min(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    stream = {"data": "hf:a/b", "streaming": True, "shuffle_buffer": 0, "validation_fraction": 1e-9, "block_size": 4}
    prepared = prepare_data(make(**stream))
    assert documents_in(prepared.validation, prepared.tokenizer) == [first]
    assert first not in documents_in(list(prepared.train.one_pass()), prepared.tokenizer)
    assert documents_in(list(prepared.train.one_pass()), prepared.tokenizer) == [t for t in texts if t != first]
    blocks, _ = load_evaluation_data(make(**stream), prepared.tokenizer, part="validation")
    assert blocks[:] == prepared.validation[:]


def test_books_in_one_file_are_cut_and_split(tmp_path, make):
    books = ["".join(f"Line {i} of book {j}.\n\n" for i in range(6000)) for j in range(3)]
    path = write_jsonl(tmp_path / "books.jsonl", books)
    statistics = prepare_data(make(data=str(path))).statistics
    assert statistics.cut == 3
    assert statistics.validation.documents >= 1
    assert statistics.train.bytes + statistics.validation.bytes == sum(map(len, books))


def test_caps(make):
    everything = prepare_data(make()).statistics
    capped = prepare_data(make(max_validation_documents=3))
    assert capped.statistics.validation.documents == 3
    assert capped.statistics.train.documents == everything.train.documents  # dropped, never trained on
    fewer = prepare_data(make(max_documents=100)).statistics
    assert fewer.train.documents + fewer.validation.documents == 100


def test_white_space_is_no_document(tmp_path, make):
    path = write_jsonl(tmp_path / "blank.jsonl", ["", " \n", *make_texts(100), "\t"])
    statistics = prepare_data(make(data=str(path))).statistics
    assert statistics.train.documents + statistics.validation.documents == 100
    path = write_jsonl(tmp_path / "nothing.jsonl", ["", " \n"])
    with pytest.raises(DataError, match="no document holds any text"):
        prepare_data(make(data=str(path)))


# ------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def no_tokenising(monkeypatch):
    """Call it, and whatever tokenises or trains a tokenizer from then on fails the test."""

    def forbid():
        def fail(*_, **__):
            raise AssertionError("tokenised again")

        monkeypatch.setattr(prepare_module, "pack_documents", fail)
        monkeypatch.setattr(prepare_module, "train_tokenizer", fail)

    return forbid


def test_the_second_call_reads_the_cache(make, no_tokenising):
    first = prepare_data(make())
    no_tokenising()
    second = prepare_data(make())
    assert (first.statistics.cache_hit, second.statistics.cache_hit) == (False, True)
    assert second.statistics.train == first.statistics.train
    assert second.statistics.validation == first.statistics.validation
    assert second.statistics.cache_path == first.statistics.cache_path
    assert second.train[:] == first.train[:]
    assert second.validation[:] == first.validation[:]
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert second.tokenizer.decode(second.tokenizer.encode("a 'b' . c")) == "a 'b' . c"
    with pytest.raises(AssertionError, match="tokenised again"):  # the guard works
        prepare_data(make(block_size=16))


def test_what_makes_a_new_cache_and_what_does_not(tmp_path, make, monkeypatch):
    base = prepare_data(make())
    base.tokenizer.save_pretrained(tmp_path / "tokenizer")
    other = write_jsonl(tmp_path / "other.jsonl", make_texts(30, seed=3))
    changes = [
        {"block_size": 16},
        {"tokenizer_vocab_size": 310},
        {"max_tokenizer_documents": 10},
        {"validation_fraction": 0.2},
        {"max_validation_documents": 5},
        {"max_documents": 150},
        {"validation_data": str(other)},
        {"tokenizer": str(tmp_path / "tokenizer")},
        {"skip_bad": True},
    ]
    paths = [prepare_data(make(**change)).statistics.cache_path for change in changes]
    assert len({base.statistics.cache_path, *paths}) == len(changes) + 1
    assert prepare_data(make(seed=1)).statistics.cache_hit
    moved = tmp_path / "elsewhere" / "docs.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(Path(make().data).read_bytes())
    assert prepare_data(make(data=str(moved))).statistics.cache_hit
    moved.write_bytes(moved.read_bytes().replace(b"Document 17:", b"Document 71:"))
    assert not prepare_data(make(data=str(moved))).statistics.cache_hit
    monkeypatch.setenv("CROSSLAYER_CACHE", str(tmp_path / "from-environment"))
    path = prepare_data(make(cache_dir=None)).statistics.cache_path
    assert path == str(tmp_path / "from-environment" / Path(base.statistics.cache_path).name)


def test_another_tokenizer_in_the_same_folder_makes_a_new_cache(tmp_path, make):
    folder = tmp_path / "tokenizer"
    train_tokenizer(make_texts(50), 280, 32).save_pretrained(folder)
    first = prepare_data(make(tokenizer=str(folder)))
    assert prepare_data(make(tokenizer=str(folder))).statistics.cache_hit
    train_tokenizer(make_texts(50), 290, 32).save_pretrained(folder)
    second = prepare_data(make(tokenizer=str(folder)))
    assert not second.statistics.cache_hit
    assert second.statistics.vocab_size > first.statistics.vocab_size


def damage_truncate(folder):
    path = next((folder / "train").glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:-100])


def damage_remove(folder):
    (folder / "validation" / "state.json").unlink()


def damage_manifest(folder):
    (folder / "manifest.json").write_text("{")


def damage_contents(folder):
    path = folder / "statistics.json"
    path.write_text(" " * path.stat().st_size)  # the size is right, the content is not


def damage_one_bit(folder):
    """As a disk does it: neither size nor time change."""
    path = next((folder / "train").glob("*.arrow"))
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("damage", [damage_truncate, damage_remove, damage_manifest, damage_contents, damage_one_bit])
def test_a_damaged_cache_is_built_again_with_a_warning(make, caplog, damage):
    first = prepare_data(make())
    expected = first.train[:]
    del first.train.__dict__["_data"]  # let go of the mapped files
    damage(Path(first.statistics.cache_path))
    with caplog.at_level(logging.WARNING, logger="crosslayer"):
        second = prepare_data(make())
    assert "is damaged" in caplog.text
    assert not second.statistics.cache_hit
    assert second.train[:] == expected
    assert prepare_data(make()).statistics.cache_hit
    assert cache_entries(make()) == [Path(first.statistics.cache_path).name]


@pytest.mark.parametrize("stage", ["train_tokenizer", "_write_split"])
def test_a_crash_leaves_nothing_behind(make, monkeypatch, stage):
    calls = []
    original = getattr(prepare_module, stage)

    def crash(*arguments, **options):
        calls.append(stage)
        if stage == "_write_split" and len(calls) == 1:
            return original(*arguments, **options)  # crash in the second of the two splits
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, stage, crash)
        with pytest.raises(KeyboardInterrupt):
            prepare_data(make())
    assert cache_entries(make()) == []
    assert not prepare_data(make()).statistics.cache_hit


KILLED = """
import os, signal
from crosslayer.data import *
from crosslayer.data import prepare
def killed(*_, **__):
    print("building", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
prepare.train_tokenizer = killed
prepare_data(DataConfig(**eval(sys.argv[2])))
"""


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_writes_is_not(make):
    package = str(Path(prepare_module.__file__).parents[1])
    killed = subprocess.run([sys.executable, "-c", ALONE + KILLED, package, repr(vars(make()))], check=False)
    assert killed.returncode == -9
    assert len(cache_entries(make())) == 2  # a folder and its lock
    (Path(make().cache_dir) / f".{'0' * 24}.old").mkdir()  # of a version that took no lock
    with cache.building(Path(make().cache_dir) / ("f" * 24)) as living:
        (living / "half").write_text("")
        prepared = prepare_data(make())
        assert (living / "half").exists()
    assert cache_entries(make()) == sorted([Path(prepared.statistics.cache_path).name, "f" * 24])


def test_a_full_disk_is_a_clear_error(make, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "_write_split", full)
    with pytest.raises(DataError, match=r"building the data cache failed \(No space left on device\)"):
        prepare_data(make())
    assert cache_entries(make()) == []


def test_two_processes_may_race(make, monkeypatch):
    """The other one finishes while this one is still writing."""
    original = prepare_module._build

    def slow_build(folder, given, *rest):
        with monkeypatch.context() as patch:
            patch.setattr(prepare_module, "_build", original)
            assert not prepare_data(given.config).statistics.cache_hit
        original(folder, given, *rest)

    monkeypatch.setattr(prepare_module, "_build", slow_build)
    prepared = prepare_data(make())
    assert len(prepared.train) == prepared.statistics.train.blocks
    assert cache_entries(make()) == [Path(prepared.statistics.cache_path).name]


ALONE = """import sys, types
sys.modules["crosslayer"] = package = types.ModuleType("crosslayer")
package.__path__ = [sys.argv[1]]
"""
"""Start of a script that imports crosslayer.data without what crosslayer/__init__.py may import (sooner done)."""


def run_alone(script, *arguments):
    package = str(Path(prepare_module.__file__).parents[1])
    subprocess.run([sys.executable, "-c", ALONE + script, package, *arguments], check=True)


def test_the_same_in_another_process(make):
    """The cache key, the split and the trained tokenizer depend on nothing that changes between processes."""
    config = make()
    script = "from crosslayer.data import *; prepare_data(DataConfig(**eval(sys.argv[2])))"
    run_alone(script, repr(vars(config)))
    first = prepare_data(config)
    assert first.statistics.cache_hit
    Path(config.cache_dir).rename(Path(config.cache_dir).with_name("moved"))
    second = prepare_data(config)
    assert not second.statistics.cache_hit
    assert second.statistics.cache_path == first.statistics.cache_path
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert second.validation[:] == first.validation[:]


# ------------------------------------------------------------------------------------------------- bad input


def test_refusals_leave_no_cache(tmp_path, make):
    short = write_jsonl(tmp_path / "short.jsonl", ["few words"] * 3 + ["other words"])
    lone = tmp_path / "lone.txt"
    lone.write_text("One text. " * 50)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text"\n')
    valid = str(write_jsonl(tmp_path / "valid.jsonl", ["held out"]))
    for fields, message in [
        (
            {"data": str(short), "validation_data": valid, "block_size": 512},
            r"hold \d+ tokens, but one block needs 512; add text or lower block_size",
        ),
        (
            {"data": str(lone)},
            "leaves 1 of 1 documents for training and 0 for validation; give validation_data",
        ),
        ({"data": str(lone), "validation_fraction": 0.999999}, "leaves 0 of 1 documents for training"),
        ({"data": str(broken)}, "line 2: not valid JSON"),
        ({"data": str(tmp_path / "absent")}, "no such file or folder"),
        ({"validation_data": str(tmp_path / "absent")}, "no such file or folder"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            prepare_data(make(**fields))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="not a tokenizer folder"):
        prepare_data(make(tokenizer=str(tmp_path)))
    cache = Path(make().cache_dir)
    assert not cache.exists() or cache_entries(make()) == []


def test_skipped_things_are_counted_in_the_statistics(tmp_path, make):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "docs.jsonl", make_texts(100))
    with (folder / "docs.jsonl").open("a") as file:
        file.write("{broken\n")
    (folder / "latin.txt").write_bytes(b"na\xefve")
    with pytest.raises(DataError, match=r"latin.txt: not UTF-8"):
        prepare_data(make(data=str(folder)))
    for _ in range(2):  # also when it comes from the cache
        prepared = prepare_data(make(data=str(folder), skip_bad=True))
        assert prepared.statistics.skipped == 2
    assert prepared.statistics.cache_hit


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_of_the_whole_source_and_of_its_validation_part(make):
    prepared = prepare_data(make())
    blocks, statistics = load_evaluation_data(make(), prepared.tokenizer, part="validation")
    assert blocks[:] == prepared.validation[:]
    assert statistics == prepared.statistics.validation
    blocks, statistics = load_evaluation_data(make(), prepared.tokenizer, 50)
    assert documents_in(blocks, prepared.tokenizer) == make_texts(200)
    assert {len(row["labels"]) for row in blocks} == {50}
    assert statistics.bytes == sum(len(text.encode()) for text in make_texts(200))
    assert statistics.predicted_tokens == statistics.tokens - 200
    with pytest.raises(ConfigError, match="block_size=1 must be"):
        load_evaluation_data(make(), prepared.tokenizer, 1)


def test_evaluation_of_validation_data_and_caps(tmp_path, make):
    other = write_jsonl(tmp_path / "other.jsonl", make_texts(10, seed=9))
    config = make(validation_data=str(other), max_validation_documents=4)
    prepared = prepare_data(config)
    blocks, statistics = load_evaluation_data(config, prepared.tokenizer, part="validation")
    assert statistics.documents == 4
    assert blocks[:] == prepared.validation[:]


def test_a_single_short_document_can_be_evaluated(tmp_path, make):
    path = tmp_path / "lone.txt"
    path.write_text("tiny")
    tokenizer = train_tokenizer(["tiny"], 260, 8)
    blocks, statistics = load_evaluation_data(make(data=str(path)), tokenizer, 64)
    assert len(blocks) == 1
    assert (statistics.documents, statistics.tokens, statistics.bytes) == (1, 6, 4)
    assert statistics.predicted_tokens == 5
    path.write_text(" \n")
    with pytest.raises(DataError, match="no document holds any text"):
        load_evaluation_data(make(data=str(path)), tokenizer, 64)


# ------------------------------------------------------------------------------------------------- streaming


@pytest.fixture
def stream(tmp_path, make, monkeypatch):
    """Streaming configurations whose hub is a local file of 1500 documents."""
    path = write_jsonl(tmp_path / "hub.jsonl", make_texts(1500, seed=5))
    original = datasets.load_dataset

    def load_dataset(name, config=None, **options):
        if name != "someone/web":
            return original(name, config, **options)
        return original("json", data_files=str(path), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources_module, "hub_revision", lambda name: "commit")
    return lambda **fields: make(
        **{"data": "hf:someone/web:en", "streaming": True, "shuffle_buffer": 0, "block_size": 16, **fields}
    )


def test_streaming_packs_the_training_documents_and_holds_the_others_out(stream):
    prepared = prepare_data(stream(max_validation_documents=20))
    assert isinstance(prepared.train.one_pass(), datasets.IterableDataset)
    texts = make_texts(1500, seed=5)
    held_out = {t for t in texts if int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) < 0.1 * 2**64}
    assert documents_in(prepared.validation, prepared.tokenizer) == [t for t in texts if t in held_out][:20]
    blocks = list(prepared.train.one_pass())
    assert {len(column) for block in blocks for column in block.values()} == {16}
    trained = [text for text in texts if text not in held_out]
    tokens = sum(len(ids) + 2 for ids in encode_documents(prepared.tokenizer, trained))
    labels = [label for block in blocks for label in block["labels"] if label != IGNORE_INDEX]
    assert len(labels) == tokens - len(trained)
    assert documents_in(blocks[:50], prepared.tokenizer)[:5] == trained[:5]
    assert prepared.statistics.train.tokens is None
    assert prepared.statistics.validation.documents == 20
    batch = default_data_collator(blocks[:2])
    assert batch["labels"].dtype == torch.int64


def test_streaming_caches_tokenizer_and_validation(stream, no_tokenising):
    first = prepare_data(stream(max_validation_documents=10))
    expected = list(first.train.one_pass().take(20))
    no_tokenising()
    second = prepare_data(stream(max_validation_documents=10))
    assert second.statistics.cache_hit
    assert list(second.train.one_pass().take(20)) == expected
    assert second.validation[:] == first.validation[:]


def test_streaming_shuffles_by_seed(stream):
    def first_ids(**fields):
        return [b["input_ids"] for b in prepare_data(stream(shuffle_buffer=100, **fields)).train.one_pass().take(5)]

    assert first_ids(seed=1) == first_ids(seed=1)
    assert first_ids(seed=1) != first_ids(seed=2)


def test_streaming_with_validation_data(tmp_path, stream):
    texts = make_texts(1500, seed=5)
    other = write_jsonl(tmp_path / "other.jsonl", texts[:4])
    config = stream(validation_data=str(other), max_documents=1200)
    for _ in range(2):
        prepared = prepare_data(config)
        assert documents_in(prepared.validation, prepared.tokenizer) == texts[:4]
        assert documents_in(list(prepared.train.one_pass()), prepared.tokenizer)[0] == texts[4]
    assert prepared.statistics.cache_hit


def test_streaming_evaluation(stream):
    config = stream(max_documents=300, max_validation_documents=12)
    prepared = prepare_data(config)
    blocks, _ = load_evaluation_data(config, prepared.tokenizer, part="validation")
    assert blocks[:] == prepared.validation[:]
    _, statistics = load_evaluation_data(config, prepared.tokenizer)
    assert statistics.documents == 300
    rows = load_documents(config).take(2)
    assert [row["name"] for row in rows] == ["hf:someone/web:en:1", "hf:someone/web:en:2"]


def test_streaming_refuses_a_wrong_column(stream):
    with pytest.raises(DataError, match="no text column 'body'; the columns are 'text'"):
        prepare_data(stream(text_column="body"))


def test_importing_is_cheap():
    heavy = "{'datasets', 'transformers', 'torch', 'tokenizers', 'pyarrow'}"
    run_alone(f"import crosslayer.data; sys.exit(bool({heavy} & set(sys.modules)))")


# ------------------------------------------------------------------------------------------------- real text


@pytest.mark.data
@needs_shared_data
@pytest.mark.parametrize("name", ["t5-base", "gpt2"])
def test_openstax_with_the_tokenizers_of_the_field(tmp_path, name):
    config = DataConfig(
        data=str(SHARED / "text" / "openstax" / "valid.jsonl.gz"),
        tokenizer=str(SHARED / "tokenizers" / name),
        validation_fraction=0.1,
        max_documents=40,
        cache_dir=str(tmp_path),
    )
    prepared = prepare_data(config)
    train, validation = prepared.statistics.train, prepared.statistics.validation
    assert train.documents + validation.documents == 40
    assert prepared.statistics.vocab_size == {"t5-base": 32100, "gpt2": 50257}[name]
    start = {"t5-base": 1, "gpt2": 50256}[name]
    assert prepared.validation[0]["input_ids"][0] == start
    assert 3 < (train.bytes + validation.bytes) / (train.tokens + validation.tokens) < 6
    assert validation.predicted_tokens == validation.tokens - validation.documents
    assert prepare_data(config).statistics.cache_hit
    blocks, statistics = load_evaluation_data(config, prepared.tokenizer, 16384)
    assert statistics.documents == 40
    if name == "gpt2":  # byte-level, so the text comes back
        text = load_documents(config)[0]["text"]
        first = blocks[0]["input_ids"]
        assert text.startswith(prepared.tokenizer.decode(first[1 : first.index(start, 1)])[:2000])


@pytest.mark.data
@needs_shared_data
def test_plain_text_files_given_alone(tmp_path):
    for name in ("wikitext-2/valid.txt.gz", "tinyshakespeare.txt.gz", "wikipedia-demo.txt.gz"):
        config = DataConfig(data=str(SHARED / "text" / name), cache_dir=str(tmp_path))
        documents = load_documents(config)
        assert len(documents) > 15
        sizes = [len(text.encode()) for text in documents["text"]]
        assert sorted(sizes)[len(sizes) // 2] >= 16 * 1024
