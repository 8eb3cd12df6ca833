"""One table of tiny models, with odd shapes, from which every model test takes its cases."""

import torch

from crosslayer.crnet import CRNetConfig, CRNetForCausalLM

SEQUENCE = 17
PAD = 0

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 130,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # at 0.02 a tiny model is nearly linear
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}

LLAMA_CASES = {
    "mha": {},
    "gqa": GQA,
    "bias": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 20},
    "relu": {"hidden_act": "relu"},
}
"""What a Llama configuration may vary, read by LlamaConfig and CRNetConfig alike."""

_YARN = {"original_max_position_embeddings": 8, "rope_theta": 10000.0, "factor": 8.0}
ROPE_CASES = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", **_YARN},
    "llama3": {"rope_type": "llama3", **_YARN, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        **_YARN,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
    },
}
"""rope_parameters of every scaling type, most made for contexts longer than 8; a test has 17 tokens."""

FACTORIZATION_CASES = {
    "cross_layer": {"rank": 7},
    "low_rank": {"factorization": "low_rank", "rank": 7},
    "cola": {"factorization": "cola", "rank": 7},
    "dense": {"factorization": "dense"},
}

CASES = FACTORIZATION_CASES | {
    "gqa": {"rank": 7, **GQA},
    "bias": {"rank": 7, **LLAMA_CASES["bias"]},
    "tied": {"rank": 7, **LLAMA_CASES["tied"]},
    "head_dim": {"rank": 7, **LLAMA_CASES["head_dim"]},
    "silu_increment": {"rank": 7, "increment_activation": "silu"},
    "first_layer_rank": {"rank": 7, "first_layer_rank": 5},
    "rank_pattern": {"rank": 7, "rank_pattern": {r"layers\.1\.(gate|up)": 11, "down": 3}},
    "cola_gqa_bias": {"factorization": "cola", "rank": 7, **GQA, **LLAMA_CASES["bias"]},
    "low_rank_first": {"factorization": "low_rank", "rank": 7, "first_layer_rank": 9},
    "cola_recipe": {"factorization": "cola", "rank": 7, "hidden_act": "linear"},
}


def config_of(case: str, **overrides) -> CRNetConfig:
    return CRNetConfig(**(SHAPE | CASES[case] | overrides))


def model_of(case, model_class=CRNetForCausalLM, dtype=torch.float32, attention="sdpa", seed=0, **overrides):
    """A model in evaluation mode, every parameter of which matters: see `randomize`."""
    model = model_class._from_config(config_of(case, **overrides), attn_implementation=attention, dtype=dtype)
    return randomize(model, seed).eval()


@torch.no_grad()
def randomize(model, seed=0):
    """No parameter stays neutral: no zero B or bias, no norm of 1, beta of both signs and a 0."""
    generator = torch.Generator().manual_seed(seed)
    betas = 0
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("beta"):
            # 1.2, -0.9, 0, then anything between -1.5 and 1.5.
            value = (1.2, -0.9, 0.0)[betas] if betas < 3 else float(noise.clamp(-1.5, 1.5))
            parameter.fill_(value)
            betas += 1
        elif "norm" in name:
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.dim() == 1:
            parameter.copy_(0.2 * noise)
        elif name.endswith("embed_tokens.weight"):
            parameter.copy_(0.5 * noise)
            if model.config.pad_token_id is not None:
                parameter[model.config.pad_token_id] = 0
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def tokens(rows=2, length=SEQUENCE, seed=1, vocab_size=SHAPE["vocab_size"]) -> torch.Tensor:
    """Random ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (rows, length), generator=generator)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
