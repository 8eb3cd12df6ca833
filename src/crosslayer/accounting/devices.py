"""Accelerators: dense peak throughput, memory and its bandwidth, for utilisation and plans."""

from dataclasses import dataclass

from ..errors import ConfigError, nearest_hint


@dataclass(frozen=True)
class Device:
    """`flops`: dense bf16 operations per second; `memory`: bytes; `bandwidth`: bytes per second of that memory.

    `link`, `network`: bytes per second that it sends, in one direction, to others of its node and to other nodes.
    `float32_flops`: float32 operations per second without tensor cores. TF32's are half of bf16's in every data sheet.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    float32_flops: float


ETHERNET = 100e9 / 8 / 8
"""Bytes per second of one 100 Gb/s card, shared by the eight devices of a node: our choice where none is usual."""


DEVICES = {
    # Dense bf16 tensor-core peaks from the vendor's data sheets (half of the figure "with sparsity"); the more special
    # name first, since CUDA's names are searched for its words. Links: half of what the sheets give for both directions
    # together, NVLink where all devices of a node have it, else PCIe x16 (gen 5: 128 GB/s, gen 4: 64 GB/s). Network:
    # one card per device, 400 Gb/s in DGX H100, H200 and B200, 200 Gb/s in DGX A100.
    "b200": Device("B200", 2250e12, 180e9, 8.0e12, 900e9, 50e9, 75e12),
    "h200": Device("H200", 989e12, 141e9, 4.8e12, 450e9, 50e9, 67e12),
    "h100-pcie": Device("H100 PCIe", 756e12, 80e9, 2.0e12, 64e9, ETHERNET, 51e12),
    "h100-nvl": Device("H100 NVL", 835e12, 94e9, 3.9e12, 64e9, ETHERNET, 60e12),
    "h100": Device("H100", 989e12, 80e9, 3.35e12, 450e9, 50e9, 67e12),
    "a100": Device("A100", 312e12, 80e9, 2.0e12, 300e9, 25e9, 19.5e12),
    "l40s": Device("L40S", 362e12, 48e9, 0.864e12, 32e9, ETHERNET, 91.6e12),
    "l4": Device("L4", 121e12, 24e9, 0.3e12, 32e9, ETHERNET, 30.3e12),
    "a10": Device("A10", 125e12, 24e9, 0.6e12, 32e9, ETHERNET, 31.2e12),
    "rtx-4090": Device("RTX 4090", 165e12, 24e9, 1.008e12, 32e9, ETHERNET, 82.6e12),
    "rtx-3090": Device("RTX 3090", 71e12, 24e9, 0.936e12, 32e9, ETHERNET, 35.6e12),
}


def find_device(name: str) -> Device:
    """A device by its short name, h100, or the name that CUDA gives it. Raises ConfigError for an unknown one."""
    key = name.lower().replace(" ", "-").replace("_", "-")
    device = DEVICES.get(key) or _by_cuda_name(name)
    if device is None:
        hint = nearest_hint(key, DEVICES)
        raise ConfigError(
            f"device={name!r} is unknown{hint}; allowed: {', '.join(DEVICES)}, or a file that "
            "`crosslayer bench device` wrote"
        )
    return device


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations per second of a device by the name CUDA gives it; None when it is not in the table."""
    device = _by_cuda_name(device_name)
    return None if device is None else device.flops


def _by_cuda_name(device_name: str) -> Device | None:
    for device in DEVICES.values():
        if all(word in device_name.split() or word in device_name for word in device.name.split()):
            return device
    return None


__all__ = ["DEVICES", "Device", "find_device", "peak_flops"]
