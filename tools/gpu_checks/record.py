"""Record what gpu_checks/replay_job.py trains on: `python -m gpu_checks.record FOLDER`.

Makes clips, a tiny model and the rollouts of STEPS steps in FOLDER, by vLLM on a CPU. The folder
can be moved to a machine without vLLM.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_checks.parts import ROOT, environment
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import run_program
from megatron_vrl.tasks import TASKS

STEPS = 5
BRIEF = "{format: 0.5, brief: 0.5}"  # an untrained model's answers earn something, too
OPTIONS = (
    "rewards.functions={brief: tests.rewards.user_functions:brief}",
    *(f"rewards.weights.{task}={BRIEF}" for task in TASKS),
    "data.evaluation={}",
    "sft.steps=0",
    "grpo.evaluate_every=0",
    "grpo.mini_batches=2",
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "algorithm.kl=0.01",
    "algorithm.rollout_is=token",
    "observe.wandb=disabled",
)


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("folder", type=Path, help="a folder to make")
    folder: Path = parser.parse_args().folder.resolve()
    run = folder / "runs" / "quickstart"
    run.mkdir(parents=True)
    sizes = ("--split=sft=20", "--split=train=15", "--split=dev=1", "--split=heldout=1")
    for program in (
        ("tools/make_synthetic.py", "--out", run / "data", *sizes, "--split=ood=1"),
        ("tools/make_tiny_model.py", "--out", run / "model-hf"),
        ("tools/convert_checkpoint.py", "hf-to-megatron", run / "model-hf", run / "model-megatron"),
    ):
        subprocess.run([sys.executable, *map(str, program)], cwd=ROOT, check=True)
    made = folder / "made"
    command = job(f"run.out_dir={made}", f"grpo.steps={STEPS}", "--rollouts-only")
    subprocess.run(command, cwd=folder, env=environment(), check=True)
    shutil.move(made / "rollouts", folder / "rollouts")
    shutil.rmtree(made)


def job(*overrides: str, python: str = "") -> list[str]:
    """Return the command of the main job, to be run in the folder."""
    config = ROOT / "configs" / "quickstart.yaml"
    python = python or os.environ.get("PYTHON_EXEC") or sys.executable
    program = [python, "-m", "megatron_vrl.cli.train", "--config", str(config)]
    return [*program, *OPTIONS, "video.decoder=pyav", *overrides]


if __name__ == "__main__":
    run_program(main)
