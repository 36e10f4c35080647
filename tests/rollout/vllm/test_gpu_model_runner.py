"""The engine's tests on vLLM's GPU model runner, which the CPU build does not take by itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import ENVIRONMENT, ROOT, python

HERE = Path(__file__).parent
TRITON = Path(sys.prefix) / "share" / "triton"  # launch/install.sh puts it there
TESTS = (
    "async_scheduling_cases.py",
    "test_engine.py::test_logprobs_are_those_of_transformers",
    "test_engine.py::test_banned_tokens_never_occur",
)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_engine_on_the_gpu_model_runner() -> None:
    """vLLM schedules asynchronously there too: log-probs, versions, bans and caches hold."""
    assert (TRITON / "triton").is_dir(), f"{TRITON} has no Triton: run launch/install.sh test"
    tests = [f"{HERE}/{name}" for name in TESTS]
    plugin = ("-p", "tests.rollout.vllm.triton_interpreter", "-p", "no:cacheprovider")
    done = subprocess.run(
        [python(), "-m", "pytest", "-q", *plugin, *tests],
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{TRITON}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
