"""The main job from stored rollouts, killed in its midst and resumed, without vLLM.

`python -m gpu_checks.replay_job FOLDER` trains on FOLDER/rollouts, which gpu_checks/record.py has
made. The job is killed when the checkpoint of half its steps is committed. The same command then
goes on.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_checks.parts import environment
from gpu_checks.record import job
from megatron_vrl.errors import UserError
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import run_program
from megatron_vrl.rollout.records import read_rollouts


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("folder", type=Path, help="made by gpu_checks/record.py")
    folder: Path = parser.parse_args().folder.resolve()
    steps = max(row["step"] for row in read_rollouts(folder / "rollouts"))
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "run"
        options = (
            f"run.out_dir={out}",
            f"grpo.steps={steps}",
            "rollout.placement=replay",
            f"rollout.replay_dir={folder / 'rollouts'}",
            "model.dtype=bfloat16",
            "checkpoint.every_steps=1",
        )
        began = time.perf_counter()
        _kill_at(out / "checkpoints" / f"grpo-0-{steps // 2:06}", folder, options)
        done = subprocess.run(
            job(*options), cwd=folder, env=environment(), capture_output=True, text=True
        )
        if done.returncode or "; resuming at step " not in (output := done.stdout + done.stderr):
            raise UserError(f"The job did not resume: {' '.join(done.stderr.split()[-60:])}")
        resumed = int(output.partition("; resuming at step ")[2].split()[0])
        rows = _metrics(out)
    if [row["step"] for row in rows] != list(range(1, steps + 1)):
        raise UserError(f"The resumed job has steps {[row['step'] for row in rows]} of {steps}.")
    row = {"steps": steps, "resumed_at": resumed, "seconds": time.perf_counter() - began}
    print(json.dumps({"bench": "job", **row, "grad_norm": rows[-1]["actor/grad_norm"]}))


def _kill_at(checkpoint: Path, folder: Path, options: tuple[str, ...]) -> None:
    """Start the job and end its processes as soon as `checkpoint` is committed."""
    command = job(*options, python=sys.executable)
    with tempfile.TemporaryFile("w+") as output, subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=output, stderr=output, start_new_session=True
    ) as process:  # fmt: skip
        while not checkpoint.exists():
            if process.poll() is not None:
                output.seek(0)
                last = " ".join(output.read().split()[-60:])
                raise UserError(f"The job ended before it could be killed: {last}")
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)


def _metrics(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["phase"] == "grpo"]


if __name__ == "__main__":
    run_program(main)
