"""Programs end with one sentence of one rank, and with one line on Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.running import CONFIG, ENVIRONMENT, ROOT

RAISES = """
import os, sys
from megatron_vrl.errors import DataError
from megatron_vrl.process.entry import run_program

def main():
    if os.environ["RANK"] in sys.argv[1]:
        raise DataError("the file is empty.")

run_program(main)
"""


def ranks(folder: Path, program: str, failing: str) -> str:
    """Return what two ranks of a node print, started as torchrun starts them."""
    stderr = ""
    for rank in "01":
        (folder / rank).mkdir()
        place = {"RANK": rank, "TORCHELASTIC_ERROR_FILE": f"{folder}/{rank}/error.json"}
        command = [sys.executable, "-c", program, failing]
        done = subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT | place, capture_output=True, text=True
        )
        assert done.returncode == (2 if rank in failing else 0)
        stderr += done.stderr
    return stderr


@pytest.mark.parametrize("failing", ["0", "1", "01"])
def test_an_error_of_any_rank_is_printed_once(tmp_path: Path, failing: str) -> None:
    assert ranks(tmp_path, RAISES, failing) == "error: the file is empty.\n"


KEEPS = """
import os, sys, time
from pathlib import Path
from megatron_vrl.errors import DataError
from megatron_vrl.storage.files import recorded_error
from megatron_vrl.process.entry import run_program

out, rank = Path(sys.argv[1]), int(os.environ["RANK"])

def main():
    with recorded_error(out, rank):
        if rank == 1:
            while (out / "error.txt").exists():  # of an earlier run
                time.sleep(0.01)
            raise DataError("the file of rank 1 is empty.")
        while not (out / "error.txt").exists():
            time.sleep(0.01)
        raise ConnectionError("rank 1 has gone")

run_program(main)
"""


def test_the_first_error_of_any_rank_is_stored(tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text("of an earlier run")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", KEEPS, tmp_path],
            cwd=ROOT,
            env=ENVIRONMENT | {"RANK": rank},
            stderr=subprocess.DEVNULL,
        )
        for rank in "10"
    ]
    assert [process.wait(60) for process in started] == [2, 1]
    assert (tmp_path / "error.txt").read_text() == "the file of rank 1 is empty.\n"


MISTAKEN = """
import os, sys
from megatron_vrl.process.entry import run_program
from megatron_vrl.cli.train import main

if os.environ["RANK"] == "1":
    sys.argv.append("model.checkpoint=gone")
run_program(main, unblocked=frozenset())
"""


@pytest.mark.slow
def test_an_error_of_one_rank_is_stored_in_the_run_directory(
    quickstart: Path, tmp_path: Path
) -> None:
    program, out = tmp_path / "program.py", tmp_path / "out"
    program.write_text(MISTAKEN)
    out.mkdir()
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "torchrun.py", "--standalone", "--nproc-per-node", "2",
         program, "--config", CONFIG, f"run.out_dir={out}"],
        cwd=quickstart, env=ENVIRONMENT | {"WARM_SOCKET": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (stderr,) = done.stderr.splitlines()
    assert stderr == "error: " + (out / "error.txt").read_text().strip() and "gone" in stderr


@pytest.mark.slow
def test_under_the_launcher_an_error_of_the_second_rank_is_printed_once(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(RAISES)
    launcher = [sys.executable, "launch/torchrun.py", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(program), "1"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: the file is empty.\n")


WAITS = """
import time
from megatron_vrl.process.entry import run_program, told_if_interrupted

def main():
    with told_if_interrupted(lambda: "7 of 9 are kept; the same command goes on."):
        print("ready", flush=True)
        time.sleep(60)

run_program(main)
"""


def test_an_interrupted_program_reports_what_is_kept() -> None:
    command = [sys.executable, "-c", WAITS]
    with subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=-1, stderr=-1, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGINT)
        assert program.communicate(timeout=60) == (
            "",
            "Interrupted. 7 of 9 are kept; the same command goes on.\n",
        )
    assert program.returncode == 130


def test_an_interrupted_tool_prints_one_line(tmp_path: Path) -> None:
    """Its helpers hear the terminal's Ctrl-C, too."""
    command = [sys.executable, "tools/make_synthetic.py", "--out", str(tmp_path / "clips")]
    with subprocess.Popen(
        [*command, "--num", "3000"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as tool:
        while not any((tmp_path / "clips").rglob("*.mp4")):
            assert tool.poll() is None
            time.sleep(0.1)
        os.killpg(tool.pid, signal.SIGINT)
        out, err = tool.communicate(timeout=60)
    assert tool.returncode == 130 and out == ""
    *bar, last = err.splitlines()
    assert last == "Interrupted." and all(not line or "clip/s" in line for line in bar), err


LEAVES = """
import atexit, os, sys, types
from megatron_vrl.process.entry import run_program

context = types.SimpleNamespace(is_initialized=lambda: sys.argv[1] == "gpu")
sys.modules["torch"] = types.SimpleNamespace(cuda=context)

class Pool:
    def __del__(self):
        os._exit(134)  # as "pure virtual method called" does

def main():
    global pool
    pool = Pool()
    atexit.register(lambda: print("closed"))
    print("done")
    return 3

run_program(main)
"""


@pytest.mark.parametrize(("device", "code"), [("gpu", 3), ("cpu", 134)])
def test_a_finished_program_on_a_gpu_ends_before_memory_pools_are_destroyed(
    device: str, code: int
) -> None:
    """Handlers that libraries registered for the exit still run."""
    command = [sys.executable, "-c", LEAVES, device]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    if device == "gpu":
        assert done.stdout == "done\nclosed\n"
