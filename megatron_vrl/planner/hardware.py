"""GPUs to plan for: memory and speeds, from NVIDIA's data sheets or measured.

Bandwidths are per GPU and one direction; data sheets print the sum of both directions for NVLink.
Memory is the data sheet's GB taken as GiB, which the driver reports within 1.5 % (the reserve of
`memory.py` covers it). Peaks are those of `observe/hardware.py`, dense. Network speed is that of
NVIDIA's own machine with this GPU (DGX: one 400 Gbit/s port per GPU, A100 200 Gbit/s); a cloud may
have less.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from megatron_vrl.config.base import SECTION, Positive
from megatron_vrl.config.loader import validate
from megatron_vrl.errors import ConfigError
from megatron_vrl.observe.hardware import peak_flops

GIB = 2**30
LINK_FRACTION = 0.7  # fraction of the link's speed that a collective reaches; an assumption
HBM_FRACTION = 0.8  # fraction of HBM speed when a matrix is read once; an assumption
Speed = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Memory and speeds of one GPU and its links."""

    name: str
    driver_name: str  # name in `observe/hardware.py`
    memory: int  # bytes
    hbm: float  # bytes per second
    nvlink: float  # bytes per second to the GPUs of the same node
    network: float  # bytes per second to other nodes
    host: float  # bytes per second to host memory
    per_node: int = 8
    link_fraction: float = LINK_FRACTION
    hbm_fraction: float = HBM_FRACTION
    latency: float = 0.0  # seconds of an empty message; x log2(ranks) for a collective
    flops: Mapping[str, float] = field(default_factory=dict)  # measured FLOP/s by dtype, or {}

    def peak(self, dtype: str) -> float | None:
        """Return FLOP/s for "bfloat16", "float32" or "fp8"; None if the GPU has no such units.

        float32 is without tensor cores, as torch computes it: a sixteenth of bfloat16 (H100: 67 of
        989 TFLOP/s, A100: 19.5 of 312 TFLOP/s).
        """
        if self.flops:
            return self.flops.get(dtype)
        if dtype == "float32":
            return (peak_flops(self.driver_name, "bfloat16") or 0.0) / 16
        return peak_flops(self.driver_name, dtype)


def _gpu(
    name: str, driver_name: str, gib: int, hbm: float, nvlink: float, network: float, host: float
) -> Gpu:
    """Return a Gpu from data-sheet units: GiB, TB/s of HBM, GB/s of the links."""
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


class MeasuredMachine(BaseModel):
    """Measured rates of a machine: FLOP/s, bytes, bytes per second, seconds."""

    model_config = SECTION

    name: str
    flops: dict[str, Speed]
    """FLOP/s of a matrix product on one rank while all ranks compute, by dtype."""
    memory: Positive
    """Bytes that one rank may use."""
    hbm: Speed
    """Bytes per second that one rank reads and writes."""
    link: Speed
    """Bytes per second that a rank sends in a large all-reduce within a node."""
    network: Speed
    """Bytes per second that a rank sends in a large all-reduce between nodes."""
    host: Speed
    """Bytes per second to host memory."""
    latency: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Seconds of a small all-reduce, divided by log2 of its ranks."""
    per_node: Positive
    """Ranks per node."""

    def as_gpu(self) -> Gpu:
        """Return the machine as a Gpu, whose rates are used without reduction."""
        return Gpu(
            name=self.name,
            driver_name=self.name,
            memory=self.memory,
            hbm=self.hbm,
            nvlink=self.link,
            network=self.network,
            host=self.host,
            per_node=self.per_node,
            link_fraction=1.0,
            hbm_fraction=1.0,
            latency=self.latency,
            flops=self.flops,
        )


def read_machine(path: Path) -> Gpu:
    """Return the Gpu of a JSON file with the keys of MeasuredMachine. Raise ConfigError."""
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"Cannot read the machine {path}: {error.strerror}; tools/scaling_study.py writes one."
        ) from None
    except ValueError as error:
        raise ConfigError(f"The machine {path} is not JSON: {error}; measure it again.") from None
    known = MeasuredMachine.model_fields
    if isinstance(tree, dict):  # other keys say when and how it was measured
        tree = {name: value for name, value in tree.items() if name in known}
    return validate(MeasuredMachine, tree, str(path), "measure it again.").as_gpu()


def find_gpu(name: str) -> Gpu:
    """Return the GPU of the table, or the measured machine of a .json file.

    Raise ConfigError, naming the known GPUs.
    """
    if name.endswith(".json"):
        return read_machine(Path(name))
    if name not in GPUS:
        raise ConfigError(
            f"--gpu {name} is not in the table: choose one of {', '.join(GPUS)}, or give the .json "
            "of a measured machine."
        )
    return GPUS[name]
