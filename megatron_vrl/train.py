"""Train: `torchrun --nproc-per-node N -m megatron_vrl.train --config FILE [section.key=value ...]`.

Without torchrun it is one process. `--dry-run` checks the config, the layout and the files and
prints the resolved config; `--rollouts-only` makes rollouts and trains nothing. A mistake of the
user's is one sentence and exit code 2.
"""

import argparse
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import yaml

from megatron_vrl.config import RunConfig, load_config
from megatron_vrl.errors import StopRequested
from megatron_vrl.observe.files import error_kept
from megatron_vrl.observe.quiet import hush_libraries
from megatron_vrl.program import run_program


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="megatron_vrl.train",
        description="Tune a video language model: SFT warm-up, then GRPO with dual rewards.",
        epilog="Every key, its default and its meaning: docs/config.md.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML, see configs/")
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    parser.add_argument(
        "--rollouts-only",
        action="store_true",
        help="answer and score the prompts of GRPO's steps into OUT/rollouts, train nothing",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replace a value of the file"
    )
    arguments = parser.parse_intermixed_args()
    cfg = load_config(arguments.config, arguments.overrides)
    hush_libraries()
    try:
        if arguments.dry_run:
            made = _dry_run(cfg)
        else:
            made = _rollouts(cfg) if arguments.rollouts_only else _job(cfg)
    except StopRequested as stop:
        made = str(stop)
    if os.environ.get("RANK", "0") == "0":
        print(made)


def _job(cfg: RunConfig) -> str:
    # Asks to stop, see loops/stop.py. Before the imports: threads inherit it, too.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    from megatron_vrl.loops.job import run_job

    first = os.environ.get("RANK", "0") == "0"
    with error_kept(Path(cfg.run.out_dir)) if first else nullcontext():
        return f"report: {run_job(cfg)}"


def _rollouts(cfg: RunConfig) -> str:
    from megatron_vrl.loops.rollouts_only import run_rollouts

    return f"rollouts: {run_rollouts(cfg)}"


def _dry_run(cfg: RunConfig) -> str:
    from megatron_vrl.loops.dry_run import check

    world = int(os.environ.get("WORLD_SIZE", "0")) or cfg.parallel.processes or 1
    notes = check(cfg, world)
    resolved = yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)
    return resolved + "\n".join(f"# {note}" for note in notes)


if __name__ == "__main__":
    run_program(main)
