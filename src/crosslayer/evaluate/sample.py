"""Text from a language model."""

from typing import Any

import torch


def sample(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int | None = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int | None = None,
    streamer: Any = None,
) -> str:
    """Prompt and continuation as text. Temperature 0 is greedy; the same seed gives the same text.

    The prompt starts a document: the tokenizer's start token is put before it, as in training. An empty prompt is
    fine. `max_new_tokens` None is up to 200, as many as the model's positions leave. Raises ConfigError where the
    prompt and what follows are longer than those.
    """
    from transformers import set_seed

    from ..data import document_start_id
    from ..data.fit import first_id, room_for

    if seed is not None:
        set_seed(seed)
    ids = [document_start_id(tokenizer), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    inputs = torch.tensor([ids], device=model.device)
    sampling = (
        {"do_sample": False}
        if temperature == 0
        else {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    )
    padding = model.config.pad_token_id
    was_training = model.training
    model.eval()
    try:
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=room_for(len(ids), max_new_tokens, model),
            pad_token_id=first_id(model.config.eos_token_id if padding is None else padding),
            streamer=streamer,
            **sampling,
        )
    finally:
        model.train(was_training)
    return tokenizer.decode(output[0], skip_special_tokens=True)
