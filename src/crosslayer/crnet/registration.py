"""Makes the models known to transformers' Auto classes, and their files part of the checkpoints that they write.

Importing this is enough. `import crosslayer` does so, and so does the first use of a class of `crosslayer.crnet`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_crnet import CRNetConfig
from .modeling_crnet import CRNetForCausalLM, CRNetForSequenceClassification, CRNetModel

FAMILIES = (
    # configuration, and the classes that the Auto classes of AUTO_CLASSES give for it
    (CRNetConfig, (CRNetModel, CRNetForCausalLM, CRNetForSequenceClassification)),
)
AUTO_CLASSES = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)

for _config_class, _model_classes in FAMILIES:
    AutoConfig.register(_config_class.model_type, _config_class)
    _config_class.register_for_auto_class()
    for _auto_class, _model_class in zip(AUTO_CLASSES, _model_classes, strict=True):
        _auto_class.register(_config_class, _model_class)
        _model_class.register_for_auto_class(_auto_class.__name__)

__all__ = ["AUTO_CLASSES", "FAMILIES"]
