"""The state of a run in JSON."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_vrl.errors import CheckpointError
from megatron_vrl.trainer.state import RunState

PATH = Path("run/checkpoints/grpo-0-000020/state.json")


def test_a_state_equals_what_its_json_gives() -> None:
    state = RunState(stage="grpo", step=20, in_flight=[3, 4], selections=[[1, 12]])
    assert RunState.of_json(json.loads(json.dumps(asdict(state))), PATH) == state


def test_the_state_of_another_version_is_refused() -> None:
    values = asdict(RunState(stage="grpo", step=20))
    values["under_way"] = values.pop("in_flight")
    with pytest.raises(CheckpointError, match=r"grpo-0-000020/state\.json has fields .*under_way"):
        RunState.of_json(values, PATH)
