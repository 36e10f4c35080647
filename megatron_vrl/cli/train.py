"""Tune a video language model: supervised warm-up (SFT), then GRPO.

    mvrl train --config FILE [--dry-run [--strict]] [--rollouts-only] [section.key=value ...]

It runs as one process, or on many ranks by launch/train.sh or torchrun:

    torchrun --nproc-per-node N -m megatron_vrl train --config FILE [section.key=value ...]

--dry-run checks the config, the layout and the files and prints the resolved config; with --strict
a missing file is an error. --rollouts-only makes rollouts and trains nothing. The same command
resumes a stopped run. Every key, its default and its meaning: docs/config.md.
"""

import argparse
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vrl.errors import StopRequested
from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program
from megatron_vrl.process.parent_death import end_with_parent, end_with_starter
from megatron_vrl.process.signals import take_signals

if TYPE_CHECKING:
    from megatron_vrl.config import RunConfig


def make_parser() -> OverrideParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="YAML, see configs/")
    add("--dry-run", action="store_true", help="check everything, train nothing")
    add("--strict", action="store_true", help="with --dry-run: a missing file is an error")
    add(
        "--rollouts-only",
        action="store_true",
        help="generate and score the prompts of GRPO's steps into OUT/rollouts, train nothing",
    )
    parser.add_overrides()
    return parser


def main() -> None:
    arguments = make_parser().parse_intermixed_args()
    if arguments.dry_run:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    else:
        take_signals()  # before the imports: threads inherit the signal mask
        end_with_parent()
    from megatron_vrl.config import load_config
    from megatron_vrl.observe.silence_logs import silence_libraries

    cfg = load_config(arguments.config, arguments.overrides)
    silence_libraries()
    try:
        result = _run(arguments, cfg)
    except StopRequested as stop:
        result = str(stop)
    if os.environ.get("RANK", "0") == "0":
        print(result)


def _run(arguments: argparse.Namespace, cfg: "RunConfig") -> str:
    """Run what the arguments ask for; return the text that rank 0 prints."""
    from megatron_vrl.storage.files import recorded_error

    if arguments.dry_run:
        return _dry_run(cfg, arguments.strict)
    with recorded_error(Path(cfg.run.out_dir), int(os.environ.get("RANK", "0"))):
        return _rollouts(cfg) if arguments.rollouts_only else _job(cfg)


def _job(cfg: "RunConfig") -> str:
    from megatron_vrl.trainer.job import is_finished, run_job

    note = ""
    if is_finished(cfg):
        steps = cfg.grpo.steps or cfg.sft.steps
        note = f"{cfg.run.out_dir} is finished ({steps} of {steps} steps); nothing was trained.\n"
    return f"{note}report: {run_job(cfg)}"


def _rollouts(cfg: "RunConfig") -> str:
    from megatron_vrl.trainer.rollouts_only import run_rollouts

    return f"rollouts: {run_rollouts(cfg)}"


def _dry_run(cfg: "RunConfig", strict: bool) -> str:
    import yaml

    from megatron_vrl.trainer.dry_run import check, refuse_missing
    from megatron_vrl.trainer.run_dir import check_writable

    world = int(os.environ.get("WORLD_SIZE", "0")) or cfg.parallel.processes or 1
    notes = check(cfg, world).notes
    check_writable(cfg.run.out_dir, keep=False)
    if strict:
        refuse_missing(notes)
    resolved = yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)
    return resolved + "\n".join(f"# {note}" for note in notes)


if __name__ == "__mp_main__":  # a process that multiprocessing spawned, as Megatron's writer is
    end_with_starter()
if __name__ == "__main__":
    run_program(main, unblocked=frozenset())
