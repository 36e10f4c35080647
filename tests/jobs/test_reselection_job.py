"""Selection between epochs on the command line: killed in its midst, and gone on to the bit."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_vrl.rollout.records import read_rollouts
from tests.jobs.test_main_job import numbers, rows_of, stored_answers
from tests.jobs.test_stored_job import OPTIONS as SMALL
from tests.running import ENVIRONMENT, kill_job, train_command

STEPS, POOL, BUDGET = 7, 15, 8
OPTIONS = (
    *SMALL,
    f"grpo.steps={STEPS}",
    "algorithm.kl=0",
    "selection.every_epochs=1",
    "selection.answers=3",
    "selection.min_std=0",  # no answer of this model can be read: the rest has no spread
    "selection.min_mean=0",
    f"selection.budget={BUDGET}",
    "checkpoint.every_steps=1000",
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


def test_killed_in_the_midst_of_a_selection_it_goes_on_as_if_nothing_had_happened(
    quickstart: Path,
) -> None:
    whole, killed = (quickstart / "runs" / name for name in ("reselected", "reselected-killed"))
    _run(quickstart, whole.name)
    folder = killed / "selection" / "epoch-0001"  # begins at step 5: four steps draw the pool once
    command = train_command(*OPTIONS, f"run.out_dir=runs/{killed.name}", ranks=2)
    with subprocess.Popen(
        command, cwd=quickstart, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    ) as process:
        while not (folder / "answers-0.jsonl").exists() or not _rows(folder / "answers-0.jsonl"):
            assert process.poll() is None, "finished or failed before it could be killed"
            time.sleep(0.01)
        kill_job(process)
    assert not (folder / "kept.jsonl").exists()
    assert (killed / "checkpoints" / "latest").read_text() == "grpo-0-000004"
    answered = _rows(folder / "answers-0.jsonl")
    assert 0 < len(answered) < POOL
    answered[0]["marked"] = True  # lost if it were inferred again
    (folder / "answers-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered))
    _run(quickstart, killed.name)

    found = _rows(folder / "answers-0.jsonl")
    assert found[0].pop("marked") is True
    assert found == _rows(whole / "selection" / "epoch-0001" / "answers-0.jsonl")
    for name in ("epoch-0001", "epoch-0002"):
        kept = (killed / "selection" / name / "kept.jsonl").read_text()
        assert kept == (whole / "selection" / name / "kept.jsonl").read_text()
    ours, theirs = rows_of(killed, "grpo"), rows_of(whole, "grpo")
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    assert [numbers(row) for row in ours] == [numbers(row) for row in theirs]
    assert abs(ours[-1]["actor/policy_loss"]) > 1e-6
    assert stored_answers(killed) == stored_answers(whole)
    _draws_what_was_kept(killed)


def _draws_what_was_kept(run: Path) -> None:
    drawn: dict[int, set[str]] = {}
    for row in read_rollouts(run / "rollouts"):
        drawn.setdefault(row["step"], set()).add(row["sample"])
    assert len(drawn[1] | drawn[2] | drawn[3] | drawn[4]) == POOL
    for epoch, steps in ((1, (5, 6)), (2, (7,))):
        folder = run / "selection" / f"epoch-{epoch:04d}"
        kept = {row["id"] for row in _rows(folder / "kept.jsonl")}
        assert len(kept) == BUDGET and set().union(*(drawn[step] for step in steps)) <= kept
        verdicts = json.loads((folder / "summary.json").read_text())["verdicts"]
        assert verdicts["multiple_choice"] == {"all wrong": 3}
    assert drawn[5] | drawn[6] == {
        row["id"] for row in _rows(run / "selection" / "epoch-0001" / "kept.jsonl")
    }


def _run(folder: Path, name: str) -> None:
    command = train_command(*OPTIONS, f"run.out_dir=runs/{name}", ranks=2)
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"8 of {POOL} samples" in done.stderr


def _rows(path: Path) -> list[dict[str, Any]]:
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]
