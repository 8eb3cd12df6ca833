"""Recipes of the families: each builds and has its size, published shapes the published number of parameters."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from crosslayer import crnet_config
from crosslayer.accounting import Shape, count_parameters
from crosslayer.crnet.families import FAMILIES, model_classes
from crosslayer.recipes import FOLDER
from crosslayer.train import build_recipe, load_recipe
from crosslayer.train.parameter_groups import group_names
from crosslayer.train.recipe import read_recipe
from crosslayer.train.run import pretrain
from family_cases import FAMILY_CASES
from long_cases import mostly_long
from tiny_run import tiny_content

SHIPPED = FOLDER / "families"
SMALL = sorted(SHIPPED.glob("*_1m_text.yaml"))

# (dense parameters, with the base's own; CR-Net's, at the recipe's ranks)
PUBLISHED = {
    "crnet_gpt2_124m_c4": (124_439_808, 75_779_394),
    "crnet_qwen3_0.6b_c4": (596_049_920, 327_090_365),
    "crnet_qwen3_30b_a3b_c4": (30_532_122_624, 15_426_668_779),
}


def parts_of(path, **fields):
    """(configuration, model on the meta device)."""
    model = {"vocab_size": 2048, **load_recipe(path).model, **fields}  # small recipes take their tokenizer's
    base = model.pop("base")
    config = crnet_config(base, **model)
    with torch.device("meta"):
        return config, model_classes(base["model_type"])["AutoModelForCausalLM"](config)


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_small_recipes(path):
    assert load_recipe(path).name == path.stem
    config, model = parts_of(path)
    assert 0.7e6 < model.num_parameters() < 1.8e6
    assert model.num_parameters() == sum(count_parameters(Shape.of(config)).values())


def test_every_family_has_one():
    types = {load_recipe(path).model["base"]["model_type"] for path in SMALL}
    assert types == set(FAMILIES)
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == {path.stem for path in SMALL} | PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    dense, crnet = PUBLISHED[name]
    for factorization, expected in (("dense", dense), ("cross_layer", crnet)):
        config, model = parts_of(SHIPPED / f"{name}.yaml", factorization=factorization)
        assert model.num_parameters() == expected
        assert sum(count_parameters(Shape.of(config)).values()) == expected
        counted = sum(_parameters_of(config, index) for index in range(config.num_hidden_layers))
        layers = sum(p.numel() for name, p in model.base_model.blocks.named_parameters())
        assert counted == layers


def _parameters_of(config, index):
    """Of a block, from the table of positions alone: matrices or factors, biases, betas, routers and norms."""
    found = config.norm_parameters(index)
    below = {name for lower in range(index) for name in config.positions(lower)}
    for name, place in config.places(index).items():
        rank = config.linear_rank(index, name)
        found += sum(n * (i * o if rank is None else rank * (i + o)) for i, o, n in place.matrices)
        found += place.out_features * place.bias
        found += place.mixture.router if place.mixture is not None else 0
        found += place.carries and name in below
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", mostly_long(SMALL, *SMALL[::3]), ids=lambda path: path.stem)
def test_small_recipes_train(path, tmp_path):
    """Two steps on a few texts, through checkpoint, card, sample and loading again."""
    content = tiny_content(tmp_path, max_steps=2, save_steps=2, eval_steps=2, logging_steps=1, warmup_steps=1)
    content["model"] = read_recipe(path)["model"]
    report = pretrain(build_recipe(content), tmp_path / "run")
    assert report.after["perplexity"] > 1
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"family `{content['model']['base']['model_type']}`" in card
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert again.config.linear_rank(1, "o") == report.model.config.linear_rank(1, "o")


def test_the_norms_of_cohere_take_no_decay():
    """Theirs over the heads are matrices."""
    model = FAMILY_CASES["cohere_qk_norm"].model()
    groups = group_names(model)
    assert model.model.layers[0].self_attn.q_norm.weight.dim() == 2
    assert {group for name, group in groups.items() if "norm" in name} == {"other"}


def test_groups_of_a_mixture():
    groups = group_names(FAMILY_CASES["qwen3_moe_dense_first"].model())
    layer = {name.partition("layers.2.")[2]: group for name, group in groups.items() if "layers.2." in name}
    assert layer["mlp.experts.gate_up_A"] == layer["mlp.experts.down_B"] == "low_rank"
    assert layer["mlp.gate.weight"] == "full_rank"
    assert layer["mlp.beta"] == "beta"
    assert layer["self_attn.q_norm.weight"] == "other"
