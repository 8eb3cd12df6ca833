"""Models and tokenizers for any use: from a model's folder, the folder of a run, of a PEFT adapter, or the hub.

`find_model` says where a name leads; `load_checkpoint` loads a language model to evaluate, `load_pretrained` one to
train, `load_body` one to analyse, `load_text_tokenizer` a tokenizer alone.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, ConfigError, CrossLayerError, first_line, nearest
from .quantization import quantized_loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

MODEL_FOLDER = "model"
"""Where a run leaves its model."""

ADAPTER_FOLDER = "adapter"
"""Where a run leaves the adapter that it trained."""

HEADS = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}
"""Kind of an adapter's task -> the Auto class of its base model."""

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
CONFIG, ADAPTER_CONFIG, TOKENIZER = "config.json", "adapter_config.json", "tokenizer.json"


def find_model(
    name: str, *, what: str = "model", holds: tuple[str, ...] = (CONFIG, ADAPTER_CONFIG, TOKENIZER), on_hub: bool = True
) -> str:
    """Where a name leads: the folder of a model or an adapter, also inside that of a run, or a name for the hub.

    Args:
        name: what a user gave.
        what: what it is called in messages.
        holds: files of which one has to be in the folder.
        on_hub: whether it may be a name on the hub, where there is no such folder.

    Raises CheckpointError for a path that leads nowhere, with the nearest one beside it, and for a folder of no model.
    """
    path = model_folder(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in holds):
            needed = " and no ".join(file for file in holds if file != TOKENIZER)
            raise CheckpointError(
                f"{name!r} is not a {what}: it has no {needed}; give a folder that has, such as a run's {MODEL_FOLDER}/"
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


def model_folder(name: str) -> Path:
    """The folder of a model or an adapter: itself, or that of a run's result in it."""
    path = Path(name).expanduser()
    if has_model(path):
        return path / MODEL_FOLDER
    if is_adapter(path / ADAPTER_FOLDER) and not (path / CONFIG).is_file():
        return path / ADAPTER_FOLDER
    return path


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def has_model(run: Path) -> bool:
    """Whether this is the folder of a run that holds a whole model."""
    return (run / MODEL_FOLDER / CONFIG).is_file()


def load_checkpoint(
    folder: str, *, device: str = "cpu", quantize: str | None = None
) -> tuple["PreTrainedModel", "PreTrainedTokenizerFast"]:
    """Model, in evaluation mode, and tokenizer of a checkpoint folder, of a PEFT adapter's, or of a run folder that
    holds one.

    An adapter comes on its base model, with its own tokenizer where it has one.

    Args:
        folder: as `find_model` takes it, but not a name on the hub.
        device: where the model is put.
        quantize: "int8" or "int4" for its linears, or those of an adapter's base (`quantized_loading`); None for none.

    Raises CheckpointError for a folder that is missing, is no causal language model or is truncated, and ConfigError
    for a model that cannot be quantized so.
    """
    from .data.fit import check_ids, check_special_tokens

    path = find_model(folder, what="checkpoint", holds=(CONFIG, ADAPTER_CONFIG), on_hub=False)
    has_only_adapter = is_adapter(path) and not (Path(path) / CONFIG).is_file()
    if has_only_adapter:
        model, tokenizer = _load_adapted(Path(path), device, quantize)
    else:
        model, tokenizer = _load_causal(path, folder, device, quantize)
    try:
        check_ids(tokenizer, model, repr(folder))
        if model.config.model_type.startswith("crnet"):
            check_special_tokens(tokenizer, model.config, repr(folder))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    return model.to(device).eval(), tokenizer


def _load_causal(path: str, label: str, device: str, quantize: str | None) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path)
        settings = quantized_loading(quantize, config, device)
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **settings)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except ConfigError:
        raise
    except Exception as error:  # weights and tokenizers that were cut off raise many kinds
        raise CheckpointError(f"{label!r} cannot be loaded: {first_line(error)}") from error
    _check_complete(info["missing_keys"], f"{label!r} ({config.model_type})")
    return model, tokenizer


