"""`crosslayer generate`: text from a checkpoint, as it is made."""

import sys
from typing import Annotated

import typer

from .options import Device, Quantize, spelled


def generate(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a model, of an adapter, or of a run.")],
    prompt: Annotated[str, typer.Option(help="Start of the text.")] = "",
    max_new_tokens: Annotated[
        int | None,
        spelled(
            "max_new_tokens",
            "Most tokens to add [default: 200, or what room is left].",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, spelled("top_k", "Sample among the k likeliest; 0 is all.")] = 50,
    top_p: Annotated[float, spelled("top_p", "Sample within this probability mass.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    device: Device = None,
    quantize: Quantize = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, at the end.")] = False,
) -> None:
    """Continue PROMPT with CHECKPOINT; tokens are printed as they are made."""
    from .common import load_checkpoint, print_json, quiet_libraries

    quiet_libraries()
    from transformers import TextStreamer

    from ..evaluate.sample import sample
    from .evaluate import choose_device

    model, tokenizer = load_checkpoint(checkpoint, device=choose_device(device), quantize=quantize)
    try:
        text = sample(
            model,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            streamer=None if as_json else TextStreamer(tokenizer, skip_special_tokens=True),
        )
    except KeyboardInterrupt:
        print(flush=True)  # what is said of it stands below the text
        raise
    if as_json:
        print_json({"checkpoint": checkpoint, "quantize": quantize, "prompt": prompt, "text": text, "seed": seed})
    sys.stdout.flush()
