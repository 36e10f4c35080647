"""The scripts and locks of launch/: what a newcomer's machine meets before any Python of ours."""

import os
import re
import shutil
import socket
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
LINE = re.compile(r"(?P<name>[a-z0-9.-]+)==(?P<version>\S+) --hash=sha256:[0-9a-f]{64}")


def locked(name: str) -> dict[str, str]:
    """Package -> version; fails on any line that is neither a comment nor pinned with a hash."""
    lines = (ROOT / "launch" / "locks" / name).read_text().splitlines()
    matches = [LINE.fullmatch(line) for line in lines if not line.startswith("#")]
    assert all(matches), f"{name} holds a line without an exact version and hash"
    return {match["name"]: match["version"] for match in matches if match}


def run(
    script: Path, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *arguments],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
    )


def fake_bin(folder: Path, *tools: str) -> Path:
    """A folder for PATH that holds nothing but `tools` of this machine."""
    folder.mkdir()
    for tool in tools:
        found = shutil.which(tool)
        assert found, f"this test needs {tool}"
        (folder / tool).symlink_to(found)
    return folder


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_stops_at_errors(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    if script.name not in ("env.sh", "python.sh"):  # sourced: they take the caller's settings
        assert os.access(script, os.X_OK)
        assert "\nset -euo pipefail\n" in script.read_text()


def test_locks_leave_out_what_only_a_gpu_can_load() -> None:
    names = set(locked("cpu.txt")) | set(locked("test.txt"))
    assert not names & {"torchaudio", "torchcodec", "triton", "apex"}
    assert {name for name in names if name.startswith(("nvidia-", "cuda"))} == {
        "nvidia-dali-cuda130"
    }


def test_locks_name_no_host_and_no_folder() -> None:
    for lock in (ROOT / "launch" / "locks").iterdir():
        assert not re.search(r"://|@ |-index|--find-links", lock.read_text())


def test_locks_satisfy_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    cpu, test = locked("cpu.txt"), locked("test.txt")
    assert not cpu.keys() & test.keys()
    for text in [*project["dependencies"], *extras["cpu"], *extras["test"]]:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"python_version": "3.11"}):
            continue
        version = (cpu | test)[canonicalize_name(wanted.name)]
        assert version in wanted.specifier, f"{text} is locked to {version}"


def test_the_gpu_lock_satisfies_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    gpu = locked("gpu.txt")
    for text in [*project["dependencies"], *extras["gpu"], *extras["test"]]:
        wanted = Requirement(text)
        version = gpu[canonicalize_name(wanted.name)]
        assert version in wanted.specifier, f"{text} is locked to {version}"
    newest = locked("newest.txt")  # the GPU's versions of what trains without vLLM and DALI
    assert newest.items() <= gpu.items() and {"torch", "megatron-core", "triton"} <= newest.keys()
    assert "nvidia-cudnn-cu13" in gpu and not {name for name in gpu if name.endswith("-cu12")} - {
        "nvidia-cutlass-dsl-libs-cu12"  # a part of vLLM's kernel library for both releases
    }


