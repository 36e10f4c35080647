"""The warm Python of the slow tests does as an ordinary one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import warm
from tests.running import ENVIRONMENT, ROOT, python

pytestmark = pytest.mark.slow
PROGRAMS = {
    "arguments": "import os, sys; print(os.getcwd(), sys.argv, sys.path[:2], 'HOME' in os.environ)",
    "input": "print(input()[::-1])",
    "exit code": "raise SystemExit(3)",
    "sentence": "raise SystemExit('what is wrong')",
    "signal": "import os; os.kill(os.getpid(), 15)",
    "spawn": "from multiprocessing import get_context as g; p = g('spawn').Process(target=print); "
    "p.start(); p.join(); print(p.exitcode)",
    "forkserver": "from multiprocessing import get_context as g; "
    "print(g('forkserver').Pool(2).map(abs, [-1]))",
    "files": "import os; print(sorted(os.listdir('/proc/self/fd')))",
    "threads left": "import threading, time; threading.Timer(0.1, print, ['late']).start()",
    "atexit": "import atexit; atexit.register(print, 'bye')",
}


def ran(executable: str, program: str, cwd: Path) -> tuple[int, str, str]:
    command = [executable, "-c", program, "a b"]
    done = subprocess.run(
        command, env=ENVIRONMENT, cwd=cwd, input="abc", capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_same_as_an_ordinary_python(name: str, tmp_path: Path) -> None:
    assert ran(python(), PROGRAMS[name], tmp_path) == ran(sys.executable, PROGRAMS[name], tmp_path)


def test_it_is_warm() -> None:
    program = "import sys; print('vllm' in sys.modules, 'megatron.core' in sys.modules)"
    assert ran(python(), program, ROOT) == (0, "True True\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_client_takes_its_program_and_that_one_s_children_along(number: signal.Signals) -> None:
    program = "import subprocess; p = subprocess.Popen(['sleep', '100']); print(p.pid); p.wait()"
    command = [python(), "-u", "-c", program]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        child = psutil.Process(int(client.stdout.readline()))
        assert child in warm.family(client.pid)[1].children()
        client.send_signal(number)
    assert client.returncode == -number
    if number == signal.SIGKILL:
        psutil.wait_procs([child], timeout=10)
        assert not child.is_running()
    else:
        os.kill(child.pid, signal.SIGKILL)  # as ever, a signal is for one process
