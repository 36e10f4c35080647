"""A tensor-parallel engine of two processes equals the engine of this process."""

import json
from pathlib import Path

import pytest
import torch

from megatron_vrl.rollout.checksums import tensor_checksums
from megatron_vrl.rollout.vllm.engine import VllmEngine
from tests.rollout.conftest import MakePrompt, Weights
from tests.rollout.tensor_worker import SPEC
from tests.running import run_python

pytestmark = pytest.mark.slow
FACTOR = 1.05  # of the second weight sync


def test_rollouts_and_weights_of_two_shards(
    engine: VllmEngine,
    checkpoint: Path,
    weights: Weights,
    make_prompt: MakePrompt,
) -> None:
    changed = {name: tensor * FACTOR for name, tensor in weights.items()}
    engine.push_weights(changed.items(), version=2)
    ours = engine.generate([make_prompt(0), make_prompt(1)], SPEC)
    done = run_python("-m", "tests.rollout.tensor_worker", checkpoint, FACTOR)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert theirs["tokens"] == [[r.token_ids.tolist() for r in group] for group in ours]
    assert theirs["checksums"] == tensor_checksums(changed.items(), torch.float32)
