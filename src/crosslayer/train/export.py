"""A run's model as a folder of its own: one file of weights, from whatever form its checkpoints have."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError
from ..loading import CONFIG, MODEL_FOLDER, has_model, is_adapter, load_saved, model_folder
from .checkpoints import checkpoint_to_resume, checkpoints, damage
from .sharded import has_shards, load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export(
    source: str | Path, output_dir: str | Path, *, dtype: str | None = None, step: int | None = None
) -> dict[str, Any]:
    """Write model, configuration, tokenizer and modelling code into a new folder.

    Args:
        source: the folder of a run, of one of its checkpoints, or of a model.
        output_dir: a new or empty folder; nothing is left there when writing fails.
        dtype: of the weights; None as they are. Tied weights stay tied in every one.
        step: the checkpoint of a run; None is its result, or the newest whole checkpoint of an unfinished one.

    Returns what was written: {"from", "to", "dtype", "parameters", "bytes"}.

    Raises CheckpointError for a source without a whole model, ConfigError for a folder that holds something.
    """
    target = Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} holds something already; give a new --output_dir")
    found = _find(Path(source).expanduser(), step)
    model, tokenizer = _load_shards(found) if has_shards(found) else load_saved(found)
    beside = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        model.save_pretrained(beside)
        if dtype is not None:  # what transformers keeps in float32, such as beta, stays so
            model = type(model).from_pretrained(beside, dtype=dtype)
            model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        if target.exists():
            target.rmdir()
        beside.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written ({error.strerror}); choose another folder") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return {
        "from": str(found),
        "to": str(target),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": model.num_parameters(),
        "bytes": sum(path.stat().st_size for path in target.glob("*.safetensors")),
    }


def _find(source: Path, step: int | None) -> Path:
    """The folder of a model or a checkpoint that a source names."""
    if not source.is_dir():
        raise CheckpointError(f"{str(source)!r} does not exist; give the folder of a run, a checkpoint or a model")
    if is_adapter(model_folder(str(source))):
        raise CheckpointError(
            f"{str(source)!r} holds an adapter, which is loaded beside its base model; there is nothing to export"
        )
    saved = checkpoints(source)
    if step is not None:
        chosen = source / f"checkpoint-{step}"
        if chosen not in saved:
            steps = ", ".join(folder.name.removeprefix("checkpoint-") for folder in saved) or "none"
            raise CheckpointError(f"{source} has no checkpoint of step {step}; it has {steps}")
        return _whole(chosen)
    if has_model(source):
        return source / MODEL_FOLDER
    if saved:
        newest = checkpoint_to_resume(source, None)
        if newest is not None:
            return newest
    if (source / CONFIG).is_file():
        return _whole(source) if has_shards(source) else source
    raise CheckpointError(f"{source} holds no model and no whole checkpoint yet")


def _whole(checkpoint: Path) -> Path:
    problem = damage(checkpoint)
    if problem is not None:
        raise CheckpointError(f"{checkpoint} cannot be exported: {problem}")
    return checkpoint


def _load_shards(checkpoint: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
        load_weights(checkpoint, model)
        return model, AutoTokenizer.from_pretrained(checkpoint)
    except Exception as error:  # configurations, tokenizers and torch's reader fail in many ways
        raise CheckpointError(f"{checkpoint} cannot be read ({type(error).__name__}: {error})") from error
