"""A pre-training run small enough for a unit test: deterministic text, a two-layer model, a dozen steps."""

import os
import random
from pathlib import Path

from crosslayer.train import build_recipe

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards mix strange potions in old iron pots"
WORDS = TEXT.split()


def write_texts(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """A folder of short text files, all different. Processes that make the same folder never see half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for index in range(documents):
        words = rng.choices(WORDS, k=rng.randint(60, 120))
        path, text = folder / f"{index:03d}.txt", f"Story {index}. " + " ".join(words) + ".\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            beside = folder.with_name(f"{folder.name}-{os.getpid()}-{index}")
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)
    return folder


def tiny_content(root: Path, **training) -> dict:
    """The mapping of a tiny recipe on texts under `root`; keyword arguments override its training section."""
    return {
        "name": "tiny",
        "model": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "rank": 8,
        },
        "data": {
            "data": str(write_texts(root / "texts")),
            "tokenizer_vocab_size": 300,
            "block_size": 32,
            "validation_fraction": 0.2,
            "cache_dir": str(root / "cache"),
        },
        "parameter_groups": {"embedding_lr_factor": 1.0},
        "training": {
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "warmup_steps": 2,
            "logging_steps": 2,
            "save_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 6,
            "seed": 3,
            "use_cpu": True,
            "disable_tqdm": True,
            **training,
        },
    }


def tiny_recipe(root: Path, **training):
    return build_recipe(tiny_content(root, **training))
