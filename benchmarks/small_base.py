"""Small Llamas to adapt, pre-trained here: what the studies of LoR2C on deep and on causal models start from."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPE = "crnet_5m_text"


@dataclass(frozen=True)
class Base:
    """A dense Llama and how long it reads. Rates: those that `crosslayer compare` found for dense models this small."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocabulary: int
    block_size: int
    steps: int
    bf16: bool
    batch_size: int = 8
    embedding_rate: float = 0.032
    rate: float = 4e-4

    def recipe(self, texts: str, cache: Path) -> Any:
        """Its pre-training on a file of texts (or another source), for `crosslayer pretrain`."""
        from crosslayer.train import build_recipe, load_recipe

        content = load_recipe(RECIPE).to_dict()
        content["name"] = f"llama_{self.num_hidden_layers}_blocks"
        content["model"] = {
            "factorization": "dense",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
        }
        content["data"] |= {
            "data": texts,
            "cache_dir": str(cache),
            "tokenizer_vocab_size": self.vocabulary,
            "block_size": self.block_size,
        }
        content["parameter_groups"] |= {
            "embedding_lr_factor": self.embedding_rate / self.rate,
            "full_rank_lr_factor": 1.0,
        }
        content["training"] |= {
            "max_steps": self.steps,
            "warmup_steps": self.steps // 10,
            "learning_rate": self.rate,
            "per_device_train_batch_size": self.batch_size,
            "bf16": self.bf16,
            "use_cpu": True,
            "eval_strategy": "no",
            "save_steps": max(1, self.steps // 10),
            "logging_steps": max(1, self.steps // 50),
            "disable_tqdm": True,
        }
        return build_recipe(content)


def pretrained(base: Base, texts: str, work: Path) -> Path:
    """The folder of the trained model as transformers' Llama, with its tokenizer. Goes on where it stopped."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from crosslayer.train.run import pretrain

    folder, run = work / "llama", work / "pretraining"
    if folder.is_dir():
        return folder
    pretrain(base.recipe(texts, work / "cache"), run, resume=(run / "recipe.yaml").is_file())
    trained, tokenizer = (kind.from_pretrained(run / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    names = LlamaConfig().to_dict().keys() - {"architectures", "model_type", "transformers_version"}
    fields = {name: value for name, value in trained.config.to_dict().items() if name in names}
    llama = LlamaForCausalLM(LlamaConfig(**fields))
    llama.load_state_dict(trained.state_dict())  # the dense factorization is Llama, with its names
    unfinished = work / "llama.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    llama.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def describe(base: Base, folder: Path) -> dict[str, Any]:
    """What a result says of its base: shape, tokens read and the loss at the end."""
    import json

    import transformers

    report = json.loads((folder.parent / "pretraining" / "report.json").read_text())
    parameters = transformers.AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    return {
        **vars(base),
        "parameters": parameters,
        "tokens": base.steps * base.batch_size * base.block_size,
        "loss": report["after"]["eval_loss"],
    }
