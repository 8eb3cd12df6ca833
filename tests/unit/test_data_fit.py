"""What does not fit together is said in one line before anything is written, or works."""

from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

from crosslayer import CRNetConfig, CRNetForCausalLM
from crosslayer.data import load_task
from crosslayer.data.fit import block_length, check_ids, first_id, ids_needed, input_length, position_limit, room_for
from crosslayer.errors import CheckpointError, ConfigError
from crosslayer.evaluate.sample import sample
from crosslayer.loading import load_checkpoint
from crosslayer.train import build_finetune_recipe, build_recipe, finetune
from crosslayer.train.run import build_model_config
from tiny_finetune import (
    tiny_content,
    tiny_recipe,
    tiny_tokenizer,
    write_decoder,
    write_encoder,
    write_instructions,
    write_task,
)

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 50}


@pytest.fixture
def encoder(tmp_path):
    return write_encoder(tmp_path / "encoder")


@pytest.fixture
def decoder(tmp_path):
    return write_decoder(tmp_path / "decoder")


def edit_tokenizer(folder, **tokens):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return tokenizer


def refused(tmp_path, model, task="sst2", data=None, **settings):
    """The one line with which a run is refused, before it has written anything."""
    data = data or write_task(tmp_path / "sst2")
    content = tiny_content(tmp_path, model, data, task=task)
    content["data"].update(settings)
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        finetune.finetune(build_finetune_recipe(content), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    return str(caught.value)


def test_a_tokenizer_with_more_entries_than_the_embedding(tmp_path, encoder, decoder):
    size = len(AutoTokenizer.from_pretrained(encoder))
    edit_tokenizer(encoder, pad_token="[PAD]")
    message = f"the tokenizer yields ids up to {size}, the embedding has {size} rows"
    assert message in refused(tmp_path, encoder)
    edit_tokenizer(decoder, pad_token="[PAD]")
    with pytest.raises(CheckpointError, match="the tokenizer yields ids up to"):
        load_checkpoint(str(decoder))


def test_a_tokenizer_with_other_special_tokens_than_the_model(tmp_path):
    tokenizer = tiny_tokenizer()
    CRNetForCausalLM(CRNetConfig(**SMALL | {"vocab_size": 400}, pad_token_id=7)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"pad_token_id is 7, the tokenizer's {tokenizer.pad_token_id}"):
        load_checkpoint(str(tmp_path))
    with pytest.raises(ConfigError, match="eos_token_id is 9, the tokenizer's 2"):
        build_model_config(build_recipe({"model": SMALL | {"vocab_size": 400, "eos_token_id": 9}}), tokenizer)


def test_sentinels_beyond_the_embedding_are_no_obstacle():
    """T5's tokenizer has 100 entries more than the models of the field, which no text yields."""
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x0>", "<x1>"]})
    assert (len(tokenizer), ids_needed(tokenizer)) == (size + 2, size)
    model = BertModel(BertConfig(**SMALL | {"vocab_size": size}))
    check_ids(tokenizer, model, "model")
    assert max(tokenizer("a text that spells <x1>")["input_ids"]) < size


def test_ids_with_gaps_count_by_the_largest():
    tokenizer = SimpleNamespace(
        all_special_ids=[0], get_vocab=lambda: {"<s>": 0, "a": 9}, **{f"{n}_token_id": None for n in FRAME}
    )
    assert ids_needed(tokenizer) == 10


FRAME = ("bos", "eos", "pad", "cls", "sep", "mask", "unk")


def test_a_tokenizer_without_end_or_padding(tmp_path, encoder, decoder):
    edit_tokenizer(encoder, pad_token=None, eos_token=None)
    assert "its tokenizer has no pad_token; set one" in refused(tmp_path, encoder)
    edit_tokenizer(decoder, eos_token=None)
    instructions = write_instructions(tmp_path / "rows.jsonl")
    assert "its tokenizer has no eos_token; set one" in refused(tmp_path, decoder, None, instructions)


def test_positions_of_families():
    assert position_limit(BertModel(BertConfig(**SMALL, max_position_embeddings=64))) == 64
    assert position_limit(RobertaModel(RobertaConfig(**SMALL, max_position_embeddings=66, pad_token_id=1))) == 64
    assert (
        position_limit(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=32, vocab_size=50))) == 32
    )
    assert position_limit(SimpleNamespace(config=SimpleNamespace())) is None


def test_the_default_length_gives_way_to_positions_and_a_chosen_one_is_refused(tmp_path, encoder):
    model = BertModel(BertConfig(**SMALL, max_position_embeddings=64))
    assert (input_length(128, model), input_length(64, model), input_length(8, model)) == (64, 64, 8)
    assert "max_length=65 is longer than the model's 64 positions; give at most 64" in refused(
        tmp_path, encoder, max_length=65
    )


def test_inputs_longer_than_the_positions_are_cut(tmp_path, encoder):
    data = write_task(tmp_path / "sst2")
    text = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(text.replace('"sentence": "', '"sentence": "' + "film " * 200))
    content = tiny_content(tmp_path, encoder, data, max_steps=1, eval_strategy="no")
    content["data"]["max_length"] = 128
    assert finetune.train_once(build_finetune_recipe(content)).steps == 1


def test_a_model_has_the_positions_that_it_is_trained_on():
    for positions, expected in ((32, 64), (96, 96)):
        recipe = build_recipe({"model": SMALL | {"max_position_embeddings": positions}, "data": {"block_size": 64}})
        assert build_model_config(recipe).max_position_embeddings == expected


def test_blocks_of_an_evaluation_stay_within_the_positions():
    tokenizer, model = tiny_tokenizer(), BertModel(BertConfig(**SMALL, max_position_embeddings=64))
    assert block_length(None, tokenizer, model) == block_length(64, tokenizer, model) == 64
    with pytest.raises(ConfigError, match="block_size=65 is longer than the model's 64 positions"):
        block_length(65, tokenizer, model)


def test_a_sample_stays_within_the_positions_and_takes_a_list_of_ends():
    tokenizer = tiny_tokenizer()
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=len(tokenizer), eos_token_id=[2, 5])
    model = GPT2LMHeadModel(config)
    assert isinstance(sample(model, tokenizer, "fine", max_new_tokens=None, seed=0), str)
    with pytest.raises(
        ConfigError, match=r"max_new_tokens=16 after a prompt of 2 tokens .* 16 positions; give at most 14"
    ):
        sample(model, tokenizer, "fine", max_new_tokens=16)
    with pytest.raises(ConfigError, match="the model 16 positions; shorten the prompt"):
        sample(model, tokenizer, "xyz" * 30, max_new_tokens=1)
    assert room_for(3, None, SimpleNamespace(config=SimpleNamespace())) == 200
    assert (first_id([2, 5]), first_id([]), first_id(None), first_id(3)) == (2, None, None, 3)


def test_the_padding_of_the_tokenizer_is_the_model_s(tmp_path, decoder):
    """A head on a decoder reads the last token before the padding: two padding ids would read it elsewhere."""
    tokenizer = edit_tokenizer(decoder, pad_token="<|endoftext|>")
    recipe = tiny_recipe(tmp_path, decoder, write_task(tmp_path / "sst2"))
    model, found = finetune.load_base(str(decoder), load_task(recipe.data), recipe.adapter)
    assert model.config.pad_token_id == found.pad_token_id == tokenizer.eos_token_id
