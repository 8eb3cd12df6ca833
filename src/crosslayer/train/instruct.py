"""Instruction tuning through TRL's SFTTrainer (extra `sft`)."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from ..errors import ConfigError, DataError
from ..private import metrics_of_sft
from .arguments import training_arguments
from .losses import IGNORE_INDEX
from .trainer import SafeTrainer

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
    """SFTTrainer, with SafeTrainer's care for broken runs. The loss is over the answers alone.

    `eval_loss` is the mean over the predicted tokens of the validation rows, without label smoothing, whatever the
    batches and processes (SFTTrainer's is a mean of batch means).
    """

    model_accepts_loss_kwargs: bool

    def __init__(self, *args, **kwargs) -> None:
        # TRL asks who wants label smoothing to bring a smoother; the Trainer's own does.
        arguments = kwargs["args"]
        smoothing, arguments.label_smoothing_factor = arguments.label_smoothing_factor, 0.0
        super().__init__(*args, **kwargs)
        arguments.label_smoothing_factor = smoothing
        self.label_smoother = LabelSmoother(epsilon=smoothing) if smoothing else None
        # TRL's loss is divided by `num_items_in_batch` whatever the model's own does with it.
        self.model_accepts_loss_kwargs = True
        self._batches: list[tuple[float, int]] = []  # of the evaluation under way: loss, predicted tokens

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> Any:
        """SFTTrainer's, without label smoothing; the loss becomes a mean over the predicted tokens.

        So do the metrics of TRL that have one value for each batch.
        """
        self._batches = []
        smoother, self.label_smoother = self.label_smoother, None
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self.label_smoother = smoother
        tokens = sum(count for _, count in self._batches)
        if tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = sum(loss * count for loss, count in self._batches) / tokens
            metrics = metrics_of_sft(self)["eval"]
            for name, values in metrics.items():
                if len(values) == len(self._batches):
                    pairs = zip(values, self._batches, strict=True)
                    metrics[name] = [sum(value * count for value, (_, count) in pairs) / tokens]
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """SFTTrainer's; notes the loss and the predicted tokens of the batch, over all processes."""
        inputs = self.without_repeats(inputs)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        count = (inputs["labels"][..., 1:] != IGNORE_INDEX).sum().to(loss.device)
        of_all = self.accelerator.gather(torch.stack([loss.double() * count, count.double()])[None])
        total, tokens = of_all.sum(0).tolist()
        self._batches.append((total / max(tokens, 1), int(tokens)))
        return loss, logits, labels


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
