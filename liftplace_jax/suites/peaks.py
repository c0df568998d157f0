"""What a device can do at most."""

PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12, "TPU v5e": 197e12,
    "TPU v5": 459e12, "TPU v5p": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
}  # fmt: skip
"""JAX's name of a device -> dense bfloat16 FLOP/s of one, as its maker states."""


def peak_fraction(flops_per_second: float, device_kind: str, devices: int) -> float | None:
    """Share of the bfloat16 peak of so many devices; None where it is not known."""
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else flops_per_second / (peak * devices)
