"""What training costs, by arithmetic from a configuration: parameters, floating-point operations, bytes, plans.

Nothing here imports torch or transformers, so that a plan is made at once and on any machine.
"""

from .adapters import lor2c_parameters, lora_parameters
from .communication import Collective, Links, count_collectives
from .devices import DEVICES, Device, find_device, peak_flops
from .flops import Operations, count_operations, training_flops_per_token
from .kept import saved_bytes
from .memory import estimate_memory
from .methods import TRAININGS, Adapter, Method, method_of
from .parameters import count_adapter_parameters, count_parameters, dense_counterpart
from .rates import Rates, device_and_rates, read_rates, sheet_rates
from .roofline import Operation, StepTime, predict_step
from .shapes import SIZES, Layer, Linear, Shape, named_shape
from .steps import PRECISIONS, Precision, Sharding, Step

__all__ = [
    "DEVICES",
    "PRECISIONS",
    "SIZES",
    "TRAININGS",
    "Adapter",
    "Collective",
    "Device",
    "Layer",
    "Linear",
    "Links",
    "Method",
    "Operation",
    "Operations",
    "Precision",
    "Rates",
    "Shape",
    "Sharding",
    "Step",
    "StepTime",
    "count_adapter_parameters",
    "count_collectives",
    "count_operations",
    "count_parameters",
    "dense_counterpart",
    "device_and_rates",
    "estimate_memory",
    "find_device",
    "lor2c_parameters",
    "lora_parameters",
    "method_of",
    "named_shape",
    "peak_flops",
    "predict_step",
    "read_rates",
    "saved_bytes",
    "sheet_rates",
    "training_flops_per_token",
]
