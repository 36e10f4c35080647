"""State of the trainer around calls of the engine."""

import pytest
import torch

from megatron_vrl.rollout.vllm.startup import preserve_trainer_state


@pytest.mark.parametrize("warn_only", [True, False])
def test_deterministic_algorithms_are_for_the_trainer_alone(warn_only: bool) -> None:
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        with preserve_trainer_state():
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)
