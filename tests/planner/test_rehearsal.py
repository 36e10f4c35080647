"""Rehearsal of an update on fake GPUs: no host read in a pass, weights as planned to the byte."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vrl.rehearsal.recorder import HostReadError, Recorder
from tests.running import ENVIRONMENT, ROOT


def test_a_host_read_in_a_pass_is_an_error() -> None:
    recorder = Recorder({})
    with recorder:
        assert torch.ones(3).sum().item() == 3  # before the passes
        recorder.in_pass = True
        with pytest.raises(HostReadError, match="test_rehearsal"):
            torch.ones(3).sum().item()
        with pytest.raises(HostReadError, match="test_rehearsal"):
            torch.ones(3)[torch.ones(3) > 0]


@pytest.mark.slow
def test_two_layers_of_the_3b_model_as_planned(tmp_path: Path) -> None:
    sizes = json.loads((ROOT / "configs/models/qwen2.5-vl-3b.json").read_text())
    sizes["num_hidden_layers"] = 2
    sizes["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1]}
    small = tmp_path / "config.json"
    small.write_text(json.dumps(sizes))
    config = "configs/qwen2.5-vl-3b-1gpu.yaml"
    # no warm process: the fake GPU is loaded before torch
    command = [sys.executable, "tools/rehearse.py", config, "--json", f"model.architecture={small}"]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    row = json.loads(run.stdout)
    for name in ("weights", "gradients"):
        rehearsed, planned = row["memory"][name]
        assert rehearsed == planned, name
    rehearsed, planned = row["memory"]["peak of both"]
    assert rehearsed == pytest.approx(planned, rel=0.03)
    assert row["layers"] == {"vision": 2, "language": 2}
