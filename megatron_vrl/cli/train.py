"""Train: `torchrun --nproc-per-node N -m megatron_vrl train --config FILE [section.key=value ...]`.

Without torchrun it is one process. `--dry-run` checks the config, the layout and the files and
prints the resolved config; with `--strict` a missing file is a mistake. `--rollouts-only` makes
rollouts and trains nothing. A mistake of the user's is one sentence and exit code 2.
"""

import os
import signal
from pathlib import Path

import yaml

from megatron_vrl.config import RunConfig, load_config
from megatron_vrl.errors import StopRequested
from megatron_vrl.observe.silence_logs import silence_libraries
from megatron_vrl.process.command_line import OverrideParser
from megatron_vrl.process.entry import run_program
from megatron_vrl.process.parent_death import end_with_parent, end_with_starter
from megatron_vrl.process.signals import take_signals
from megatron_vrl.storage.files import recorded_error


def main() -> None:
    parser = OverrideParser(
        prog="megatron_vrl.cli.train",
        description="Tune a video language model: SFT warm-up, then GRPO with dual rewards.",
        epilog="Every key, its default and its meaning: docs/config.md.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML, see configs/")
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="with --dry-run: what is not on this machine is a mistake",
    )
    parser.add_argument(
        "--rollouts-only",
        action="store_true",
        help="answer and score the prompts of GRPO's steps into OUT/rollouts, train nothing",
    )
    parser.add_overrides()
    arguments = parser.parse_intermixed_args()
    if arguments.dry_run:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    else:
        take_signals()  # before the imports: threads inherit what is blocked
        end_with_parent()
    cfg = load_config(arguments.config, arguments.overrides)
    silence_libraries()
    rank = int(os.environ.get("RANK", "0"))
    try:
        if arguments.dry_run:
            made = _dry_run(cfg, arguments.strict)
        else:
            with recorded_error(Path(cfg.run.out_dir), rank):
                made = _rollouts(cfg) if arguments.rollouts_only else _job(cfg)
    except StopRequested as stop:
        made = str(stop)
    if rank == 0:
        print(made)


def _job(cfg: RunConfig) -> str:
    from megatron_vrl.trainer.job import is_finished, run_job

    words = ""
    if is_finished(cfg):
        steps = cfg.grpo.steps or cfg.sft.steps
        words = f"{cfg.run.out_dir} is finished ({steps} of {steps} steps); nothing was trained.\n"
    return f"{words}report: {run_job(cfg)}"


def _rollouts(cfg: RunConfig) -> str:
    from megatron_vrl.trainer.rollouts_only import run_rollouts

    return f"rollouts: {run_rollouts(cfg)}"


def _dry_run(cfg: RunConfig, strict: bool) -> str:
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
