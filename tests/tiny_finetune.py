"""Fine-tuning runs small enough for a unit test: a two-word language, an encoder and a CR-Net of four small blocks."""

import json
import random
from pathlib import Path

from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from crosslayer import CRNetConfig, CRNetForCausalLM
from crosslayer.data import train_tokenizer
from crosslayer.train import build_finetune_recipe

GOOD, BAD = ["fine", "great", "lovely", "bright"], ["awful", "dull", "broken", "grim"]
FILLER = ["film", "story", "and", "the", "a", "song", "very", "with"]


def sentence(rng: random.Random, words: list[str]) -> str:
    chosen = [*rng.choices(FILLER, k=rng.randint(3, 7)), rng.choice(words)]
    rng.shuffle(chosen)
    return " ".join(chosen)


def rows_of(count: int, seed: int) -> list[dict]:
    """Sentences with a good or a bad word, told apart by `label`; with a score and an answer for other tasks."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        label = index % 2
        text = sentence(rng, GOOD if label else BAD)
        rows.append({"sentence": text, "label": label, "score": label + 0.1 * len(text.split()), "idx": index})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_task(folder: Path, train: int = 48, validation: int = 16) -> Path:
    """A folder in the form of GLUE's SST-2."""
    write_rows(folder / "train.jsonl", rows_of(train, 0))
    write_rows(folder / "validation.jsonl", rows_of(validation, 1))
    return folder


def write_instructions(path: Path, count: int = 40) -> Path:
    rng = random.Random(2)
    rows = []
    for index in range(count):
        text = sentence(rng, GOOD if index % 2 else BAD)
        answer = "good" if index % 2 else "bad"
        rows.append({"instruction": "Judge the sentence.", "input": text, "output": answer})
    return write_rows(path, rows)


def tiny_tokenizer():
    texts = [row["sentence"] for row in rows_of(200, 3)] + [
        "### Instruction: Judge the sentence. ### Response: good bad"
    ]
    return train_tokenizer(texts, 400, 128)


def write_encoder(folder: Path) -> Path:
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertForSequenceClassification(config).base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_decoder(folder: Path, kind: str = "crnet") -> Path:
    """A tiny CR-Net, or a Llama."""
    tokenizer = tiny_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = (
        LlamaForCausalLM(LlamaConfig(**shape)) if kind == "llama" else CRNetForCausalLM(CRNetConfig(**shape, rank=8))
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_content(root: Path, model: Path, data: Path, *, method: str = "lor2c", task: str | None = "sst2", **other):
    """The mapping of a tiny recipe; keyword arguments override its training section."""
    return {
        "name": "tiny",
        "model": str(model),
        "data": {"task": task, "data": str(data), "max_length": 48, "cache_dir": str(root / "cache")},
        "adapter": {"method": method, "r": 4},
        "training": {
            "num_train_epochs": 4,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "logging_steps": 2,
            "seed": 3,
            "use_cpu": True,
            "disable_tqdm": True,
            **other,
        },
    }


def tiny_recipe(*args, **kwargs):
    return build_finetune_recipe(tiny_content(*args, **kwargs))
