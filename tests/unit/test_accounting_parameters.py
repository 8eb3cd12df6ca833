"""Parameters by arithmetic against real modules; shapes by name, from configurations and from mappings."""

import json
import subprocess
import sys

import peft
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from crosslayer.accounting import (
    SIZES,
    Adapter,
    Shape,
    count_adapter_parameters,
    count_parameters,
    dense_counterpart,
    find_device,
    named_shape,
    peak_flops,
)
from crosslayer.crnet import POSITIONS, CRNetConfig, CRNetForCausalLM
from crosslayer.errors import ConfigError
from crosslayer.recipes import FOLDER
from model_cases import CASES, config_of

WIDE = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": 5, "rank": 16}

# Millions of parameters: dense, CoLA at its own rank, CR-Net at rank h / 4, CR-Net without its factors.
TABLE = {
    "llama_60m": (58.07, 42.77, 128, 44.68, 35.94),
    "llama_130m": (134.11, 94.00, 256, 87.07, 56.25),
    "llama_350m": (367.97, 185.22, 256, 192.84, 78.19),
    "llama_1b": (1339.08, 609.31, 512, 639.72, 181.50),
    "llama_7b": (6738.42, 2820.94, 1024, 2943.36, 464.79),
    "llama_13b": (13015.86, 5335.05, 1280, 5527.07, 645.29),
}


def millions(shape):
    return round(sum(count_parameters(shape).values()) / 1e6, 2)


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class(config).num_parameters()


def fields_of(shape, **more):
    """LlamaConfig's names for what a shape holds."""
    attention = shape.layers[0].attention
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.layers[0].mlp_width,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.key_value_heads,
        **more,
    }


@pytest.mark.parametrize("name", CASES)
def test_parameters_equal_the_module(name):
    config = config_of(name)
    assert sum(count_parameters(config).values()) == CRNetForCausalLM(config).num_parameters()


@pytest.mark.parametrize("size", TABLE)
def test_table_of_sizes(size):
    dense, cola, cola_rank, crnet, base = TABLE[size]
    shape = named_shape(size, "cross_layer")
    assert millions(named_shape(size)) == dense
    assert millions(named_shape(size, "cola", cola_rank)) == cola
    assert millions(shape) == crnet
    counts = count_parameters(shape)
    assert round((sum(counts.values()) - counts["low_rank"] - counts["beta"]) / 1e6, 2) == base


@pytest.mark.parametrize("size", ["llama_60m", "llama_130m", "llama_350m", "llama_1b", "llama_7b", "llama_13b"])
@pytest.mark.parametrize("factorization", ["dense", "cross_layer", "cola"])
def test_every_size_equals_its_module(size, factorization):
    shape = named_shape(size, factorization)
    config = CRNetConfig(**fields_of(shape, factorization=factorization))
    assert sum(count_parameters(shape).values()) == on_meta(CRNetForCausalLM, config)


@pytest.mark.slow
def test_seventy_billion_equals_its_module():
    shape = named_shape("llama_70b")
    assert sum(count_parameters(shape).values()) == on_meta(LlamaForCausalLM, LlamaConfig(**fields_of(shape)))
    assert millions(shape) == 68976.65  # LLaMA 2's 70B
    crnet = named_shape("llama_70b", "cross_layer")
    assert sum(count_parameters(crnet).values()) == on_meta(CRNetForCausalLM, CRNetConfig(**fields_of(crnet)))


def test_recipes_have_the_sizes_of_the_table():
    found = set()
    for path in sorted(FOLDER.glob("*_c4.yaml")):
        size = "llama_" + path.stem.split("_")[1]
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        hidden, mlp, heads, _, layers = SIZES[size]
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
        assert [model[name] for name in names] == [hidden, mlp, heads, layers, 32000], path.name
        assert millions(Shape.of(model)) == round(sum(count_parameters(CRNetConfig(**model)).values()) / 1e6, 2)
        found.add(size)
    assert found == set(TABLE)


def test_groups_of_a_cross_layer_model():
    counts = count_parameters(config_of("cross_layer", **WIDE))
    layers, hidden, mlp, rank = 5, 64, 176, 16
    assert counts["low_rank"] == (layers - 1) * (11 * hidden * rank + 3 * mlp * rank)
    assert counts["full_rank"] == 4 * hidden**2 + 3 * hidden * mlp
    assert counts["beta"] == 7 * (layers - 1)
    assert counts["norms"] == (2 * layers + 1) * hidden
    assert sum(count_parameters(dense_counterpart(config_of("cross_layer", **WIDE))).values()) > sum(counts.values())


