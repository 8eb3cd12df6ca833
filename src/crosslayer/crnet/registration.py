"""Makes the models of all families known to transformers' Auto classes, when imported."""

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .families import FAMILIES, config_class, model_classes


def register(base_type: str) -> None:
    """The family of transformers' `model_type`."""
    config = config_class(base_type)
    transformers.AutoConfig.register(config.model_type, config)
    config.register_for_auto_class()
    for auto_name, model in model_classes(base_type).items():
        getattr(transformers, auto_name).register(config, model)
        model.register_for_auto_class(auto_name)
        if auto_name == "AutoModelForCausalLM":
            # By this table of names the Trainer knows whose labels it has to shift (label_smoothing_factor).
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = model.__name__


for _base_type in FAMILIES:
    register(_base_type)
