"""The families that CR-Net lives in, and the configuration of one from transformers' own.

A further family is a configuration and a modelling file, and a line here (docs/new-family.md).
"""

import difflib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError

FAMILIES = {
    # transformers' model_type: (our model_type, prefix of our classes)
    "llama": ("crnet", "CRNet"),
    "mistral": ("crnet_mistral", "CRNetMistral"),
    "qwen2": ("crnet_qwen2", "CRNetQwen2"),
    "qwen3": ("crnet_qwen3", "CRNetQwen3"),
    "gemma3_text": ("crnet_gemma3", "CRNetGemma3"),
    "gpt2": ("crnet_gpt2", "CRNetGPT2"),
    "qwen3_moe": ("crnet_qwen3_moe", "CRNetQwen3Moe"),
    "deepseek_v3": ("crnet_deepseek_v3", "CRNetDeepseekV3"),
    "cohere": ("crnet_cohere", "CRNetCohere"),
}

HEADS = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
}


def config_class(base_type: str) -> type[Any]:
    """Our configuration class for transformers' `model_type`."""
    stem, prefix = FAMILIES[base_type]
    return getattr(import_module(f"{__package__}.configuration_{stem}"), f"{prefix}Config")


def model_classes(base_type: str) -> dict[str, type[Any]]:
    """Auto class -> our class, for transformers' `model_type`."""
    stem, prefix = FAMILIES[base_type]
    module = import_module(f"{__package__}.modeling_{stem}")
    suffixes = HEADS | ({"AutoModelForCausalLM": "LMHeadModel"} if base_type == "gpt2" else {})
    return {auto: getattr(module, prefix + suffix) for auto, suffix in suffixes.items()}


def crnet_config(base: Any, **fields: Any) -> Any:
    """The CR-Net configuration with a base model's shape.

    Args:
        base: a configuration of transformers (or its fields with `model_type`), a folder that holds one, or a name on
            the hub. The language part of a model for text and images counts.
        fields: what differs: CR-Net's own fields (`rank`, `factorization`, `recompute`, ...) or the family's.

    Raises ConfigError for a family that is not supported, naming those that are, and for a field that the family does
    not have; CheckpointError for a folder or name that cannot be read; what the configuration itself raises for values
    that do not fit.
    """
    config = _read(base)
    base_type = getattr(config, "model_type", None)
    ours = {stem: name for name, (stem, _) in FAMILIES.items()}
    base_type = ours.get(base_type, base_type)
    if base_type not in FAMILIES:
        near = difflib.get_close_matches(str(base_type), FAMILIES, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ConfigError(
            f"model_type={base_type!r} is not supported{hint}; supported are {', '.join(FAMILIES)}. "
            "docs/new-family.md shows how to add one."
        )
    cls = config_class(base_type)
    known = {name for kind in cls.__mro__ for name in getattr(kind, "__annotations__", {})} | set(cls.attribute_map)
    if unknown := sorted(fields.keys() - known):
        near = difflib.get_close_matches(unknown[0], sorted(known), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{cls.__name__} has no field {', '.join(unknown)}{hint}")
    shape = {name: value for name, value in config.to_dict().items() if name in known}
    for name in ("architectures", "auto_map", "torch_dtype", "dtype", "transformers_version"):
        shape.pop(name, None)
    layers = fields.get("num_hidden_layers", fields.get("n_layer"))
    if layers is not None and "layer_types" not in fields:  # the pattern of the kinds goes on, or ends earlier
        shape.pop("layer_types", None)
    return cls(**(shape | fields))


def _read(base: Any) -> Any:
    if isinstance(base, str | Path):
        from transformers import AutoConfig

        try:
            base = AutoConfig.from_pretrained(base)
        except (OSError, ValueError, KeyError) as error:
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CheckpointError(f"no configuration of a model in {str(base)!r}: {first}") from None
    if isinstance(base, Mapping):
        from transformers import AutoConfig

        fields = dict(base)
        base_type = fields.pop("model_type", None)
        if base_type is None:
            raise ConfigError(f"the base configuration has no model_type; give one of {', '.join(FAMILIES)}")
        try:
            base = AutoConfig.for_model(base_type, **fields)
        except ValueError:
            raise ConfigError(
                f"model_type={base_type!r} is not supported; supported are {', '.join(FAMILIES)}. "
                "docs/new-family.md shows how to add one."
            ) from None
    return base.get_text_config()


__all__ = ["FAMILIES", "config_class", "crnet_config", "model_classes"]
