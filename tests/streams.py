"""What streams are tested with: files of numbered documents, and which of them are in blocks."""

import json
import random
from collections import defaultdict
from pathlib import Path

from crosslayer.data import DataConfig
from tiny_run import WORDS


def write_shards(folder: Path, files: int, documents: int, seed: int = 0) -> list[str]:
    """Files of rows `document N ...`; returns all texts in order."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    texts = [f"document {i} " + " ".join(rng.choices(WORDS, k=rng.randint(3, 40))) for i in range(documents)]
    for file in range(files):
        part = texts[file * documents // files : (file + 1) * documents // files]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return texts


def stream_config(folder: Path, root: Path, **fields) -> DataConfig:
    """A stream over such files."""
    settings = {"block_size": 16, "tokenizer_vocab_size": 300, "validation_fraction": 0.1, "shuffle_buffer": 20}
    return DataConfig(data=str(folder), streaming=True, cache_dir=str(root / "cache"), **settings | fields)


def documents_of(rows, tokenizer) -> list[str]:
    """The documents in blocks of one reader, in order. The first token of a block is the last of the one before, or
    starts a document; what pads is at the end."""
    ids: list[int] = []
    for row in rows:
        tokens = [token for token in map(int, row["input_ids"]) if token != tokenizer.pad_token_id]
        ids += tokens if tokens[0] == tokenizer.bos_token_id else tokens[1:]
    texts = tokenizer.decode(ids).split(tokenizer.bos_token)
    return [text.removesuffix(tokenizer.eos_token) for text in texts if text]


def rows_by_worker(batches) -> list[list[dict]]:
    """Rows of batches that brought a position, by the worker of the loader that they came from."""
    workers = defaultdict(list)
    for batch in batches:
        workers[json.loads(batch["position"])[0]] += [{"input_ids": row} for row in batch["input_ids"].tolist()]
    return [workers[worker] for worker in sorted(workers)]
