"""The main job with adapters: it is killed, resumes to equal results, and exports."""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vrl.checkpoint.torch_dist import TorchDistReader
from megatron_vrl.models.adapters import is_adapter
from tests.running import ENVIRONMENT, SHORT, kill_job, train_command
from tests.tiny import sharded_tensors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
LORA = (
    "model.lora.rank=4",
    "model.freeze_vision=true",
    "model.freeze_merger=true",
    "sft.steps=2",
    "sft.stop_metric=''",
    "sft.batch_size=4",
    "sft.optimizer.lr=1e-2",
    "data.evaluation={}",
    "algorithm.kl=0.01",
    "algorithm.drop_zero_variance_groups=false",
    "rollout.max_response_tokens=16",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
    "observe.wandb=disabled",
)


def grpo_rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"] == "grpo"]


def test_a_killed_run_resumes_to_equal_adapters(quickstart: Path) -> None:
    whole, killed = (quickstart / "runs" / name for name in ("lora", "lora-killed"))
    command = train_command(*SHORT, *LORA, "run.out_dir=runs/lora")
    done = subprocess.run(command, cwd=quickstart, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("weights", "huggingface"):
        assert (whole / "checkpoints" / "grpo-0-000001" / name).is_dir()
    stored = TorchDistReader(whole / "checkpoints" / "grpo-0-000001" / "weights").names()
    assert stored and all(is_adapter(name) for name in stored)

    began = "grpo-0-000000"
    shutil.copytree(whole / "checkpoints" / began, killed / "checkpoints" / began)
    command = train_command(*SHORT, *LORA, "run.out_dir=runs/lora-killed")
    with subprocess.Popen(
        command, cwd=quickstart, env=ENVIRONMENT, start_new_session=True, stderr=subprocess.DEVNULL
    ) as process:
        while not (killed / "checkpoints" / "grpo-0-000001").exists():
            assert process.poll() is None, "finished or failed before it could be killed"
            time.sleep(0.05)
        kill_job(process)
    done = subprocess.run(command, cwd=quickstart, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    for mine, theirs in zip(grpo_rows(killed), grpo_rows(whole), strict=True):
        assert mine["actor/kl"] == theirs["actor/kl"] > 0  # the base, not the warmed-up model
        assert mine["reward/mean"] == theirs["reward/mean"]
        assert mine["rollout/logprob_gap_max"] < 1e-4  # the engine has the merged weights
    files = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, killed)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    base = sharded_tensors(quickstart / "runs" / "quickstart" / "model-hf")
    merged = sharded_tensors(whole / "export")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {n for n in base if "layers" in n and n.endswith("_proj.weight")}
