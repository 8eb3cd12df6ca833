"""Weights of linear layers in 8 or 4 bits, by torchao through transformers' quantizers; activations stay as they are.

A and B are `nn.Linear`, so transformers' own rule holds for CR-Net as for any model: every linear but the head is
quantized; embeddings, norms, biases and beta are not.
"""

from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GROUPS = (128, 64, 32)
"""Inputs that share a scale in int4, the largest first: what torchao's kernels take."""

CPU_OUTPUTS = 16
"""int4 on a CPU packs so many outputs together."""


def quantized_loading(name: str | None, config: "PreTrainedConfig", device: str = "cpu") -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantize the weights of a model while they are loaded.

    Args:
        name: "int8" (one scale per output), "int4" (scale and zero point per group of inputs, the largest of `GROUPS`
            that divides the widths of all linears; the rest is bfloat16, which torchao's kernels want), or None.
        config: of the causal language model to load.
        device: where it is to compute: int4 is packed for it.

    Returns {} for None. Raises ConfigError for another name, without torchao, for a model that is quantized already,
    that has no linears or whose widths int4 cannot take.
    """
    if name is None:
        return {}
    if name not in ("int8", "int4"):
        raise ConfigError(f"quantize={name!r}; allowed: int8, int4")
    from transformers.utils import is_torchao_available

    if not is_torchao_available():
        raise ConfigError(f"quantize={name!r} needs torchao; pip install 'crosslayer[quantize]'")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"quantize={name!r}: this checkpoint is quantized already; leave the option out")
    import torch
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    shapes = _shapes(config)
    if not shapes:
        raise ConfigError(f"quantize={name!r}: a {config.model_type} model has no nn.Linear beside its head")
    # With `set_inductor_config` torchao would change how the whole process compiles.
    if name == "int8":
        scheme = Int8WeightOnlyConfig(set_inductor_config=False)
        return {"quantization_config": TorchAoConfig(scheme), "device_map": device}
    scheme = _int4(_group(shapes, is_cpu := torch.device(device).type == "cpu"), is_cpu)
    return {"quantization_config": TorchAoConfig(scheme), "device_map": device, "dtype": torch.bfloat16}


def _shapes(config: "PreTrainedConfig") -> dict[str, tuple[int, int]]:
    """Name of every linear that transformers quantizes -> (inputs, outputs)."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kept = get_keys_to_not_convert(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {
        name: (linear.in_features, linear.out_features)
        for name, linear in linears.items()
        if should_convert_module(f"{name}.weight", kept)
    }


def _group(shapes: dict[str, tuple[int, int]], is_cpu: bool) -> int:
    """The largest group that divides the inputs of all. Raises ConfigError where none does."""
    for name, (inputs, _) in shapes.items():
        if inputs % GROUPS[-1]:
            what = f"rank {inputs}" if name.endswith(".B") else f"{inputs} inputs"
            raise ConfigError(
                f"quantize='int4' takes multiples of {GROUPS[-1]} inputs; {name} has {what}; use int8, or another width"
            )
    for name, (_, outputs) in shapes.items():
        if is_cpu and outputs % CPU_OUTPUTS:
            raise ConfigError(
                f"quantize='int4' on a CPU takes multiples of {CPU_OUTPUTS} outputs; {name} has {outputs}; use int8"
            )
    return next(group for group in GROUPS if all(inputs % group == 0 for inputs, _ in shapes.values()))


def _int4(group: int, is_cpu: bool) -> Any:
    """torchao's scheme with the kernels that torch itself has, here and on CUDA."""
    if is_cpu:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False)
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)


__all__ = ["GROUPS", "quantized_loading"]
