"""What the scripts about long runs train: a small CR-Net on made-up texts, by the command line."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import yaml

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards mix strange potions in old iron pots"
WORDS = TEXT.split()
COMMAND = [sys.executable, "-m", "crosslayer", "pretrain"]


def write_texts(path: Path, documents: int) -> Path:
    """JSON lines of short texts, all different, the same every time."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for index in range(documents):
            text = f"Story {index}. {' '.join(rng.choices(WORDS, k=rng.randint(60, 120)))}."
            file.write(json.dumps({"text": text}) + "\n")
    return path


def write_recipe(folder: Path, documents: int, model: dict[str, Any], data: dict[str, Any], **training: Any) -> Path:
    """recipe.yaml and its texts in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = write_texts(folder / "texts.jsonl", documents)
    content = {
        "name": folder.name,
        "model": {"num_attention_heads": 2, **model},
        "data": {"data": str(texts), "tokenizer_vocab_size": 300, "cache_dir": str(folder / "cache"), **data},
        "training": {"learning_rate": 3e-3, "use_cpu": True, "disable_tqdm": True, **training},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path
