"""Peak FLOP/s of GPUs, and peak memory of a step.

Peaks are dense. NVIDIA's data sheets print most peaks with sparsity, which are twice as high. For
an unknown device, a MIG slice or a CPU there is no peak, and MFU is not reported.
"""

import re

import torch

from megatron_vrl.observe.clock import peak_rss_bytes

# (pattern of the driver's device name, dense bfloat16 TFLOP/s, dense FP8 TFLOP/s or None without
# FP8 units). The first match counts.
PEAKS: tuple[tuple[str, float, float | None], ...] = (
    (r"\bGB200\b", 2500.0, 5000.0),  # GB200 NVL72 data sheet, per GPU
    (r"\bB[23]00\b", 2250.0, 4500.0),  # HGX B200, HGX B300 data sheets, per GPU
    (r"\bGH200\b", 989.5, 1979.0),  # GH200 data sheet
    (r"\bH[12]00 NVL\b", 835.5, 1670.5),  # H100, H200 data sheets
    (r"\bH100 PCIe\b", 756.5, 1513.0),  # H100 data sheet
    (r"\bH100\b.*\bHBM3\b|\bH100 SXM|\bH200\b", 989.5, 1979.0),  # H100, H200 data sheets: SXM
    (r"\bA100\b", 312.0, None),  # A100 data sheet, SXM and PCIe alike
    (r"\bL40S\b", 362.05, 733.0),  # L40S data sheet
    (r"\bL4\b", 121.0, 242.5),  # L4 data sheet
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the dense peak in FLOP/s of a device for "bfloat16" or "fp8"; None if unknown."""
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, bfloat16, fp8 in PEAKS:
        if re.search(pattern, device_name):
            peak = {"bfloat16": bfloat16, "fp8": fp8}.get(dtype)
            return None if peak is None else peak * 1e12
    return None


def peak_bytes(device: torch.device) -> int:
    """Return peak memory: on a GPU since `reset_peak`, else resident since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_rss_bytes()


def reset_peak(device: torch.device) -> None:
    """Reset the GPU's peak memory counter at the start of a step. A CPU process has no reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