def _load_adapted(path: Path, device: str, quantize: str | None) -> tuple[Any, Any]:
    """A causal language model with an adapter on it, and its tokenizer. Raises CheckpointError."""
    from transformers import AutoTokenizer

    model = load_adapter(path, is_causal=True, device=device, quantize=quantize)
    has_its_own = (path / "tokenizer_config.json").is_file()
    source = str(path) if has_its_own else model.get_base_model().name_or_path
    try:
        return model, AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise CheckpointError(
            f"no tokenizer in {source!r} ({first_line(error)}); save it beside the adapter"
        ) from error


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

    Raises CheckpointError for a model that does not exist, cannot be loaded or lacks weights that are not a new head's.
    """
    import transformers

    source = find_model(name, holds=(CONFIG,))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model, info = getattr(transformers, auto_class).from_pretrained(source, output_loading_info=True, **settings)
    except Exception as error:  # the hub, its client and model classes raise dozens of kinds
        raise CheckpointError(f"model {name!r} cannot be loaded: {first_line(error)}") from error
    # A classifier's head is new, and so is the pooler under it where there was none; a language model's is not.
    is_new = "ForSequenceClassification" in auto_class
    body = f"{model.base_model_prefix}."
    lacking = [key for key in info["missing_keys"] if not is_new or (key.startswith(body) and "pooler" not in key)]
    _check_complete(lacking, f"model {name!r} ({model.config.model_type})", "of another kind")
    return model, tokenizer


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


def load_adapter(
    folder: str | Path,
    dtype: Any = "auto",
    *,
    is_causal: bool = False,
    device: str = "cpu",
    quantize: str | None = None,
) -> Any:
    """The base model of a PEFT adapter's folder with the adapter on it: a PeftModel; adapters are float32.

    The base is where adapter_config.json says, seen from here or, for a relative path, from a folder above the adapter;
    or a name on the hub. Raises CheckpointError for a base that cannot be loaded, an adapter that does not fit it, and
    with `is_causal` one that is not for a causal language model or puts tokens before the text; ConfigError for a base
    that cannot be quantized so. `device` is where a quantized base computes.
    """
    import transformers
    from peft import PeftConfig, PeftModel
    from peft.utils import get_peft_model_state_dict, load_peft_weights

    path = Path(folder)
    label = f"adapter {str(path)!r}"
    try:
        config = PeftConfig.from_pretrained(str(path))
    except Exception as error:
        raise CheckpointError(f"{label} cannot be loaded: {first_line(error)}") from error
    task = str(getattr(config.task_type, "value", config.task_type))
    if is_causal and (task not in ("CAUSAL_LM", "None") or config.is_prompt_learning):
        what = f"of the kind {config.peft_type}" if config.is_prompt_learning else f"for {task}"
        raise CheckpointError(
            f"{label} is {what}; give one that adapts the blocks of a causal language model (LoR2C, LoRA)"
        )
    auto = getattr(transformers, "AutoModelForCausalLM" if is_causal else HEADS.get(task, "AutoModel"))
    base = config.base_model_name_or_path or ""
    try:
        source = _find_base(base, path)
        settings: dict[str, Any] = {"dtype": dtype}
        if quantize is not None:
            settings |= quantized_loading(quantize, transformers.AutoConfig.from_pretrained(source), device)
        model = auto.from_pretrained(source, **settings)
    except ConfigError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{label}: its base model {base!r} cannot be loaded ({first_line(error)}); put it there, or "
            f"correct base_model_name_or_path in {path / ADAPTER_CONFIG}"
        ) from error
    try:
        adapted = PeftModel.from_pretrained(model, str(path))
        needed = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        missing = needed - load_peft_weights(str(path)).keys()
    except Exception as error:
        raise CheckpointError(f"{label} cannot be put on its base model {base!r}: {first_line(error)}") from error
    _check_complete(missing, label, f"of another model than {base!r}")
    return adapted


def _find_base(name: str, adapter: Path) -> str:
    above = [] if Path(name).expanduser().is_absolute() else [str(up / name) for up in adapter.resolve().parents]
    places = [name, *above] if name else []
    found = [place for place in map(model_folder, places) if (place / CONFIG).is_file()]
    return str(found[0]) if found else name


def _check_complete(missing_keys: Iterable[str], label: str, otherwise: str = "of another model") -> None:
    """Raises CheckpointError where weights of the model are not in the file."""
    missing = sorted(missing_keys)
    if missing:
        raise CheckpointError(
            f"{label} lacks {len(missing)} weights, the first of them {missing[0]}; it is truncated or {otherwise}"
        )


__all__ = [
    "ADAPTER_FOLDER",
    "DTYPES",
    "MODEL_FOLDER",
    "find_model",
    "has_model",
    "is_adapter",
    "load_adapter",
    "load_body",
    "load_checkpoint",
    "load_pretrained",
    "load_saved",
    "load_text_tokenizer",
    "model_folder",
]
