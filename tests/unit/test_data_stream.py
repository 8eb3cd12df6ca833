"""Streams: every document read once by one reader, shuffled, and gone on with where they were."""

import itertools
import json
from collections import Counter
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from transformers import TrainingArguments

from crosslayer.data import prepare_data
from crosslayer.data.split import goes_to_validation, text_digest
from crosslayer.errors import CheckpointError, ConfigError, DataError
from crosslayer.train.stream import Passes, check_streaming, data_process
from streams import documents_of, rows_by_worker, stream_config, write_shards


def trained(texts, fraction=0.1):
    """The documents that are not held out, by the rule as it is documented."""
    return [text for text in texts if not goes_to_validation(text_digest(text), fraction)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(number of files) -> (texts, root, prepared stream) of 240 documents."""
    found = {}

    def prepare(files, **fields):
        key = (files, *sorted(fields.items()))
        if key not in found:
            root = tmp_path_factory.mktemp("stream")
            texts = write_shards(root / "texts", files, 240)
            found[key] = texts, prepare_data(stream_config(root / "texts", root, **fields))
        return found[key]

    return prepare


@pytest.mark.parametrize("shuffle_buffer", [0, 20])
@pytest.mark.parametrize("files", [1, 3, 4])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_every_document_is_read_by_one_reader_once(prepared, files, readers, shuffle_buffer):
    texts, data = prepared(files, shuffle_buffer=shuffle_buffer)
    parts = [
        documents_of(data.train.one_pass(reader=reader, readers=readers), data.tokenizer) for reader in range(readers)
    ]
    assert Counter(itertools.chain(*parts)) == Counter(trained(texts))
    assert max(map(len, parts)) - min(map(len, parts)) < 40, "parts of very different sizes"
    whole = documents_of(data.train.one_pass(), data.tokenizer)
    assert (whole == trained(texts)) == (not shuffle_buffer)
    if readers > 1:  # the count would see a document that two of them read
        assert Counter(itertools.chain(*parts, parts[0])) != Counter(trained(texts))


def test_no_token_is_lost(prepared):
    """Blocks at the end of a batch are filled, not dropped."""
    texts, data = prepared(1, shuffle_buffer=0)
    rows = list(data.train.one_pass())
    labels = sum(label != -100 for row in rows for label in row["labels"])
    ids = data.tokenizer(trained(texts), add_special_tokens=False)["input_ids"]
    assert labels == sum(len(tokens) + 1 for tokens in ids)  # the end of each document is predicted too


def test_passes_differ_and_repeat(prepared):
    _, data = prepared(3)
    orders = [documents_of(data.train.one_pass(number), data.tokenizer) for number in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_documents_of_several_files_are_mixed(prepared):
    texts, data = prepared(4)
    first = documents_of(data.train.one_pass(), data.tokenizer)[:40]
    assert {texts.index(text) // 60 for text in first} == {0, 1, 2, 3}


@pytest.mark.parametrize("reader", [0, 1])
@pytest.mark.parametrize("files", [1, 4])
def test_a_pass_goes_on_anywhere_twice(prepared, files, reader):
    """From a state after any block, and from a state of what went on from it."""
    _, data = prepared(files)
    whole = list(data.train.one_pass(1, reader=reader, readers=2))
    for first, second in [(1, 1), (7, 30), (50, 3), (len(whole) - 1, 1), (len(whole), 0)]:
        done = 0
        state = None
        for count in (first, second):
            blocks = data.train.one_pass(1, reader=reader, readers=2)
            if state is not None:
                blocks.load_state_dict(json.loads(state))
            rows = list(itertools.islice(blocks, count))
            assert rows == whole[done : done + count]
            done, state = done + count, json.dumps(blocks.state_dict()) if rows else state
        blocks.load_state_dict(json.loads(state))
        assert list(blocks) == whole[done:]


def test_the_first_documents_alone(prepared):
    texts, data = prepared(3, max_documents=100)
    parts = [documents_of(data.train.one_pass(reader=p, readers=2), data.tokenizer) for p in range(2)]
    assert Counter(itertools.chain(*parts)) == Counter(trained(texts[:100]))


def test_a_local_stream_holds_out_what_the_same_files_would(tmp_path):
    texts = write_shards(tmp_path / "texts", 3, 90)
    config = stream_config(tmp_path / "texts", tmp_path)
    validation = documents_of(prepare_data(config).validation, prepare_data(config).tokenizer)
    assert validation == [text for text in texts if text not in trained(texts)]
    assert prepare_data(config).statistics.cache_hit
    other = write_shards(tmp_path / "other", 1, 5, seed=1)
    given = prepare_data(stream_config(tmp_path / "texts", tmp_path, validation_data=str(tmp_path / "other")))
    assert documents_of(given.validation, given.tokenizer) == other
    assert sorted(documents_of(given.train.one_pass(), given.tokenizer)) == sorted(texts)


def test_what_a_stream_refuses(tmp_path):
    with pytest.raises(
        ConfigError, match="streaming is for files, folders and hub datasets, not data='python-library'"
    ):
        stream_config("python-library", tmp_path)
    write_shards(tmp_path / "texts", 2, 90)
    (tmp_path / "texts" / "1.jsonl").write_text('{"text": "fine"}\n' * 40 + "{broken\n")
    few = {"max_tokenizer_documents": 9, "max_validation_documents": 1}
    data = prepare_data(stream_config(tmp_path / "texts", tmp_path, **few))
    with pytest.raises(DataError, match=r"1\.jsonl, line 41: not valid JSON"):
        list(data.train.one_pass())
    (tmp_path / "texts" / "2.txt").write_bytes(b"na\xefve")
    with pytest.raises(DataError, match=r"2\.txt: not UTF-8"):
        prepare_data(stream_config(tmp_path / "texts", tmp_path))


# ------------------------------------------------------------------------------------------------------- loaders


def batches(data, tmp_path, count, workers, folder=None):
    """`count` batches as the Trainer takes them, and the stream they came from; from the positions in a folder."""
    passes = Passes(data.train, 4)
    arguments = TrainingArguments(str(tmp_path), dataloader_num_workers=workers, dataloader_pin_memory=False)
    loader = passes.loader(arguments, Accelerator(cpu=True))
    if folder is not None:
        passes.load(folder, 0)
        loader = passes.resumed(loader)
    found = []
    for batch in itertools.islice(loader, count):
        found.append(dict(batch))
        passes.trained_on(batch)
    return found, passes


@pytest.mark.parametrize(("workers", "files"), [(0, 1), (2, 3), (2, 1)])
def test_a_loader_goes_on_twice(prepared, tmp_path, workers, files):
    _, data = prepared(files)
    whole, _ = batches(data, tmp_path, 300, workers)
    assert json.loads(whole[-1]["position"])[1] >= 1, "no second pass"
    at, folder = 0, None
    for count in (1, 80, 219):  # after one batch no second worker has delivered any
        found, passes = batches(data, tmp_path, count, workers, folder)
        for batch, expected in zip(found, whole[at : at + count], strict=True):
            assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
        at, folder = at + count, tmp_path
        passes.save(folder, 0)


@pytest.mark.parametrize(("workers", "files"), [(0, 3), (2, 3), (2, 1)])
def test_workers_share_the_documents(prepared, tmp_path, workers, files):
    texts, data = prepared(files)
    whole, _ = batches(data, tmp_path, 400, workers)
    parts = []
    for rows in rows_by_worker(whole):
        *found, _ = documents_of(rows, data.tokenizer)  # the last one may be cut
        count = len(set(found))
        assert len(found) > count, "no second pass"
        assert len(set(found[:count])) == count
        parts.append(set(found))
    assert len(parts) == max(workers, 1)
    assert Counter(itertools.chain(*parts)) == Counter(trained(texts))


def test_a_lost_position_is_said(prepared, tmp_path):
    passes = Passes(prepared(1)[1].train, 4)
    with pytest.raises(CheckpointError, match=r"stream_0\.json cannot be read"):
        passes.load(tmp_path, 0)


def test_tensor_parallel_processes_read_the_same():
    shared = SimpleNamespace(non_data_parallel_size=2)
    found = [
        data_process(SimpleNamespace(process_index=p, num_processes=4, parallelism_config=shared)) for p in range(4)
    ]
    assert found == [(0, 2), (0, 2), (1, 2), (1, 2)]
    alone = SimpleNamespace(process_index=3, num_processes=4, parallelism_config=None)
    assert data_process(alone) == (3, 4)


@pytest.mark.parametrize("name", ["dispatch_batches", "split_batches"])
def test_streams_are_divided_once(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name} is not for streams"):
        check_streaming(TrainingArguments(str(tmp_path), accelerator_config={name: True}))
    check_streaming(TrainingArguments(str(tmp_path)))
