"""Text from a language model."""

from typing import Any

import torch


def sample(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int | None = None,
    streamer: Any = None,
) -> str:
    """Prompt and continuation as text. Temperature 0 is greedy; the same seed gives the same text.

    The prompt starts a document: the tokenizer's start token is put before it, as in training. An empty prompt is
    fine.
    """
    from transformers import set_seed

    from ..data import document_start_id

    if seed is not None:
        set_seed(seed)
    ids = [document_start_id(tokenizer), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    inputs = torch.tensor([ids], device=model.device)
    sampling = (
        {"do_sample": False}
        if temperature == 0
        else {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    )
    was_training = model.training
    model.eval()
    try:
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            pad_token_id=model.config.pad_token_id
            if model.config.pad_token_id is not None
            else model.config.eos_token_id,
            streamer=streamer,
            **sampling,
        )
    finally:
        model.train(was_training)
    return tokenizer.decode(output[0], skip_special_tokens=True)
