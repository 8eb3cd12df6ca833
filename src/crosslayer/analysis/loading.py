"""Any Hugging Face causal or encoder model for an analysis: from a folder, a run of ours, an adapter, or the hub."""

import difflib
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, CrossLayerError

MODEL_FOLDER, ADAPTER_FOLDER = "model", "adapter"
HEADS = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load_body(name: str, *, untrained: bool = False, seed: int = 0, dtype: str = "auto") -> Any:
    """The model in evaluation mode, without a head where it can be had without.

    Args:
        name: a model's folder, the folder of a run that holds one, of a PEFT adapter, or a name on the hub.
        untrained: the same architecture with freshly drawn weights (not for adapters).
        seed: of those weights.
        dtype: of the weights; auto is what the checkpoint says.

    Raises CheckpointError for a model that does not exist or cannot be loaded, ConfigError for an encoder-decoder.
    """
    import torch
    from transformers import AutoConfig, AutoModel, set_seed

    import crosslayer.crnet.registration  # noqa: F401  registers the Auto classes

    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}; allowed: {', '.join(DTYPES)}")
    source = find_model(name)
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        if is_adapter(source):
            return load_adapter(source, chosen).eval()
        config = AutoConfig.from_pretrained(source)
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError(
                f"model {name!r} ({config.model_type}) is an encoder-decoder; give a causal or an encoder model"
            )
        if untrained:
            set_seed(seed)
            model = AutoModel.from_config(config, **({} if dtype == "auto" else {"dtype": chosen}))
        else:
            model, info = AutoModel.from_pretrained(source, dtype=chosen, output_loading_info=True)
            missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
            if missing:
                raise CheckpointError(
                    f"model {name!r} lacks {len(missing)} weights, the first of them {missing[0]}; it is truncated"
                )
    except CrossLayerError:
        raise
    except Exception as error:
        raise CheckpointError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # a cache would hold every layer's keys and values
    return model.eval()


def load_text_tokenizer(name: str) -> Any:
    """The tokenizer of a model's or a run's folder, or of a hub name. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(find_model(name))
    except CrossLayerError:
        raise
    except Exception as error:
        raise CheckpointError(f"no tokenizer in {name!r} ({_first_line(error)}); name one with tokenizer") from error


def find_model(name: str) -> str:
    """The folder of a model where there is one, else a name for the hub. Raises CheckpointError for a path of none."""
    path = model_folder(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json", "tokenizer.json")):
            raise CheckpointError(f"{name!r} is not a model: it has no config.json; give a folder that has")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; give a folder or a name on the hub"
        raise CheckpointError(f"model {name!r} does not exist{hint}")
    return name


def load_adapter(folder: str | Path, dtype: Any = "auto", *, is_causal: bool = False) -> Any:
    """The base model of a PEFT adapter's folder with the adapter on it: a PeftModel; adapters are float32.

    The base is where adapter_config.json says, seen from here or, for a relative path, from a folder above the adapter;
    or a name on the hub. Raises CheckpointError for a base that cannot be loaded, an adapter that does not fit it, and
    with `is_causal` one that is not for a causal language model or puts tokens before the text.
    """
    import transformers
    from peft import PeftConfig, PeftModel
    from peft.utils import get_peft_model_state_dict, load_peft_weights

    import crosslayer.crnet.registration
    import crosslayer.lor2c  # noqa: F401  makes LoR2C known to PEFT

    path = Path(folder)
    try:
        config = PeftConfig.from_pretrained(str(path))
    except Exception as error:
        raise CheckpointError(f"adapter {str(path)!r} cannot be loaded: {_first_line(error)}") from error
    task = str(getattr(config.task_type, "value", config.task_type))
    if is_causal and (task not in ("CAUSAL_LM", "None") or config.is_prompt_learning):
        what = f"of the kind {config.peft_type}" if config.is_prompt_learning else f"for {task}"
        raise CheckpointError(
            f"adapter {str(path)!r} is {what}; give one that adapts the blocks of a causal language model (LoR2C, LoRA)"
        )
    auto = getattr(transformers, "AutoModelForCausalLM" if is_causal else HEADS.get(task, "AutoModel"))
    base = config.base_model_name_or_path or ""
    try:
        model = auto.from_pretrained(_find_base(base, path), dtype=dtype)
    except Exception as error:
        raise CheckpointError(
            f"adapter {str(path)!r}: its base model {base!r} cannot be loaded ({_first_line(error)}); put it there, or "
            f"correct base_model_name_or_path in {path / 'adapter_config.json'}"
        ) from error
    try:
        adapted = PeftModel.from_pretrained(model, str(path))
        missing = sorted(
            get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - load_peft_weights(str(path)).keys()
        )
    except Exception as error:
        raise CheckpointError(
            f"adapter {str(path)!r} cannot be put on its base model {base!r}: {_first_line(error)}"
        ) from error
    if missing:
        raise CheckpointError(
            f"adapter {str(path)!r} lacks {len(missing)} weights, the first of them {missing[0]}; it is truncated or "
            f"of another model than {base!r}"
        )
    return adapted


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(folder) / "adapter_config.json").is_file()


def _find_base(name: str, adapter: Path) -> str:
    above = [] if Path(name).expanduser().is_absolute() else [str(up / name) for up in adapter.resolve().parents]
    places = [name, *above] if name else []
    found = [place for place in map(model_folder, places) if (place / "config.json").is_file()]
    return str(found[0]) if found else name


def model_folder(name: str) -> Path:
    """The folder of a model or an adapter: itself, or that of a run's result in it."""
    path = Path(name).expanduser()
    if (path / MODEL_FOLDER / "config.json").is_file():
        return path / MODEL_FOLDER
    if is_adapter(path / ADAPTER_FOLDER) and not (path / "config.json").is_file():
        return path / ADAPTER_FOLDER
    return path


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


__all__ = ["DTYPES", "find_model", "is_adapter", "load_adapter", "load_body", "load_text_tokenizer", "model_folder"]
