"""`crosslayer serve`: a checkpoint behind transformers' own server."""

from typing import Annotated

import typer


def serve(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="Folder of a model, or of a run.")],
) -> None:
    """Answer requests in OpenAI's format with CHECKPOINT, on http://localhost:8000/v1, until interrupted.

    It is `transformers serve`, which knows no models but transformers' own, with ours made known to it. Its options
    follow as they are: --port, --host, --device, --dtype, --compile, ...; `transformers serve --help` lists them.
    """
    from .common import quiet_libraries

    quiet_libraries()
    from transformers.utils.import_utils import is_serve_available

    from ..crnet.families import FAMILIES, model_classes
    from ..errors import ConfigError
    from ..loading import CONFIG, find_model
    from ..private import run_transformers_serve

    folder = find_model(checkpoint, what="checkpoint", holds=(CONFIG,), on_hub=False)
    if not is_serve_available():
        raise ConfigError("serving needs packages that are not installed; pip install 'transformers[serving]'")
    classes = [model for family in FAMILIES for model in model_classes(family).values()]
    if wrong := run_transformers_serve(folder, context.args, classes):
        raise ConfigError(wrong)
