"""The signal that asks to stop, when it reaches every process, as Slurm sends it."""

import subprocess

from tests.running import ENVIRONMENT, ROOT, python

RANK = """
import os, signal, subprocess, sys, types

def run_job(cfg):
    child = subprocess.Popen(["sleep", "60"])
    os.killpg(0, signal.SIGUSR1)
    try:
        child.wait(1)
    except subprocess.TimeoutExpired:
        print("the child lives,", "heard" if signal.SIGUSR1 in signal.sigpending() else "not heard")
    child.kill()

sys.modules["megatron_vrl.loops.job"] = types.SimpleNamespace(run_job=run_job)
from megatron_vrl import train
train._job(None)
"""


def test_a_rank_hears_it_and_its_children_live_on():
    done = subprocess.run(
        [python(), "-c", RANK],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert done.stdout == "the child lives, heard\n", done.stderr
