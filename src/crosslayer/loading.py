"""Models and tokenizers for any use: from a model's folder, the folder of a run, of a PEFT adapter, or the hub.

`find_model` says where a name leads; `load_checkpoint` loads a language model to evaluate, `load_pretrained` one to
train, `load_body` one to analyse, `load_text_tokenizer` a tokenizer alone.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, ConfigError, CrossLayerError, first_line, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

MODEL_FOLDER = "model"
"""Where a run leaves its model."""

ADAPTER_FOLDER = "adapter"
"""Where a run leaves the adapter that it trained."""

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
CONFIG, ADAPTER_CONFIG, TOKENIZER = "config.json", "adapter_config.json", "tokenizer.json"


def find_model(
    name: str, *, what: str = "model", holds: tuple[str, ...] = (CONFIG, ADAPTER_CONFIG, TOKENIZER), on_hub: bool = True
) -> str:
    """Where a name leads: a model's folder, also inside the folder of a run, or a name for the hub.

    Args:
        name: what a user gave.
        what: what it is called in messages.
        holds: files of which one has to be in the folder.
        on_hub: whether it may be a name on the hub, where there is no such folder.

    Raises CheckpointError for a path that leads nowhere, with the nearest one beside it, and for a folder of no model.
    """
    path = Path(name).expanduser()
    if has_model(path):
        return str(path / MODEL_FOLDER)
    if path.is_dir():
        if not any((path / file).is_file() for file in holds):
            raise CheckpointError(
                f"{name!r} is not a {what}: it has no {CONFIG}; give a folder that has, such as a run's {MODEL_FOLDER}/"
            )
        return str(path)
    if not on_hub or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        otherwise = "give a folder or a name on the hub" if on_hub else "give the folder that a run wrote"
        raise CheckpointError(
            f"{what} {name!r} does not exist; {f'did you mean {path.parent / near}?' if near else otherwise}"
        )
    return name


def has_model(run: Path) -> bool:
    """Whether this is the folder of a run that holds a whole model."""
    return (run / MODEL_FOLDER / CONFIG).is_file()


def load_checkpoint(folder: str) -> tuple["PreTrainedModel", "PreTrainedTokenizerFast"]:
    """Model, in evaluation mode, and tokenizer of a checkpoint folder, or of a run folder that holds one.

    Raises CheckpointError for a folder that is missing, is no causal language model or is truncated.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import crosslayer.crnet.registration  # noqa: F401  registers the Auto classes

    from .data.fit import check_ids, check_special_tokens

    path = find_model(folder, what="checkpoint", holds=(CONFIG,), on_hub=False)
    try:
        model_type = AutoConfig.from_pretrained(path).model_type
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # weights and tokenizers that were cut off raise many kinds
        raise CheckpointError(f"{folder!r} cannot be loaded: {first_line(error)}") from error
    _check_complete(info["missing_keys"], f"{folder!r} ({model_type})")
    try:
        check_ids(tokenizer, model, repr(folder))
        if model_type.startswith("crnet"):
            check_special_tokens(tokenizer, model.config, repr(folder))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    return model.eval(), tokenizer


def load_saved(folder: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerFast"]:
    """Model and tokenizer that a run of ours saved in `folder`, as they are. Raises CheckpointError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read ({type(error).__name__})") from error


def load_pretrained(name: str, auto_class: str, **settings: Any) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A pre-trained model to go on with, and its tokenizer.

    Args:
        name: a model's folder, the folder of a run that holds one, or a name on the hub.
        auto_class: name of transformers' Auto class that makes it.
        settings: for its `from_pretrained`.

    Raises CheckpointError for a model that does not exist or cannot be loaded.
    """
    import transformers

    import crosslayer.crnet.registration  # noqa: F401  registers the Auto classes

    source = find_model(name, holds=(CONFIG,))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        return getattr(transformers, auto_class).from_pretrained(source, **settings), tokenizer
    except Exception as error:  # the hub, its client and model classes raise dozens of kinds
        raise CheckpointError(f"model {name!r} cannot be loaded: {first_line(error)}") from error


def load_body(name: str, *, untrained: bool = False, seed: int = 0, dtype: str = "auto") -> Any:
    """Any causal or encoder model in evaluation mode, without a head where it can be had without.

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
        if (Path(source) / ADAPTER_CONFIG).is_file():
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
            _check_complete((key for key in info["missing_keys"] if "pooler" not in key), f"model {name!r}")
    except CrossLayerError:
        raise
    except Exception as error:
        raise CheckpointError(f"model {name!r} cannot be loaded: {first_line(error)}") from error
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
        raise CheckpointError(f"no tokenizer in {name!r} ({first_line(error)}); name one with tokenizer") from error


def _load_adapter(folder: str, dtype: Any) -> Any:
    import transformers
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(folder)
    heads = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}
    auto = getattr(transformers, heads.get(str(getattr(config.task_type, "value", config.task_type)), "AutoModel"))
    base = auto.from_pretrained(config.base_model_name_or_path, dtype=dtype)
    return PeftModel.from_pretrained(base, folder)


def _check_complete(missing_keys: Any, label: str) -> None:
    """Raises CheckpointError where weights of the model are not in the file."""
    missing = sorted(missing_keys)
    if missing:
        raise CheckpointError(
            f"{label} lacks {len(missing)} weights, the first of them {missing[0]}; it is truncated or of another model"
        )


__all__ = [
    "ADAPTER_FOLDER",
    "DTYPES",
    "MODEL_FOLDER",
    "find_model",
    "has_model",
    "load_body",
    "load_checkpoint",
    "load_pretrained",
    "load_saved",
    "load_text_tokenizer",
]
