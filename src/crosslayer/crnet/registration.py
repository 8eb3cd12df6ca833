"""Makes the models of all families known to transformers' Auto classes, when imported."""

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .families import FAMILIES, config_class, model_classes

for _base_type in FAMILIES:
    _config = config_class(_base_type)
    transformers.AutoConfig.register(_config.model_type, _config)
    _config.register_for_auto_class()
    for _auto_name, _model in model_classes(_base_type).items():
        getattr(transformers, _auto_name).register(_config, _model)
        _model.register_for_auto_class(_auto_name)
    # By this table of names the Trainer knows whose labels it has to shift (label_smoothing_factor).
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_config.model_type] = model_classes(_base_type)["AutoModelForCausalLM"].__name__
