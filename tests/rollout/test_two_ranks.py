"""Engines of two torchrun ranks are independent and leave the trainer's groups alone."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_ranks_generate_out_of_step(checkpoint):
    worker = Path(__file__).with_name("two_ranks_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launch, str(worker), str(checkpoint)], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    assert {"rank 0 finished", "rank 1 finished"} <= set(result.stdout.splitlines())
    assert "Traceback" not in result.stderr
