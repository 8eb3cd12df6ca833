"""Instruction tuning through TRL's SFTTrainer (extra `sft`)."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..errors import ConfigError, DataError
from .trainer import SafeTrainer, training_arguments

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as _error:
    raise ConfigError(f"instruction tuning needs {_error.name}: pip install 'crosslayer[sft]'") from None

# The headings that single instructions get (data/tasks.py), for tokenizers without a chat template of their own.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}### Response:\n{{ message['content'] }}{{ eos_token }}\n"
    "{% elif message['role'] == 'system' %}### System:\n{{ message['content'] }}\n\n"
    "{% else %}### Instruction:\n{{ message['content'] }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)


class InstructionTrainer(SafeTrainer, SFTTrainer):
    """SFTTrainer, with SafeTrainer's care for broken runs. The loss is over the answers alone."""


def instruction_arguments(settings: dict[str, Any], max_length: int, output_dir: Path) -> TrainingArguments:
    """SFTConfig with the defaults of transformers where TRL has others (bf16, gradient checkpointing)."""
    settings = dict(settings)
    settings.setdefault("bf16", False)
    settings.setdefault("activation_checkpointing", False)
    return training_arguments(SFTConfig, {**settings, "max_length": max_length}, output_dir)


def check_answers_fit(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Raises DataError when no prompt leaves room for an answer: SFTTrainer would drop every row."""
    prompts = (_as_text(row["prompt"], with_chat_template(tokenizer, rows)) for row in rows)
    shortest = min(len(tokenizer(prompt).input_ids) for prompt in prompts)
    if shortest >= max_length:
        raise DataError(
            f"the shortest prompt has {shortest} tokens and max_length={max_length} cuts every answer away; raise "
            "max_length"
        )


def _as_text(prompt: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))


def with_chat_template(tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> PreTrainedTokenizerBase:
    """The tokenizer, with a plain template when the rows are conversations and it has none."""
    if tokenizer.chat_template is None and not isinstance(rows[0]["prompt"], str):
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return tokenizer


def sample_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Dataset, count: int = 3, max_new_tokens: int = 64
) -> list[dict[str, str]]:
    """Greedy answers to the first prompts of `rows`: [{"prompt", "answer", "expected"}]."""
    import torch

    model.eval()
    samples = []
    for row in rows.select(range(min(count, len(rows)))):
        prompt, expected = _as_text(row["prompt"], tokenizer), row["completion"]
        if not isinstance(expected, str):
            expected = expected[-1]["content"]
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(next(model.parameters()).device)
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        samples.append({"prompt": prompt, "answer": answer, "expected": expected})
    return samples
