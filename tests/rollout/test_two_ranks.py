"""Engines of two torchrun ranks are independent and leave the trainer's groups alone."""

from pathlib import Path

import pytest

from tests.running import run_python


@pytest.mark.slow
def test_ranks_generate_out_of_step(checkpoint: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    result = run_python(*launch, "-m", "tests.rollout.two_ranks_worker", checkpoint)
    assert result.returncode == 0, result.stderr
    assert {"rank 0 finished", "rank 1 finished"} <= set(result.stdout.splitlines())
    assert "Traceback" not in result.stderr
