"""GPUs a layout can be planned for: memory and speeds, from NVIDIA's data sheets.

Bandwidths are per GPU and in one direction: data sheets print NVLink's two together. Memory is the
data sheet's GB taken as GiB, which is what the driver reports up to 1.5 % (the reserve of
`memory.py` covers that). Peaks are those of `observe/hardware.py`, dense. The network is that of
NVIDIA's own machine with this GPU (DGX: one 400 Gbit/s port per GPU, A100 200); a cloud may have
less.
"""

from dataclasses import dataclass

from megatron_vrl.errors import ConfigError
from megatron_vrl.observe.hardware import peak_flops

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    name: str
    driver_name: str  # as `observe/hardware.py` knows it
    memory: int  # bytes
    hbm: float  # bytes per second
    nvlink: float  # bytes per second to the GPUs of the same node
    network: float  # bytes per second to other nodes
    host: float  # bytes per second to host memory
    per_node: int = 8

    def peak(self, dtype: str) -> float | None:
        """FLOP/s in "bfloat16", "float32" or "fp8"; None: it has no such units.

        float32 is without tensor cores, as torch computes it: a sixteenth of bfloat16 (H100: 67 of
        989 TFLOP/s, A100: 19.5 of 312).
        """
        if dtype == "float32":
            return (peak_flops(self.driver_name, "bfloat16") or 0.0) / 16
        return peak_flops(self.driver_name, dtype)


def _gpu(
    name: str, driver_name: str, gib: int, hbm: float, nvlink: float, network: float, host: float
) -> Gpu:
    return Gpu(
        name=name,
        driver_name=driver_name,
        memory=gib * GIB,
        hbm=hbm * 1e12,
        nvlink=nvlink * 1e9,
        network=network * 1e9,
        host=host * 1e9,
    )


# GiB; TB/s of HBM; GB/s one way of NVLink, network and PCIe.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100", "NVIDIA A100-SXM4-80GB", 80, 2.039, 300, 25, 25),  # A100 data sheet; DGX A100
        _gpu("a100-40", "NVIDIA A100-SXM4-40GB", 40, 1.555, 300, 25, 25),  # same
        _gpu("h100", "NVIDIA H100 80GB HBM3", 80, 3.35, 450, 50, 50),  # H100 data sheet; DGX H100
        _gpu("h200", "NVIDIA H200", 141, 4.8, 450, 50, 50),  # H200 data sheet; DGX H200
        _gpu("b200", "NVIDIA B200", 180, 8.0, 900, 50, 50),  # DGX B200 data sheet, an eighth
        _gpu("l40s", "NVIDIA L40S", 48, 0.864, 25, 25, 25),  # L40S data sheet: PCIe alone
    )
}


def find_gpu(name: str) -> Gpu:
    """Raises ConfigError naming those that are known."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name} is not in the table: choose one of {', '.join(GPUS)}.")
    return GPUS[name]
