"""Programs that tests start need not each import torch, Megatron and vLLM."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shlex import quote

import psutil

HERE = Path(__file__).parent


def start(environment: dict[str, str]) -> None:
    """Start a server for programs with this environment. WARM_SOCKET names it there for
    `client.py`, which PYTHON_EXEC names for tests, scripts and torchrun. It ends with this one."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\nexec {quote(sys.executable)} -IS {quote(f"{HERE}/client.py")} "$@"\n'
    )
    python.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, HERE / "server.py", folder / "socket"],
        env=environment,
        stdin=subprocess.PIPE,  # closed when this process ends, which ends the server
        stderr=(folder / "server.log").open("w"),
    )
    while not (folder / "socket").exists():
        assert server.poll() is None
        time.sleep(0.01)
    environment |= {"WARM_SOCKET": f"{folder}/socket", "PYTHON_EXEC": str(python)}


def family(pid: int) -> list[psutil.Process]:
    """A process and its descendants, with the programs that clients stand for."""
    processes = [psutil.Process(pid)]
    for process in processes:
        processes += process.children()
        kind, _, program = process.name().partition(" ")
        if kind == "warm":
            processes.append(psutil.Process(int(program)))
    return processes
