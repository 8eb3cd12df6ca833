"""What a model costs, by arithmetic from its configuration: parameters, floating-point operations, bytes."""

from .adapters import lor2c_parameters, lora_parameters
from .cost import (
    activation_elements_per_token,
    count_parameters,
    dense_counterpart,
    estimate_training_memory,
    training_flops_per_token,
)
from .devices import peak_flops

__all__ = [
    "activation_elements_per_token",
    "count_parameters",
    "dense_counterpart",
    "estimate_training_memory",
    "lor2c_parameters",
    "lora_parameters",
    "peak_flops",
    "training_flops_per_token",
]
