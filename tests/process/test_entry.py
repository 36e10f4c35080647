"""How programs end: who says the sentence, and what Ctrl-C leaves on the screen."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.running import ENVIRONMENT, ROOT

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
    """What two ranks of a node print, started as torchrun starts them."""
    said = ""
    for rank in "01":
        (folder / rank).mkdir()
        place = {"RANK": rank, "TORCHELASTIC_ERROR_FILE": f"{folder}/{rank}/error.json"}
        command = [sys.executable, "-c", program, failing]
        done = subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT | place, capture_output=True, text=True
        )
        assert done.returncode == (2 if rank in failing else 0)
        said += done.stderr
    return said


@pytest.mark.parametrize("failing", ["0", "1", "01"])
def test_an_error_of_any_rank_is_said_once(tmp_path, failing):
    assert ranks(tmp_path, RAISES, failing) == "error: the file is empty.\n"


@pytest.mark.slow
def test_under_the_launcher_an_error_of_the_second_rank_is_said_once(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(RAISES)
    launcher = [sys.executable, "launch/torchrun.py", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(program), "1"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: the file is empty.\n")


def test_an_interrupted_tool_says_one_line(tmp_path):
    """Its helpers hear the terminal's Ctrl-C, too."""
    command = [sys.executable, "tools/make_synthetic.py", "--out", tmp_path / "clips"]
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
