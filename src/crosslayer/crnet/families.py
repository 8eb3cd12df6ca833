"""The families that CR-Net lives in, and the configuration of one from transformers' own.

A further family is a configuration and a modelling file, and a line here (docs/new-family.md).
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, first_line, nearest_hint

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


def family_of(config: Any) -> str:
    """transformers' `model_type` of one of our configurations."""
    return next(name for name, (stem, _) in FAMILIES.items() if stem == config.model_type)


def field_names(cls: type[Any]) -> dict[str, str]:
    """Every name by which a field of a configuration class can be given -> the field's own."""
    own = {name for kind in cls.__mro__ for name in getattr(kind, "__annotations__", {})}
    names = {name: name for name in own}
    for one, other in cls.attribute_map.items():
        names |= {one: other} if other in own else {other: one}
    return names


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
    base_type, shape = _read(base)
    ours = {stem: name for name, (stem, _) in FAMILIES.items()}
    base_type = ours.get(base_type, base_type)
    if base_type not in FAMILIES:
        raise ConfigError(
            f"model_type={base_type!r} is not supported{nearest_hint(base_type, FAMILIES)}; supported are "
            f"{', '.join(FAMILIES)}. docs/new-family.md shows how to add one."
        )
    cls = config_class(base_type)
    known = field_names(cls)
    given = {**shape, **fields} if isinstance(base, Mapping) else fields
    if unknown := sorted(given.keys() - known):
        hint = nearest_hint(unknown[0], sorted(known))
        raise ConfigError(f"{cls.__name__} has no field {', '.join(unknown)}{hint}")
    fields = {known[name]: value for name, value in fields.items()}
    if known["num_hidden_layers"] in fields:
        shape.pop("layer_types", None)  # the pattern of the kinds of layers goes on, or ends earlier
    kept = {known[name]: value for name, value in shape.items() if name in known}
    return cls(**(kept | fields))


NOT_SHAPE = ("architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version")


def _read(base: Any) -> tuple[str, dict[str, Any]]:
    """(model_type, fields) of a base."""
    if isinstance(base, str | Path):
        from transformers import AutoConfig

        try:
            base = AutoConfig.from_pretrained(Path(base).expanduser())
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"no configuration of a model in {str(base)!r}: {first_line(error)}") from None
    fields = dict(base) if isinstance(base, Mapping) else base.get_text_config().to_dict()
    return str(fields.get("model_type")), {name: value for name, value in fields.items() if name not in NOT_SHAPE}


__all__ = ["FAMILIES", "config_class", "crnet_config", "field_names", "model_classes"]
