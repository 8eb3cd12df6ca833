"""pytest plugin: PEFT's own test-suite, from its source distribution, run on LoR2C instead of PEFT's methods.

The suite's tests are parametrised over module-level lists of (model, configuration). Before collection those lists get
LoR2C's configurations and tiny models built here from configurations, so that nothing is fetched from a hub. Every
test that is not about LoR2C is deselected. `make test-peft` runs it.
"""

import importlib.machinery
import os
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import crosslayer
from crosslayer.lor2c import LoR2CConfig

MODELS = Path(os.environ["PEFT_SUITE_MODELS"])

COMMON = {"vocab_size": 1100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {**COMMON, **TOKENS, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
GPT = {"vocab_size": 1100, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, **TOKENS}
BERT = {**COMMON, "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0}

DECODERS = {
    "LlamaForCausalLM": ("LlamaConfig", LLAMA),
    "Qwen2ForCausalLM": ("Qwen2Config", LLAMA),
    "OPTForCausalLM": ("OPTConfig", {**COMMON, **TOKENS, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "GPT2LMHeadModel": ("GPT2Config", GPT),
    "GPTJForCausalLM": ("GPTJConfig", {**GPT, "rotary_dim": 4}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**LLAMA, "head_dim": 8}),
}
ENCODERS = {
    "BertModel": ("BertConfig", BERT),
    "RobertaModel": ("RobertaConfig", BERT),
    "DebertaV2Model": ("DebertaV2Config", BERT),
}
CLASSIFIERS = {
    "BertForSequenceClassification": ("BertConfig", BERT),
    "RobertaForSequenceClassification": ("RobertaConfig", BERT),
    "LlamaForSequenceClassification": ("LlamaConfig", LLAMA),
}


class Block(nn.Module):
    """x + W2 relu(W1 x)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 20)
        self.down = nn.Linear(20, 10)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class ResidualMLP(nn.Module):
    """The suite's MLP with blocks that a residual can go around."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.lin1 = nn.Linear(10, 2)
        self.sm = nn.LogSoftmax(dim=-1)
        self.dtype = torch.float

    def forward(self, X):
        X = X.to(self.dtype) / 90  # the suite feeds 0 to 89, which only an MLP without residuals survives
        for layer in self.layers:
            X = layer(X)
        return self.sm(self.lin1(X))


CUSTOM = {  # not "injectable": the suite wants every weight to move, and pairs rest until they are switched on
    "all blocks": {"target_modules": None},
    "one block": {"target_modules": ["layers.1"]},
    "two blocks": {"target_modules": ["layers.0", "layers.2"]},
    "regular expression": {"target_modules": r"layers\.[01]"},
    "layers_to_transform": {
        "target_modules": ["0", "1", "2"],
        "layers_to_transform": [1],
        "layers_pattern": ["layers"],
    },
    "patterns": {"target_modules": None, "rank_pattern": {"layers.1": 3}, "alpha_pattern": {"layers.2": 5}},
    "shared A": {"target_modules": None, "share_A": True},
    "rsLoRA": {"target_modules": None, "use_rslora": True},
    "with head": {"target_modules": None, "modules_to_save": ["lin1"]},
    "one block with head": {"target_modules": ["layers.0"], "modules_to_save": ["lin1"]},
}


def build(models: dict) -> list[str]:
    """Folders of tiny models, made once."""
    folders = []
    for name, (config_name, arguments) in models.items():
        folder = MODELS / f"tiny-random-{name}"
        if not (folder / "config.json").exists():
            torch.manual_seed(0)
            getattr(transformers, name)(getattr(transformers, config_name)(**arguments)).save_pretrained(folder)
        folders.append(str(folder))
    return folders


def pytest_configure(config):
    if importlib.util.find_spec("diffusers") is None:  # imported for one test of image models
        stub = types.ModuleType("diffusers")
        stub.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = stub

    from tests import (
        test_custom_models,
        test_decoder_models,
        test_feature_extraction_models,
        test_seq_classifier,
        testing_common,
    )

    for module, names, models, task_type in (
        (test_decoder_models, "PEFT_DECODER_MODELS_TO_TEST", DECODERS, "CAUSAL_LM"),
        (test_feature_extraction_models, "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST", ENCODERS, "FEATURE_EXTRACTION"),
        (test_seq_classifier, "PEFT_SEQ_CLS_MODELS_TO_TEST", CLASSIFIERS, "SEQ_CLS"),
    ):
        getattr(module, names)[:] = build(models)
        module.ALL_CONFIGS[:] = [(LoR2CConfig, {"task_type": task_type, "target_modules": None})]

    test_custom_models.TEST_CASES[:] = [
        (f"LoR2C {name}", "ResidualMLP", LoR2CConfig, options) for name, options in CUSTOM.items()
    ]

    def from_pretrained(cls, model_id, dtype=None):
        torch.manual_seed(0)
        return ResidualMLP().to(dtype or torch.float32)

    test_custom_models.MockTransformerWrapper.from_pretrained = classmethod(from_pretrained)

    def no_merging(model_id, config_cls, config_kwargs):
        pytest.skip("LoR2C cannot be merged")

    for module in (testing_common, test_custom_models):
        module._skip_if_merging_not_supported = no_merging


def pytest_collection_modifyitems(config, items):
    ours = [
        item for item in items if hasattr(item, "callspec") and item.callspec.params.get("config_cls") is LoR2CConfig
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours


def pytest_report_header(config):
    return f"PEFT's own suite on LoR2C of {Path(crosslayer.__file__).parent}"