# Counted from the published configurations, ranks 128, 256, 256, 512, 1024, density 0.03 (7B: 0.05).
@pytest.mark.parametrize(
    ("size", "rank", "density", "expected"),
    [("60m", 128, 0.03, 43.5), ("130m", 256, 0.03, 96.5), ("350m", 256, 0.03, 194.3), ("1b", 512, 0.03, 645.5)],
)
def test_sltrain(size, rank, density, expected):
    assert millions(named_shape(f"llama_{size}", "sltrain", rank, density)) == pytest.approx(expected, abs=0.06)
    assert millions(named_shape("llama_7b", "sltrain", 1024, 0.05)) == pytest.approx(3140, abs=6)


def test_lora_equals_peft():
    config = LlamaConfig(**fields_of(Shape.of(config_of("gqa", **{**WIDE, "num_key_value_heads": 2}))))
    for positions in (("q", "v"), POSITIONS):
        lora = peft.LoraConfig(r=6, target_modules=[f"{p}_proj" for p in positions])
        trained, _ = peft.get_peft_model(LlamaForCausalLM(config), lora).get_nb_trainable_parameters()
        assert count_adapter_parameters(config, Adapter(rank=6, positions=positions)) == trained


def test_lor2c_and_its_variants():
    shape = named_shape("llama_7b")
    layers, width = 32, 4096

    def count(**fields):
        return count_adapter_parameters(shape, Adapter(kind="lor2c", rank=8, **fields))

    assert count() == layers * 2 * width * 8
    assert 2 * count() == count_adapter_parameters(shape, Adapter(rank=8))  # half of LoRA on q and v
    assert count(shared=True) == (layers + 1) * width * 8
    assert count(fused=1) == count() - 2 * width * 8
    assert count(injected=3) == count()  # LoRA of half the rank on two square matrices


def test_a_shape_has_no_opinion_on_where_it_comes_from():
    config = config_of("rank_pattern")
    shape = Shape.of(config)
    assert Shape.of(shape) is shape
    assert count_parameters(shape) == count_parameters(config)
    assert Shape.of({"hidden_size": 64, "num_attention_heads": 4, "rank": 8}) == Shape.of(
        CRNetConfig(hidden_size=64, num_attention_heads=4, rank=8)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: named_shape("llama_8b"), "model='llama_8b' is unknown; the nearest is llama_"),
        (
            lambda: named_shape("llama_7b", "cross_layer", 5000),
            "rank=5000 is outside 1..2047, .* of q, 4096 x 4096",
        ),
        (lambda: named_shape("llama_7b", "spare"), "factorization='spare' is unknown"),
        (lambda: Shape.of({"hidden_size": 0}), "hidden_size=0"),
        (
            lambda: Shape.of({"model_type": "phi3"}),
            "model_type='phi3' is not supported; supported are llama, ",
        ),
        (lambda: Shape.of({"rank_pattern": {"query": 3}}), "match no low-rank linear"),
        (lambda: Shape.of({"rank": 5000}), "rank=5000 of layers.1.q .4096 x 4096. saves nothing"),
        (lambda: find_device("h1000"), "device='h1000' is unknown; the nearest is h100"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("abacus", None),
    ],
)
def test_peaks(name, peak):
    assert peak_flops(name) == peak


@pytest.mark.parametrize("case", ["rank_pattern", "first_layer_rank", "gqa", "head_dim", "bias", "tied", "cola_recipe"])
def test_a_mapping_says_what_the_configuration_says(case, tmp_path):
    """Patterns, first layer and all; from a recipe's fields, and from the config.json of a checkpoint."""
    config = config_of(case)
    given = {name: value for name, value in config.to_dict().items() if value is not None}
    assert Shape.of(given) == Shape.of(config)
    config.save_pretrained(tmp_path)
    assert Shape.of(json.loads((tmp_path / "config.json").read_text())) == Shape.of(config)


def test_a_checkpoint_of_0_1_has_its_own_default_ranks():
    fields = {"hidden_size": 48, "num_attention_heads": 4, "head_dim": 2, "intermediate_size": 130, "rank": None}
    old = {**fields, "model_type": "crnet", "transformers_version": "5.0"}
    assert Shape.of(old).layers[1].linears["q"].rank == 8
    assert Shape.of(fields).layers[1].linears["q"].rank == 3  # 48 x 8: half of in out / (in + out)


def test_accounting_imports_neither_torch_nor_transformers():
    code = "import sys, crosslayer.accounting.planner, crosslayer.crnet\n"
    code += "print(sorted(set(sys.modules) & {'torch', 'transformers', 'numpy'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
