"""Peak FLOP/s by device name, and peak memory of the process."""

import numpy as np
import pytest
import torch

from megatron_vrl.observe.hardware import peak_bytes, peak_flops, reset_peak


@pytest.mark.parametrize(
    ("name", "bfloat16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5, 1979),
        ("NVIDIA H100 PCIe", 756.5, 1513),
        ("NVIDIA H100 NVL", 835.5, 1670.5),
        ("NVIDIA H200", 989.5, 1979),
        ("NVIDIA H200 NVL", 835.5, 1670.5),
        ("NVIDIA GH200 480GB", 989.5, 1979),
        ("NVIDIA A100-SXM4-80GB", 312, None),
        ("NVIDIA A100 80GB PCIe", 312, None),
        ("NVIDIA L40S", 362.05, 733),
        ("NVIDIA L4", 121, 242.5),
        ("NVIDIA B200", 2250, 4500),
        ("NVIDIA GB200", 2500, 5000),
        ("NVIDIA L40", None, None),
        ("NVIDIA H100", None, None),  # which of them?
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("cpu", None, None),
    ],
)
def test_dense_peaks(name: str, bfloat16: float | None, fp8: float | None) -> None:
    for dtype, tera in {"bfloat16": bfloat16, "fp8": fp8, "float32": None}.items():
        assert peak_flops(name, dtype) == (None if tera is None else pytest.approx(tera * 1e12))


def test_peak_memory_grows_with_allocations() -> None:
    device = torch.device("cpu")
    reset_peak(device)
    before = peak_bytes(device)
    held = np.ones(before // 8 + 10**6)  # more than was ever resident
    assert peak_bytes(device) > max(before, held.nbytes // 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_a_gpu_is_of_the_step() -> None:
    device = torch.device("cuda")
    held = torch.ones(10**7, device=device)
    del held
    reset_peak(device)
    before = torch.cuda.memory_allocated()  # what others hold, cuBLAS for one
    held = torch.ones(10**6, device=device)
    assert held.nbytes <= peak_bytes(device) - before < 10**7 * 4
