"""Dense peak throughput of accelerators, for model FLOPs utilisation."""

_PEAK_FLOPS_BF16 = {
    # Dense bf16 tensor-core peaks from the vendor's data sheets (half of the figure "with sparsity").
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations per second of a device by the name CUDA gives it; None when it is not in the table."""
    for name, peak in _PEAK_FLOPS_BF16.items():
        if all(word in device_name.split() or word in device_name for word in name.split()):
            return peak
    return None
