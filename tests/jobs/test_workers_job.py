"""The main job with rollout workers: generation beside training, a worker killed, none at all."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_vrl.config import check_off_policy, load_config
from megatron_vrl.errors import ConfigError
from tests.running import CONFIG, ENVIRONMENT, ROOT, train_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS, PROMPTS = 6, 4
OPTIONS = (
    "rollout.placement=workers",
    "rollout.max_staleness=1",
    "rollout.heartbeat_timeout_s=3",
    f"rollout.prompts_per_step={PROMPTS}",
    "algorithm.rollout_is=token",
    "algorithm.drop_zero_variance_groups=false",
    "data.evaluation={}",
    "grpo.evaluate_every=0",
    "sft.steps=0",
    f"grpo.steps={STEPS}",
    "checkpoint.every_steps=1",
    "observe.wandb=disabled",
)


@pytest.fixture
def worker(quickstart: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """One, under the script that starts it again; its rendezvous."""
    script = ROOT / "launch" / "rollout_worker.sh"
    found = quickstart / "found"
    command = ["bash", str(script), "--config", str(CONFIG), f"rollout.discovery_dir={found}"]
    process = subprocess.Popen(command, cwd=quickstart, env=ENVIRONMENT, start_new_session=True)
    yield process, found
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["phase"] == "grpo"]


def test_generation_overlaps_training_and_survives_a_lost_worker(
    quickstart: Path, worker: tuple[subprocess.Popen[bytes], Path]
) -> None:
    script, found = worker
    run = quickstart / "runs" / "overlapped"
    command = train_command(
        *OPTIONS, f"rollout.discovery_dir={found}", "run.out_dir=runs/overlapped", ranks=2
    )
    with subprocess.Popen(
        command, cwd=quickstart, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    ) as job:
        assert job.stderr is not None
        while len(rows(run)) < 2:
            assert job.poll() is None, job.stderr.read()[-3000:]
            time.sleep(0.1)
        (serving,) = psutil.Process(script.pid).children()
        serving.kill()
        stderr = job.stderr.read()
    assert job.returncode == 0, stderr[-3000:]
    found_rows = rows(run)
    assert [row["step"] for row in found_rows] == list(range(1, STEPS + 1))
    assert {row["actor/groups_trained"] for row in found_rows} == {PROMPTS}
    assert found_rows[0]["rollout/staleness"] == 0
    assert max(row["rollout/staleness"] for row in found_rows) == 1  # never more
    assert all(0.5 < row["rollout/is_weight"] < 2 for row in found_rows)
    assert "rollout: lost 127.0.0.1:" in stderr
    _replayed_to_the_bit(quickstart, run)


def _replayed_to_the_bit(quickstart: Path, run: Path) -> None:
    """Each group was ready at a step of its own; from its file it is so again."""
    stored = ("rollout.placement=replay", "rollout.replay_dir=runs/overlapped/rollouts")
    command = train_command(*OPTIONS, *stored, "run.out_dir=runs/replayed", ranks=2)
    done = subprocess.run(command, cwd=quickstart, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    weights = ("export", "model.safetensors")
    replay = run.parent / "replayed"
    assert replay.joinpath(*weights).read_bytes() == run.joinpath(*weights).read_bytes()
    assert [row["rollout/staleness"] for row in rows(replay)] == [
        row["rollout/staleness"] for row in rows(run)
    ]


def test_without_workers_the_run_stops_with_a_sentence(quickstart: Path) -> None:
    command = train_command(*OPTIONS, "rollout.worker_wait_timeout_s=1", "run.out_dir=runs/nobody")
    done = subprocess.run(command, cwd=quickstart, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        "error: 0 of at least 1 rollout workers were ready within rollout.worker_wait_timeout_s=1 "
        "(no address is known): start workers with launch/rollout_worker.sh"
    ) in done.stderr


def test_quantised_rollouts_need_importance_sampling() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.quantization=fp8_emulated samples from other"):
        check_off_policy(load_config(CONFIG, ["rollout.quantization=fp8_emulated"]))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rollout.placement=colocated", "rollout.max_staleness=1 needs rollout.placement=workers"),
        ("algorithm.rollout_is=none", "set algorithm.rollout_is=token (or sequence)"),
    ],
)
def test_stale_rollouts_need_workers_and_importance_sampling(override: str, sentence: str) -> None:
    cfg = load_config(CONFIG, [*OPTIONS, override])
    with pytest.raises(ConfigError) as refused:
        check_off_policy(cfg)
    assert sentence in str(refused.value)
