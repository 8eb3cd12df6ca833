"""Options that several verbs have, and the two spellings of every option of more than one word."""

from typing import Annotated, Any, Literal

import typer


def spelled(name: str, help: str, **more: Any) -> Any:
    """An option that may be written --two_words and --two-words; the spelling of `name` is the first in --help."""
    other = name.replace("_", "-") if "_" in name else name.replace("-", "_")
    return typer.Option(f"--{name}", f"--{other}", help=help, **more)


Data = Annotated[str, typer.Option(help="python-library, a file, a folder, or hf:owner/name[:config].")]
TextColumn = Annotated[str, spelled("text_column", "Field that holds the text.")]
Split = Annotated[str, typer.Option(help="Split of a hub dataset.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 [default: CUDA where there is one].")]
Quantize = Annotated[
    Literal["int8", "int4"] | None, typer.Option(help="Weights of the linears in so many bits, by torchao.")
]

__all__ = ["Data", "Device", "Quantize", "Split", "TextColumn", "spelled"]
