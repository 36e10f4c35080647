#!/usr/bin/env python3
"""Compare SFT and GRPO on the quickstart's task from one cold start, over conditions and seeds.

    quickstart_study.py [section.key=value ...] --out runs/study [--ranks 2]
                        [--conditions exact jitter ...] [--arms sft grpo ...] [--seeds 1 2 3]
    quickstart_study.py --out runs/study --table

A condition is a pool of training samples with its labels; an arm is a way to train on it for equal
seconds; tools/studies/settings.py has both, and every setting that was fixed. Seconds become steps
once: the study first measures the seconds of a step of SFT and of GRPO in turn, or takes
--seconds-per-step, so that the load of the machine decides nothing. Seed 1 also chooses the rate of
SFT, on dev. Each arm evaluates the held-out and out-of-domain questions once, at its end.

The study writes OUT/study.json and OUT/table.md after every arm, with 95 % bootstrap intervals.
Finished arms are reused, whichever call ran them; --table runs nothing. `section.key=value`
overrides the quickstart's config in every job; an arm's own settings come after it.
"""

import argparse
from pathlib import Path

from studies.settings import ARMS, CONDITIONS, STEPS

from megatron_vrl.errors import ConfigError
from megatron_vrl.observe.progress import log_written
from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program


def make_parser() -> OverrideParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the study")
    add("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS), help="default all")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default all of the condition")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default 1 2 3")
    add("--ranks", type=int, default=2, help="processes of a job (default: 2)")
    add("--num", type=int, default=3200, help="clips of the quickstart's set (default: 3200)")
    add("--objects", type=int, choices=(1, 2), default=1, help="shapes in a clip (default: 1)")
    add("--steps", default="", metavar="sft=N,grpo=N", help=f"of the arm sft_grpo: {STEPS}")
    add(
        "--seconds-per-step",
        default="",
        metavar="sft=S,grpo=S[,grpo_kl=S]",
        help="instead of measuring them",
    )
    add("--table", action="store_true", help="only write the table of the finished arms")
    parser.add_overrides()
    return parser


def main() -> None:
    arguments = make_parser().parse_intermixed_args()
    from studies.tables import write_results

    out: Path = arguments.out
    if not arguments.table:
        _run(arguments)
    print(write_results(out, arguments.seeds), end="", flush=True)
    log_written(out)


def _run(arguments: argparse.Namespace) -> None:
    """Run the arms that are left, one at a time, and write the results after each."""
    from studies.arms import Study, run_arm
    from studies.jobs import Launcher
    from studies.pools import split_sizes
    from studies.tables import write_results
    from studies.timing import seconds_per_step

    from megatron_vrl.observe.progress import log_line

    out = arguments.out.resolve()
    launcher = Launcher(out=out, ranks=arguments.ranks, overrides=tuple(arguments.overrides))
    study = Study(
        launcher=launcher,
        num=arguments.num,
        objects=arguments.objects,
        budget=_budget(arguments.steps),
    )
    sizes = [w for name, n in split_sizes(study.num).items() for w in ("--split", f"{name}={n}")]
    launcher.tool("make_synthetic.py", "--out", out / "data", "--objects", study.objects, *sizes)
    seconds = seconds_per_step(study, arguments.seconds_per_step)
    for condition in arguments.conditions:
        for seed in arguments.seeds:
            for arm in CONDITIONS[condition].arms:
                if arm in arguments.arms:
                    log_line(f"study: {condition}, seed {seed}, {ARMS[arm]}")
                    run_arm(study, condition, arm, seed, seconds)
                    write_results(out, arguments.seeds)


def _budget(text: str) -> dict[str, int]:
    """Return the steps of the arm sft_grpo, with those of `text`. Raises ConfigError."""
    budget = dict(STEPS)
    for pair in filter(None, text.split(",")):
        name, _, number = pair.partition("=")
        if name not in STEPS or not number.isdigit() or not int(number):
            raise ConfigError(f"--steps {text!r} is not of the form sft=170,grpo=90.")
        budget[name] = int(number)
    return budget


if __name__ == "__main__":
    run_program(main)
