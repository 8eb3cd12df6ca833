"""Any Hugging Face causal or encoder model for an analysis: from a folder, a run of ours, an adapter, or the hub."""

import difflib
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, CrossLayerError

MODEL_FOLDER = "model"
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
        if (Path(source) / "adapter_config.json").is_file():
            return _load_adapter(source, chosen).eval()
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
    path = Path(name).expanduser()
    if (path / MODEL_FOLDER / "config.json").is_file():
        return str(path / MODEL_FOLDER)
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


def _load_adapter(folder: str, dtype: Any) -> Any:
    import transformers
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(folder)
    heads = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}
    auto = getattr(transformers, heads.get(str(getattr(config.task_type, "value", config.task_type)), "AutoModel"))
    base = auto.from_pretrained(config.base_model_name_or_path, dtype=dtype)
    return PeftModel.from_pretrained(base, folder)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


__all__ = ["DTYPES", "find_model", "load_body", "load_text_tokenizer"]
