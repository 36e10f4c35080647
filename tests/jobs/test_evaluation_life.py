"""A run that is asked to stop while it evaluates: after the warm-up and in GRPO."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.running import CONFIG, ENVIRONMENT, ROOT, kill_job, python

PROGRAM = """
import os
from megatron_vrl.cli import train
from megatron_vrl.process.entry import run_program

job = train._job

def job_in_small_batches(cfg):
    from megatron_vrl.evaluation import during_training as evaluation

    stop_if_asked = evaluation.stop_if_asked

    def print_and_stop_if_asked(*arguments, **options):
        if os.environ["RANK"] == "0":
            os.write(1, b"batch\\n")
        stop_if_asked(*arguments, **options)

    evaluation.SAMPLES_AT_A_TIME, evaluation.stop_if_asked = 1, print_and_stop_if_asked
    return job(cfg)

train._job = job_in_small_batches
if __name__ == "__main__":
    run_program(train.main, unblocked=frozenset())
"""
DATA = "runs/quickstart/data"
FORMS = {"temporal_grounding": "charades_sta", "multiple_choice": "multiple_choice"}
FORMS["grounded_qa"] = "next_gqa"
SPLIT = [
    {
        "json_path": f"{DATA}/annotations/train_{task}.json",
        "data_folder": f"{DATA}/videos",
        "format": form,
    }
    for task, form in FORMS.items()
]
SMALL = (
    "run.out_dir=runs/evaluations",
    f"data.evaluation={json.dumps(dict.fromkeys(('dev', 'heldout', 'ood'), SPLIT))}",
    "sft.stop_metric=''",
    "sft.steps=2",
    "sft.batch_size=4",
    "grpo.steps=1",
    "grpo.evaluate_every=1",
    "rollout.prompts_per_step=4",
    "algorithm.drop_zero_variance_groups=false",
    "observe.wandb=disabled",
)
DEV = HELDOUT = OOD = 8  # batches: 15 questions on two ranks, one at a time
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def call(folder: Path, number: int = 0, batches: int = 0) -> tuple[str, int]:
    """Run to the end, or send the signal after some batches: the last line, batches begun."""
    torchrun = str(ROOT / "launch" / "torchrun.py")
    command = [python(), torchrun, "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen(
        [*command, str(folder / "program.py"), "--config", str(CONFIG), *SMALL],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as launcher:
        assert launcher.stdout is not None and launcher.stderr is not None
        try:
            lines = []
            for line in launcher.stdout:
                lines.append(line.strip())
                if number and line == "batch\n" and lines.count("batch") == batches:
                    os.kill(launcher.pid, number)
            assert launcher.wait(60) == 0, launcher.stderr.read()
            assert "Traceback" not in launcher.stderr.read()
        finally:
            if launcher.poll() is None:
                kill_job(launcher)
    return lines[-1], lines.count("batch")


def rows(folder: Path) -> list[tuple[str, int, str | None]]:
    metrics = folder / "runs" / "evaluations" / "metrics.jsonl"
    records = map(json.loads, metrics.read_text().splitlines())
    return [(row.get("during", row["phase"]), row["step"], row.get("split")) for row in records]


def test_a_stopped_evaluation_ends_after_its_batch_and_is_repeated(quickstart: Path) -> None:
    (quickstart / "program.py").write_text(PROGRAM)
    base = [("base", 0, "heldout"), ("base", 0, "ood")]
    sft = [("sft", 1, None), ("sft", 2, None), ("sft", 2, "heldout"), ("sft", 2, "ood")]
    grpo = [("grpo", 1, name) for name in (None, "dev", "heldout", "ood")]

    last, begun = call(quickstart, signal.SIGTERM, HELDOUT + OOD + HELDOUT + 3)
    assert last.startswith("Stopped after step 2, in an evaluation, as asked; ")
    assert begun < 2 * (HELDOUT + OOD) and rows(quickstart) == base + sft[:-1]
    last, begun = call(quickstart, signal.SIGUSR1, OOD + 1)  # the split that was in progress
    assert last.startswith("Stopped after step 1, in an evaluation, as asked; ")
    assert begun < OOD + DEV and rows(quickstart) == base + sft + grpo[:1]
    last, begun = call(quickstart)
    assert last == "report: runs/evaluations/report.html"
    assert begun == DEV + HELDOUT + OOD and rows(quickstart) == base + sft + grpo
