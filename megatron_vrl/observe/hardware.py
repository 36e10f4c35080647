"""What the hardware could do, and the most memory that a step took.

Peaks are dense, without sparsity, from NVIDIA's data sheets, which print most of them with
sparsity: twice these. A device that is not listed has none, and then no MFU is reported; so has a
slice of one (MIG), and a CPU.
"""

import re

import torch

from megatron_vrl.observe.clock import peak_rss_bytes

# Name as the driver says it -> dense TFLOP/s in bfloat16, in FP8 (None: no such units); the first
# that matches.
PEAKS: tuple[tuple[str, float, float | None], ...] = (
    (r"\bGB200\b", 2500.0, 5000.0),  # GB200 NVL72 data sheet, of one of its GPUs
    (r"\bB[23]00\b", 2250.0, 4500.0),  # HGX B200, HGX B300 data sheets, an eighth
    (r"\bGH200\b", 989.5, 1979.0),  # GH200 data sheet
    (r"\bH[12]00 NVL\b", 835.5, 1670.5),  # H100, H200 data sheets
    (r"\bH100 PCIe\b", 756.5, 1513.0),  # H100 data sheet
    (r"\bH100\b.*\bHBM3\b|\bH100 SXM|\bH200\b", 989.5, 1979.0),  # H100, H200 data sheets: SXM
    (r"\bA100\b", 312.0, None),  # A100 data sheet, SXM and PCIe alike
    (r"\bL40S\b", 362.05, 733.0),  # L40S data sheet
    (r"\bL4\b", 121.0, 242.5),  # L4 data sheet
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak in FLOP/s of a device by its name, in "bfloat16" or "fp8"; None if not known."""
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, bfloat16, fp8 in PEAKS:
        if re.search(pattern, device_name):
            peak = {"bfloat16": bfloat16, "fp8": fp8}.get(dtype)
            return None if peak is None else peak * 1e12
    return None


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: on a GPU allocated by torch since `forget_peak`, else resident in
    this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_rss_bytes()


def forget_peak(device: torch.device) -> None:
    """A step begins; the kernel keeps a process's own peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
