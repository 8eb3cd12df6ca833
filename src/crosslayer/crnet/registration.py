"""Makes the models of all families known to transformers' Auto classes, when imported."""

import transformers

from .families import FAMILIES, config_class, model_classes


def register(base_type: str) -> None:
    """The family of transformers' `model_type`."""
    config = config_class(base_type)
    transformers.AutoConfig.register(config.model_type, config)
    config.register_for_auto_class()
    for auto_name, model in model_classes(base_type).items():
        getattr(transformers, auto_name).register(config, model)
        model.register_for_auto_class(auto_name)


for _base_type in FAMILIES:
    register(_base_type)
