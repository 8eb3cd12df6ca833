"""Weights that lie elsewhere until their module runs: any way through a model gives the numbers of the whole model."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload

from family_cases import FAMILY_CASES, tokens
from tolerances import assert_close

WAYS = {
    "prefill": lambda model, ids: model(input_ids=ids, use_cache=False).logits,
    "one token": lambda model, ids: model(input_ids=ids[:1, :1]).logits,
    "next token": lambda model, ids: model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).float(),
    "loss": lambda model, ids: model(input_ids=ids, labels=ids).loss,
    "fused loss": lambda model, ids: model(input_ids=ids, labels=ids).loss,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "qwen3_moe_interleaved", "deepseek_v3", "cohere"])
def test_offloaded_weights_are_used(name, place, way, tmp_path):
    model = FAMILY_CASES[name].model(eos_token_id=None)
    model.fused_loss = way == "fused loss"
    with torch.no_grad():
        expected = WAYS[way](model, tokens())
        if place == "memory":
            cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        assert any(parameter.is_meta for parameter in model.parameters())
        assert_close(WAYS[way](model, tokens()), expected)
