"""The main job with a Qwen3-VL: warm-up, GRPO with the engine, evaluation and export."""

import json
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.running import ENVIRONMENT, ROOT, run_python, train_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SMALL = (
    "sft.stop_metric=''",
    "sft.steps=2",
    "sft.batch_size=4",
    "grpo.steps=1",
    "grpo.evaluate_every=1",
    "rollout.prompts_per_step=2",
    "rollout.max_response_tokens=16",
    "evaluation.max_response_tokens=16",
    "data.max_prompt_tokens=192",
    "algorithm.kl=0.01",
    "algorithm.drop_zero_variance_groups=false",
    "observe.wandb=disabled",
)


def test_a_short_run_trains_and_exports(quickstart: Path) -> None:
    folder = quickstart / "runs" / "qwen3-model"
    tools, hf, megatron = ROOT / "tools", folder / "hf", folder / "megatron"
    for arguments in (
        [tools / "make_tiny_model.py", "--family=qwen3_vl", "--out", hf],
        [tools / "convert_checkpoint.py", "hf-to-megatron", hf, megatron],
    ):
        done = run_python(*arguments)
        assert done.returncode == 0, done.stderr
    given = [f"model.checkpoint={megatron}", "run.out_dir=runs/qwen3"]
    command = train_command(*SMALL, *given, ranks=2)
    run = subprocess.run(command, cwd=quickstart, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    out = quickstart / "runs" / "qwen3"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (grpo,) = [row for row in rows if row["phase"] == "grpo"]
    assert grpo["rollout/logprob_gap_max"] < 1e-4  # tokens, times and positions agree as well
    before, after = (
        {
            name: tensor
            for file in path.glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for path in (hf, out / "export")
    )
    assert before.keys() == after.keys()
    assert all(not before[name].equal(after[name]) for name in before)  # each of them learns
