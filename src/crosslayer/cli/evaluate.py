"""`crosslayer evaluate`: perplexity and bits per byte of a checkpoint."""

from typing import Annotated, Literal

import typer

from .options import Data, Device, Quantize, Split, TextColumn, spelled


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a model, of an adapter, or of a run.")],
    data: Data = "python-library",
    part: Annotated[
        Literal["all", "validation"] | None,
        typer.Option(
            help="all of the data, or the validation part that pre-training on it held out "
            "[default: validation for python-library, all for the rest]."
        ),
    ] = None,
    validation_fraction: Annotated[float, spelled("validation_fraction", "As in pre-training.")] = 0.02,
    text_column: TextColumn = "text",
    split: Split = "train",
    block_size: Annotated[
        int | None,
        spelled("block_size", "Longest context in tokens [default: the model's, <= 1024]."),
    ] = None,
    batch_size: Annotated[int, spelled("batch_size", "Blocks at a time.")] = 8,
    max_documents: Annotated[int | None, spelled("max_documents", "Read only the first so many.")] = None,
    skip_bad: Annotated[bool, spelled("skip-bad", "Leave out unreadable input.")] = False,
    published: Annotated[
        bool,
        typer.Option(
            "--published",
            help="Show beside it what GaLore's, SLTrain's and CoLA's scripts would print (divided by batches + 1).",
        ),
    ] = False,
    device: Device = None,
    quantize: Quantize = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity and bits per byte of CHECKPOINT on a text.

    Perplexity is exp of the mean negative log-likelihood over every token, documents kept apart, context at most one
    block. Bits per byte does not depend on the vocabulary.
    """
    from .common import load_checkpoint, print_json, quiet_libraries
    from .progress import counted

    quiet_libraries()
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    from ..data import DataConfig, load_evaluation_data
    from ..data.config import PYTHON_LIBRARY
    from ..data.fit import block_length
    from ..evaluate import measure_perplexity

    part = part or ("validation" if data == PYTHON_LIBRARY else "all")
    model, tokenizer = load_checkpoint(checkpoint, device=choose_device(device), quantize=quantize)
    block_size = block_length(block_size, tokenizer, model)
    config = DataConfig(
        data=data,
        split=split,
        text_column=text_column,
        validation_fraction=validation_fraction,
        max_documents=max_documents,
        block_size=block_size,
        skip_bad=skip_bad,
    )
    blocks, statistics = load_evaluation_data(config, tokenizer, part=part)
    batches = DataLoader(blocks, batch_size=batch_size, collate_fn=default_data_collator)
    result = measure_perplexity(model, counted(batches, "evaluating", hidden=as_json), utf8_bytes=statistics.bytes)
    if as_json:
        source = {"checkpoint": checkpoint, "quantize": quantize, "data": data, "part": part, "block_size": block_size}
        print_json({**source, "batch_size": batch_size, "documents": statistics.documents, **result.to_dict()})
        return
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"perplexity     {result.perplexity:.3f}")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
    print(f"over           {result.tokens:,} tokens of {statistics.documents:,} documents, {statistics.bytes:,} bytes")
    if published:
        print(
            f"published way  {result.published_perplexity:.3f} (sum of {result.batches} batch means over "
            f"{result.batches + 1}: too low, only for comparison)"
        )


def choose_device(device: str | None) -> str:
    """The device named, or CUDA where there is one. Raises ConfigError for one that is not there."""
    import torch

    from ..errors import ConfigError

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        is_there = torch.empty(0, device=device).device.type != "meta"
    except (RuntimeError, AssertionError, ValueError, OverflowError):
        is_there = False
    if not is_there:
        raise ConfigError(f"device={device!r} is not available here; allowed: cpu, or cuda where there is one")
    return device
