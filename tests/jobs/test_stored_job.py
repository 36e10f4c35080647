"""Stored rollouts on the command line: replayed bit for bit, made without training, run out of."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_checks.record import OPTIONS as RECORDED

from megatron_vrl.rollout.records import read_rollouts
from tests.jobs.test_main_job import numbers, rows_of
from tests.running import ENVIRONMENT, ROOT, run_python, train_command

OPTIONS = (*RECORDED, "grpo.steps=2")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def without_vllm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment where importing vllm fails."""
    folder = tmp_path_factory.mktemp("no-vllm")
    (folder / "vllm.py").write_text("raise ImportError('stored rollouts need no vLLM')")
    return ENVIRONMENT | {"PYTHONPATH": f"{folder}:{ROOT}"}


Train = Callable[..., tuple[Path, subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="module")
def train(quickstart: Path) -> Train:
    """train(name, *overrides) -> run directory and finished process."""

    def run(
        name: str,
        *overrides: str,
        ranks: int = 2,
        environment: dict[str, str] = ENVIRONMENT,
        succeeds: bool = True,
    ) -> tuple[Path, subprocess.CompletedProcess[str]]:
        command = train_command(*OPTIONS, f"run.out_dir=runs/{name}", *overrides, ranks=ranks)
        done = subprocess.run(
            command, cwd=quickstart, env=environment, capture_output=True, text=True
        )
        assert (done.returncode == 0) == succeeds, done.stderr[-4000:]
        return quickstart / "runs" / name, done

    return run


@pytest.fixture(scope="module")
def original(train: Train) -> Path:
    return train("original")[0]


@pytest.fixture(scope="module")
def rollouts_only(train: Train) -> Path:
    """Two steps, the second by a command that goes on; of one process."""
    for steps in (1, 2):
        run, done = train("only", "--rollouts-only", f"grpo.steps={steps}", ranks=1)
        assert done.stdout == "rollouts: runs/only/rollouts\n"
    return run


def groups(run: Path) -> dict[tuple[int, str], list[list[int]]]:
    """(step, sample) -> tokens of each answer; a pair that comes twice would be lost."""
    rows = list(read_rollouts(run / "rollouts"))
    tokens = {
        (row["step"], row["sample"]): [a["token_ids"] for a in row["answers"]] for row in rows
    }
    assert len(tokens) == len(rows)
    return tokens


def test_a_replay_equals_the_first_run_to_the_bit(
    train: Train, original: Path, without_vllm: dict[str, str]
) -> None:
    replay, _ = train(
        "replay",
        "rollout.placement=replay",
        "rollout.replay_dir=runs/original/rollouts",
        environment=without_vllm,
    )
    ours, theirs = rows_of(replay, "grpo"), rows_of(original, "grpo")
    assert len(ours) == 2 and abs(theirs[0]["actor/policy_loss"]) > 1e-4
    memory = "perf/peak_memory_gib"
    for mine, whole in zip(ours, theirs, strict=True):
        assert {**numbers(mine), memory: 0} == {**numbers(whole), memory: 0}
    weights = Path("export") / "model.safetensors"
    assert (replay / weights).read_bytes() == (original / weights).read_bytes()
    for rank in ("rank-0000.jsonl.zst", "rank-0001.jsonl.zst"):  # and it is stored again
        again, before = ((run / "rollouts" / rank).read_bytes() for run in (replay, original))
        assert again == before


def test_rollouts_only_equals_the_first_rollouts_of_training(
    original: Path, rollouts_only: Path
) -> None:
    made, trained = groups(rollouts_only), groups(original)
    assert made.keys() == trained.keys() and {step for step, _ in made} == {1, 2}
    first = [key for key in made if key[0] == 1]
    assert [made[key] for key in first] == [trained[key] for key in first]
    assert [made[key] for key in made if key not in first] != [
        trained[key] for key in made if key not in first
    ]
    assert not (rollouts_only / "checkpoints").exists()
    rows = rows_of(rollouts_only, "grpo")
    assert [(row["step"], row["rollout/staleness"]) for row in rows] == [(1, 0), (2, 0)]
    assert rows[0]["reward/mean"] == pytest.approx(rows_of(original, "grpo")[0]["reward/mean"])


def test_training_on_stored_rollouts_until_none_is_left(
    train: Train, original: Path, rollouts_only: Path, without_vllm: dict[str, str]
) -> None:
    run, done = train(
        "offline",
        "rollout.placement=replay",
        "rollout.replay_dir=runs/only/rollouts",
        "grpo.steps=3",
        environment=without_vllm,
        succeeds=False,
    )
    assert done.returncode == 2
    assert "error: runs/only/rollouts holds no rollouts of sample train_" in done.stderr
    rows = rows_of(run, "grpo")
    assert [(row["step"], row["rollout/staleness"]) for row in rows] == [(1, 0), (2, 1)]
    assert rows[1]["rollout/is_weight"] != 1
    latest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    assert json.loads((latest / "state.json").read_text())["step"] == 2  # what was learned is kept


def test_the_main_job_on_the_newest_megatron_core(quickstart: Path, rollouts_only: Path) -> None:
    """Killed and resumed, by Python 3.12; vLLM has no CPU build there, so rollouts are stored."""
    script = ROOT / "launch" / "test_newest.sh"
    newest = subprocess.run([script, "--python"], capture_output=True, text=True, check=True)
    if not newest.stdout:
        pytest.skip("launch/test_newest.sh could not make its environment here")
    recorded(quickstart, rollouts_only)
    done = subprocess.run(
        [newest.stdout.strip(), "-m", "gpu_checks.replay_job", str(quickstart)],
        cwd=ROOT / "tools",
        env=ENVIRONMENT | {"PYTHON_EXEC": newest.stdout.strip()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = map(json.loads, done.stdout.splitlines())
    assert row["steps"] == 2 and row["resumed_at"] == 2


def recorded(quickstart: Path, run: Path) -> None:
    """Put the run's rollouts where tools/gpu_checks/replay_job.py looks for them."""
    if not (quickstart / "rollouts").exists():
        (quickstart / "rollouts").symlink_to(run / "rollouts")


def test_the_gpu_check_runs_every_part_at_tiny_sizes(
    quickstart: Path, rollouts_only: Path, tmp_path: Path
) -> None:
    recorded(quickstart, rollouts_only)
    arguments = ("--tiny", "--seconds", "400", "--replay", quickstart, "--out", tmp_path)
    done = run_python(ROOT / "tools" / "gpu_check.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = json.loads((tmp_path / "gpu-check.json").read_text())["rows"]
    assert {row["part"] for row in rows if row["status"] != "ok"} == {"ipc", "tests"}  # GPU only
    key = ("what", "layout", "side", "path")
    by_part = {(row["part"], next((row[k] for k in key if k in row), "")): row for row in rows}
    assert by_part["tiny", ""]["resume_difference"] == 0
    assert by_part["tiny", ""]["float32_difference"] < 0.02
    job = by_part["job", ""]
    assert job["steps"] == 2 and job["resumed_at"] == 2
    assert by_part["large", "checkpoint"]["written_gib"] > 0.01
    assert by_part["large", "passes"]["operations"] > 200
    assert {("update-full", "shared"), ("update-full", "plain")} <= by_part.keys()
    assert by_part["head", "chunked"]["of_logits"] < by_part["head", "naive"]["of_logits"]
    generate = by_part["generate", ""]
    assert generate["answers"] == "2x2" and 4 <= generate["tokens"] <= 16
    assert {path for part, path in by_part if part == "decode"} == {
        *("pyav-sequential", "ours-pyav", "ours-dali")
    }
    _stages_add_up({path: row for (part, path), row in by_part.items() if part == "sync"})


def _stages_add_up(rows: dict[str, dict[str, Any]]) -> None:
    """Check the rows of `bench.py sync` after one round."""
    assert rows.keys() == {"colocated", "shared_memory", "broadcast", "http"}
    for path, row in rows.items():
        stages = [row[f"{stage}_s"] for stage in ("export", "push", "flush", "commit")]
        assert sum(stages) == pytest.approx(row["median_s"]), path
        assert row["ratio_to_copy"] == pytest.approx(row["median_s"] / row["copy_s"])
    assert rows["colocated"]["flush_s"] < rows["http"]["flush_s"]
    assert rows["colocated"]["bytes"] > 4_000_000
