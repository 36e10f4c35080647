"""Fake GPU for a CPU build of torch, so that backward passes of fake CUDA tensors run.

`install` compiles `fake_gpu.cpp` (once for each torch version, two seconds) and loads it. It must
run before torch is imported, because torch looks for a GPU once. Such a process is for rehearsals
only.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from megatron_vrl.errors import ConfigError

SOURCE = Path(__file__).with_suffix(".cpp")


def install() -> None:
    """Load the fake GPU. A CUDA build of torch needs none.

    Raise ConfigError without a C++ compiler, or if torch is already imported.
    """
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise ConfigError("torch is not installed: run launch/install.sh.")
    root = Path(spec.origin).parent
    if (root / "lib" / "libtorch_cuda.so").exists():
        return
    if "torch" in sys.modules:
        raise ConfigError("The fake GPU must be loaded before torch: run tools/rehearse.py alone.")
    ctypes.CDLL(str(root / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(_library(root)))


def _library(root: Path) -> Path:
    """Return the compiled library for this version of torch and of the source."""
    key = sha256(SOURCE.read_bytes() + version("torch").encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_vrl"
    library = cache / f"fake_gpu-{key}.so"
    if library.exists():
        return library
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise ConfigError("The rehearsal needs a C++ compiler: install g++, or set CXX to one.")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        built = Path(folder) / library.name
        includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
        links = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
        flags = ["-std=c++20", "-shared", "-fPIC", "-O1"]
        command = [compiler, *flags, *includes, str(SOURCE), "-o", str(built), *links]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            lines = [line for line in run.stderr.splitlines() if "error" in line]
            first = (lines or ["no message"])[0]
            raise ConfigError(f"{compiler} cannot compile {SOURCE.name}: {first}.")
        built.replace(library)
    return library
