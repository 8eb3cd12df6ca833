"""Decoding with a static cache and torch.compile: one graph, and the tokens of eager mode with a dynamic cache."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, StaticCache
from transformers.utils import is_torchao_available

from crosslayer.quantization import quantized_loading
from family_cases import FAMILY_CASES, tokens
from family_checks import greedy
from long_cases import mostly_long
from model_cases import model_of
from tolerances import assert_close

pytestmark = pytest.mark.slow
NEW = 8


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def whole_graph(backend="aot_eager"):
    """What `generate` compiles a step with, on CPUs too; a graph break is an error."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("name", mostly_long(FAMILY_CASES, "llama", "gpt2", "gemma3", "deepseek_v3"))
def test_generate_compiles_a_step_to_one_graph(name):
    model = FAMILY_CASES[name].model(eos_token_id=None, tie_word_embeddings=False)
    ids = tokens(2, length=9)
    expected = greedy(model, ids, NEW)
    assert expected[:, 9:].unique().numel() > 3
    compiled = greedy(model, ids, NEW, cache_implementation="static", compile_config=whole_graph())
    assert torch.equal(compiled, expected)
    # transformers' cache of a window counts in a Python number, which the second step makes a symbol.
    graphs = 2 if getattr(model.config, "sliding_window", None) else 1
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    again = greedy(model, ids.flip(0), NEW, cache_implementation="static", compile_config=whole_graph())
    assert torch.equal(again, greedy(model, ids.flip(0), NEW))
    assert counters["stats"]["unique_graphs"] == graphs  # the next prompt compiles nothing


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prefill_and_decode_through_a_compiled_model(name):
    """A prompt, then single tokens, into one static cache: logits as in eager mode without a cache."""
    model = FAMILY_CASES[name].model()
    ids = tokens(2, length=12)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    cache, pieces = StaticCache(config=model.config, max_cache_len=16), []
    for start, end in ((0, 9), (9, 10), (10, 11), (11, 12)):
        positions = torch.arange(start, end)[None]
        pieces.append(compiled(ids[:, start:end], position_ids=positions, past_key_values=cache).logits)
    assert_close(torch.cat(pieces, 1), model(ids, use_cache=False).logits)
    assert counters["stats"]["unique_graphs"] == 2  # one for the prompt, one for all tokens


@pytest.mark.skipif(not is_torchao_available(), reason="torchao is not installed (extra 'quantize')")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_weights_compile_to_one_graph(kind, tmp_path):
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "rank": 32}
    model_of("cross_layer", eos_token_id=None, **shape).save_pretrained(tmp_path)
    settings = quantized_loading(kind, AutoConfig.from_pretrained(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **settings)
    ids = tokens(2, length=9)
    compiled = greedy(model, ids, NEW, cache_implementation="static", compile_config=whole_graph())
    assert torch.equal(compiled, greedy(model, ids, NEW))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_graph_break_is_an_error():
    """So that the tests above can fail: one break within a step."""
    model = FAMILY_CASES["llama"].model(eos_token_id=None)
    model.model.norm.register_forward_hook(lambda module, inputs, output: torch._dynamo.graph_break())
    with pytest.raises(torch._dynamo.exc.Unsupported):
        greedy(model, tokens(2, length=9), NEW, cache_implementation="static", compile_config=whole_graph())
