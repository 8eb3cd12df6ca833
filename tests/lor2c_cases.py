"""Tiny models of every architecture that LoR2C is tested on, built from configurations."""

import torch
import transformers
from peft import get_peft_model
from torch import nn

from crosslayer.crnet import CRNetConfig
from crosslayer.lor2c import LoR2CConfig

DECODER = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
ENCODER = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
GPT = {
    "vocab_size": 53,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_HEAD_DIM = {key: value for key, value in DECODER.items() if key != "head_dim"}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_local_experts": 4}
HALVES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 53,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}

ARCHITECTURES = {
    # name: (configuration, its arguments, model class)
    "llama": ("LlamaConfig", DECODER, "LlamaForCausalLM"),
    "mistral": ("MistralConfig", DECODER, "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", NO_HEAD_DIM, "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", DECODER, "Qwen3ForCausalLM"),
    "gemma2": ("Gemma2Config", DECODER, "Gemma2ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", DECODER, "Gemma3ForCausalLM"),
    "phi3": ("Phi3Config", NO_HEAD_DIM, "Phi3ForCausalLM"),
    "mixtral": ("MixtralConfig", {**NO_HEAD_DIM, **MOE}, "MixtralForCausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", {**DECODER, **MOE}, "Qwen3MoeForCausalLM"),
    "gpt2": ("GPT2Config", GPT, "GPT2LMHeadModel"),
    "opt": ("OPTConfig", {**NO_HEAD_DIM, "ffn_dim": 48, "word_embed_proj_dim": 32}, "OPTForCausalLM"),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 4}, "GPTJForCausalLM"),
    "gpt_neox": ("GPTNeoXConfig", NO_HEAD_DIM, "GPTNeoXForCausalLM"),
    "bloom": ("BloomConfig", {"vocab_size": 53, "hidden_size": 32, "n_layer": 3, "n_head": 4}, "BloomForCausalLM"),
    "mamba": ("MambaConfig", {"vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 3}, "MambaForCausalLM"),
    "roberta": ("RobertaConfig", ENCODER, "RobertaForSequenceClassification"),
    "bert": ("BertConfig", ENCODER, "BertForSequenceClassification"),
    "deberta_v2": (
        "DebertaV2Config",
        {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "DebertaV2ForSequenceClassification",
    ),
    "modernbert": ("ModernBertConfig", ENCODER, "ModernBertForSequenceClassification"),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": 53, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64},
        "DistilBertForSequenceClassification",
    ),
    "vit": ("ViTConfig", {**ENCODER, "image_size": 8, "patch_size": 4}, "ViTForImageClassification"),
    "t5": (
        "T5Config",
        {"vocab_size": 53, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0},
        "T5ForConditionalGeneration",
    ),
    "whisper": (
        "WhisperConfig",
        {**HALVES, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 32,
         "begin_suppress_tokens": None, "suppress_tokens": None},
        "WhisperForConditionalGeneration",
    ),
    "bart": ("BartConfig", {**HALVES, "max_position_embeddings": 64}, "BartForConditionalGeneration"),
}  # fmt: skip
GENERATING = [
    name
    for name, (_, _, model) in ARCHITECTURES.items()
    if model.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration"))
]


def base_model(name: str) -> nn.Module:
    """A tiny model in evaluation mode; the same weights at every call."""
    torch.manual_seed(0)
    config_name, arguments, model_name = ARCHITECTURES[name]
    config = getattr(transformers, config_name)(**arguments)
    model = getattr(transformers, model_name)(config).eval()
    for module in model.modules():  # parts that transformers starts at zero or one would hide errors
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    return model


def inputs_of(name: str, labels: bool = False) -> dict[str, torch.Tensor]:
    """A batch of two rows for the model of that name."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 53, (2, 7), generator=generator)
    if name == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    elif name == "whisper":
        inputs = {"input_features": torch.randn(2, 8, 16, generator=generator), "decoder_input_ids": tokens}
    elif name in ("t5", "bart"):
        inputs = {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}
    else:
        inputs = {"input_ids": tokens}
    if labels:
        inputs["labels"] = tokens if name in GENERATING else torch.tensor([0, 1])
    return inputs


def with_lor2c(model: nn.Module, moved: bool = True, **options):
    """The model with a LoR2C adapter in evaluation mode; `moved`: as after training, B no longer zero."""
    options = {"r": 4, "lor2c_alpha": 8, "lor2c_dropout": 0.0, **options}
    adapted = get_peft_model(model, LoR2CConfig(**options)).eval()
    if moved:
        move(adapted)
    return adapted


def move(model: nn.Module, std: float = 0.2, seed: int = 2) -> None:
    """Gives every adapter weight values of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lor2c." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def crnet_config(**options) -> CRNetConfig:
    """A CR-Net whose layers really differ."""
    return CRNetConfig(**{**DECODER, "rank": 6, "num_hidden_layers": 4, **options})