@pytest.mark.parametrize(
    ("python", "driver", "sentence"),
    [
        ("3.11", "580.65.06", ".venv has Python 3.11.7, the lock is for Python 3.12. Remove .venv"),
        ("3.12", "570.124.06", "the NVIDIA driver is 570.124.06, CUDA 13 needs 580 or newer."),
    ],
)
def test_a_gpu_install_refuses_what_cannot_run(
    tmp_path: Path, python: str, driver: str, sentence: str
) -> None:
    shutil.copytree(ROOT / "launch", tmp_path / "tree" / "launch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "tree")
    tools = ("bash", "cat", "sha256sum", "dirname", "uname", "df", "tail", "tr", "head", "true")
    path = fake_bin(tmp_path / "bin", *tools)
    venv = tmp_path / "tree" / ".venv" / "bin"
    venv.mkdir(parents=True)
    programs = {
        path / "g++": "",
        path / "nvidia-smi": f"echo {driver}",
        venv / "pip": "",
        venv / "python": f'[[ $1 != --version ]] || echo "Python {python}.7"\n'
        f'[[ $1 != -c ]] || [[ "$2" == *{python}* ]]',
    }
    for program, body in programs.items():
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    done = run(tmp_path / "tree" / "launch" / "install.sh", "gpu", env={"PATH": str(path)})
    assert done.returncode == 2 and sentence in done.stderr


def test_install_refuses_another_python(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "launch", tmp_path / "tree" / "launch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "tree")
    path = fake_bin(tmp_path / "bin", "bash", "cat", "sha256sum", "dirname")
    (path / "python3").write_text('#!/bin/bash\necho "Python 3.9.1"; [[ $1 == --version ]]\n')
    (path / "python3").chmod(0o755)
    done = run(tmp_path / "tree" / "launch" / "install.sh", env={"PATH": str(path)})
    assert done.returncode == 2
    assert "no Python 3.11 found (python3 is 'Python 3.9.1')" in done.stderr
    assert "install it" in done.stderr
    assert not (tmp_path / "tree" / ".venv").exists()


def test_install_refuses_an_unknown_argument() -> None:
    done = run(ROOT / "launch" / "install.sh", "tpu")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "'tpu'" in done.stderr


def test_train_names_a_busy_port_in_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run(ROOT / "launch" / "train.sh", env={"MASTER_PORT": port})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and f"port {port} is taken" in done.stderr


def test_train_asks_for_the_address_of_the_first_node() -> None:
    done = run(ROOT / "launch" / "train.sh", env={"NNODES": "2", "MASTER_PORT": ""})
    assert done.returncode == 2
    assert "MASTER_ADDR" in done.stderr and "NNODES=2" in done.stderr


def test_train_takes_the_active_python_and_does_not_hide_a_gpu_environment(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "launch", tmp_path / "tree" / "launch")
    venv = tmp_path / "tree" / ".venv"
    path = fake_bin(tmp_path / "bin", "bash", "dirname", "grep", "wc")
    for folder in (venv / "bin", tmp_path / "active" / "bin", path):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "python3").write_text(f"#!/bin/bash\necho {folder}/python3 >&2\n")
        (folder / "python3").chmod(0o755)
    (path / "nvidia-smi").write_text("#!/bin/bash\necho 'GPU 0: one'\n")
    (path / "nvidia-smi").chmod(0o755)
    bare = {"PATH": str(path), "VIRTUAL_ENV": "", "CONDA_PREFIX": "", "PYTHON": ""}
    bare |= {"PYTHON_EXEC": "", "MASTER_PORT": ""}

    def used(**chosen: str) -> str:
        done = run(tmp_path / "tree" / "launch" / "train.sh", env={**bare, **chosen})
        assert done.returncode == 0, done.stderr
        (word,) = set(done.stderr.splitlines())
        return word

    assert used() == f"{venv}/bin/python3"
    assert used(VIRTUAL_ENV=str(tmp_path / "active")) == f"{tmp_path}/active/bin/python3"
    assert used(CONDA_PREFIX=str(tmp_path / "active")) == f"{tmp_path}/active/bin/python3"
    assert used(PYTHON=str(path / "python3")) == f"{path}/python3"
    (venv / "lib/python3.11/site-packages/torch-2.13.0+cpu.dist-info").mkdir(parents=True)
    done = run(tmp_path / "tree" / "launch" / "train.sh", env=bare)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "has a GPU and" in done.stderr and "PYTHON=" in done.stderr
    assert used(VIRTUAL_ENV=str(tmp_path / "active")) == f"{tmp_path}/active/bin/python3"
    (path / "nvidia-smi").write_text("#!/bin/bash\nexit 9\n")
    assert used() == f"{venv}/bin/python3"
    (venv / "bin" / "python3").unlink()
    assert used() == f"{path}/python3"


@pytest.mark.parametrize(("visible", "ranks"), [("0", 1), ("2,5,7", 3), (None, 8)])
def test_train_starts_one_rank_on_each_visible_gpu(
    tmp_path: Path, visible: str | None, ranks: int
) -> None:
    """The machine has 8 GPUs. Its torch is a script that counts CUDA_VISIBLE_DEVICES."""
    path = fake_bin(tmp_path / "bin", "bash", "dirname", "grep", "wc")
    python = path / "python3"
    python.write_text(
        "#!/bin/bash\n"
        'case "$2" in *device_count*)\n'
        '    IFS=, read -ra seen <<<"${CUDA_VISIBLE_DEVICES-0,1,2,3,4,5,6,7}"\n'
        '    echo "${#seen[@]}" ;;\n'
        '*) echo "WORLD_SIZE=${WORLD_SIZE:-} $*" >&2 ;; esac\n'
    )
    (path / "nvidia-smi").write_text("#!/bin/bash\nfor i in {0..7}; do echo GPU $i; done\n")
    for script in (python, path / "nvidia-smi"):
        script.chmod(0o755)
    bare = {"PATH": str(path), "PYTHON": str(python), "PYTHON_EXEC": "", "MASTER_PORT": ""}
    env = {**os.environ, **bare, "CUDA_VISIBLE_DEVICES": visible or ""}
    if visible is None:
        del env["CUDA_VISIBLE_DEVICES"]
    train = str(ROOT / "launch" / "train.sh")
    done = subprocess.run(["bash", train, "--config", "x"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check, start = [line for line in done.stderr.splitlines() if "WORLD_SIZE=" in line]
    assert check.startswith(f"WORLD_SIZE={ranks} ") and "--dry-run" in check
    assert f"--nproc-per-node {ranks} " in start


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("9.0", "1"), ("8.0", "1"), ("10.0", ""), ("12.0", ""), (None, "1")],
)
def test_one_launch_queue_on_gpus_before_blackwell(
    tmp_path: Path, capability: str | None, expected: str
) -> None:
    path = fake_bin(tmp_path / "bin", "bash")
    if capability:
        (path / "nvidia-smi").write_text(f"#!/bin/bash\necho {capability}\necho {capability}\n")
        (path / "nvidia-smi").chmod(0o755)
    command = f"source {ROOT}/launch/env.sh; echo ${{CUDA_DEVICE_MAX_CONNECTIONS-}}"
    bash = [str(path / "bash"), "-euo", "pipefail", "-c", command]
    done = subprocess.run(bash, env={"PATH": str(path)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr
