"""Which tokens of a conversation train: every answer with its end token, and nothing that was said to the model."""

import pytest

from crosslayer.data import TaskConfig, load_task
from crosslayer.train.finetune import build_arguments, load_base, make_trainer
from crosslayer.train.instruct import PLAIN_CHAT_TEMPLATE
from crosslayer.train.methods import attach
from tiny_finetune import tiny_recipe, write_decoder, write_rows

TURNS = [("system", "very dull"), ("user", "the film"), ("assistant", "good"), ("user", "a song"), ("assistant", "bad")]
MARKED = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def trained_texts(root, template=None):
    """[(what is read, what is predicted)] of every row that `finetune` makes of the conversation."""
    rows = [{"messages": [{"role": role, "content": content} for role, content in TURNS]}]
    data = write_rows(root / "chat.jsonl", rows)
    recipe = tiny_recipe(root, write_decoder(root / "decoder"), data, task=None, eval_strategy="no", save_strategy="no")
    recipe.data = TaskConfig(data=str(data), validation_data=str(data), max_length=128, cache_dir=str(root / "cache"))
    task = load_task(recipe.data)
    model, tokenizer = load_base(recipe.model, task, recipe.adapter)
    tokenizer.chat_template = template
    attached = attach(model, recipe.adapter, task.kind)
    trainer = make_trainer(recipe, task, attached, tokenizer, build_arguments(recipe, task, root / "run"))
    batch = trainer.data_collator(list(trainer.train_dataset))
    found = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        assert (labels[labels != -100] == ids[labels != -100]).all()
        found.append((tokenizer.decode(ids[mask.bool()]), tokenizer.decode(labels[labels != -100])))
    return found, tokenizer.eos_token


@pytest.mark.parametrize("template", [None, PLAIN_CHAT_TEMPLATE])
def test_labels_of_a_conversation(tmp_path, template):
    found, end = trained_texts(tmp_path, template)
    first = "### System:\nvery dull\n\n### Instruction:\nthe film\n\n### Response:\n"
    second = f"{first}good{end}\n### Instruction:\na song\n\n### Response:\n"
    assert found == [(f"{first}good{end}\n", f"good{end}\n"), (f"{second}bad{end}\n", f"bad{end}\n")]


def test_labels_under_a_template_of_the_tokenizer(tmp_path):
    found, end = trained_texts(tmp_path, MARKED)
    first = "<system>very dull<user>the film<assistant>"
    assert found == [
        (f"{first}good{end}", f"good{end}"),
        (f"{first}good{end}<user>a song<assistant>bad{end}", f"bad{end}"),
    ]
