"""What every family is used for: generation, padding, packing, checkpoints, heads, adapters."""

import peft
import pytest
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from crosslayer import LoR2CConfig
from family_cases import FAMILY_CASES, tokens
from family_checks import (
    check_adapter,
    check_caches,
    check_classifier,
    check_left_padding,
    check_packing,
    check_save_and_load,
)
from tolerances import assert_close

every_family = pytest.mark.parametrize("case", FAMILY_CASES.values(), ids=FAMILY_CASES)


@every_family
def test_caches(case):
    check_caches(case)


@every_family
def test_left_padding(case):
    check_left_padding(case)


@every_family
def test_packing(case):
    check_packing(case)


@every_family
def test_save_and_load(case, tmp_path):
    model = check_save_and_load(case, tmp_path, AutoModelForCausalLM)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is case.cls("Model")
    assert_close(model.lm_head(base(tokens()).last_hidden_state), model.lm_head(model.base_model(tokens())[0]))
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier) is case.cls("ForSequenceClassification")


@every_family
def test_classifier(case):
    check_classifier(case)


ADAPTERS = {
    "lora_all_linear": lambda: peft.LoraConfig(r=2, target_modules="all-linear"),
    "lora_on_factors": lambda: peft.LoraConfig(r=2, target_modules=r".*\.(A|B)"),
    "lor2c": lambda: LoR2CConfig(r=2, lor2c_alpha=4),
}


@every_family
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_adapter(case, adapter):
    check_adapter(case, adapter())


@pytest.mark.parametrize("name", [name for name in FAMILY_CASES if name.startswith("deepseek")])
def test_a_router_s_buffers_are_initialised_where_they_are_missing(name, tmp_path):
    """They are made without a value when a model is loaded; what balances DeepSeek's experts starts at 0."""
    model = FAMILY_CASES[name].model()
    buffers = {name for name, _ in model.named_buffers() if "gate" in name}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in buffers}
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=state)
    found = dict(loaded.named_buffers())
    assert all((found[name] == 0).all() for name in buffers)


def test_cohere_s_epsilon_goes_by_both_names():
    config = FAMILY_CASES["cohere"].config(rms_norm_eps=0.25)
    assert config.layer_norm_eps == config.rms_norm_eps == 0.25
    config.rms_norm_eps = 0.5
    assert type(config).from_dict(config.to_dict()).layer_norm_eps == 0.5
