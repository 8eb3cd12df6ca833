"""Makes the models of all families known to transformers' Auto classes; crosslayer/__init__.py says when."""

from .families import FAMILIES, config_class, model_classes


def register_configs() -> None:
    """Every family's configuration with AutoConfig."""
    for base_type in FAMILIES:
        register_config(base_type)


def register_models() -> None:
    """Every family's models, and its configuration, with the Auto classes."""
    for base_type in FAMILIES:
        register(base_type)


def register_config(base_type: str) -> None:
    """The configuration of the family of transformers' `model_type`."""
    from transformers import AutoConfig

    config = config_class(base_type)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    config.register_for_auto_class()


def register(base_type: str) -> None:
    """The family of transformers' `model_type`: its configuration and its models."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    register_config(base_type)
    config = config_class(base_type)
    for auto_name, model in model_classes(base_type).items():
        getattr(transformers, auto_name).register(config, model, exist_ok=True)
        model.register_for_auto_class(auto_name)
        if auto_name == "AutoModelForCausalLM":
            # By this table of names the Trainer knows whose labels it has to shift (label_smoothing_factor).
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = model.__name__


__all__ = ["register", "register_config", "register_configs", "register_models"]
