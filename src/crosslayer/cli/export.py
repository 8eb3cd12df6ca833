"""`crosslayer export`: the model of a run, or of one of its checkpoints, as a folder of its own."""

from typing import Annotated, Literal

import typer

from .options import spelled

Dtype = Literal["float32", "bfloat16", "float16"]


def export(
    source: Annotated[str, typer.Argument(help="Folder of a run, of a checkpoint or of a model.")],
    output_dir: Annotated[str, spelled("output_dir", "New folder for the model.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights [default: as they are].")] = None,
    step: Annotated[int | None, typer.Option(help="Of a run: its checkpoint of this step.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write SOURCE's model into a folder that transformers loads: one file of weights, tokenizer, modelling code.

    A run that is not finished gives its newest whole checkpoint. Shards that several processes wrote are put together
    in this one.
    """
    from .common import print_json, quiet_libraries

    quiet_libraries()
    from ..train.export import export as write

    written = write(source, output_dir, dtype=dtype, step=step)
    if as_json:
        print_json(written)
        return
    print(f"from    {written['from']}")
    print(f"to      {written['to']}")
    print(f"weights {written['parameters']:,} parameters, {written['dtype']}, {written['bytes'] / 2**20:,.1f} MiB")
