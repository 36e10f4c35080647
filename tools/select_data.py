#!/usr/bin/env python3
"""Variance-aware selection of training data.

    select_data.py --config RUN.yaml [--pool POOL.yaml] --out DIR [--rules-only] [--share I/N]
                   [section.key=value ...]

Samples selection.answers answers to every sample of the pool with the run's checkpoint, prompts,
videos and rewards, keeps those that have something to teach, and says why the others were dropped.
POOL is a YAML file with `datasets`, a list of sources; without it the pool is the run's data.train.
Train on what was kept with data.selection=DIR/kept.jsonl.

The checkpoint is asked by RUN.yaml, not by its inference.yaml as in ask.py and evaluate.py: the run
that trains on the choice asks by RUN.yaml, and a choice made with other prompts or frames would not
be one for that run.

DIR/answers-*.jsonl keep every raw answer. The same command goes on where it was stopped; when all
answers are there, and with --rules-only, it applies the rules of section `selection` (and rewards'
weights) anew without inference. --share 0/4 answers a quarter of the pool, so that four processes
can share it; then call once with --rules-only. One call at a time may answer a share, or apply the
rules. docs/selection.md has the rules. Exit code 1: everything is written, but more than
video.max_bad_fraction of the samples have a video that cannot be read; 2: a mistake, in one
sentence.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_vrl.errors import ConfigError, counted
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import run_program


def main() -> int:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML of the run that will train"
    )
    parser.add_argument(
        "--pool", default="", metavar="FILE", help="YAML with datasets, default data.train"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder of answers and choice"
    )
    parser.add_argument(
        "--rules-only",
        action="store_true",
        help="apply the rules to the answers there, no inference",
    )
    parser.add_argument(
        "--share", default="0/1", metavar="I/N", help="answer the I-th of N parts of the pool"
    )
    parser.add_overrides()
    arguments = parser.parse_intermixed_args()
    return _select(arguments)


def _select(arguments: argparse.Namespace) -> int:
    from megatron_vrl.config import load_config
    from megatron_vrl.observe.progress import log_written
    from megatron_vrl.observe.silence_logs import silence_libraries
    from megatron_vrl.process.run_lock import owned

    if arguments.pool:
        _check_pool(arguments.pool)
    pool_override = [f"data.train={json.dumps(arguments.pool)}"] if arguments.pool else []
    cfg = load_config(arguments.config, [*arguments.overrides, *pool_override])
    share = _share(arguments.share)
    silence_libraries()
    from megatron_vrl.evaluation.predict import too_many_bad
    from megatron_vrl.selection.rules import UNDECODABLE
    from megatron_vrl.selection.select import apply_rules, collect_answers, pool

    samples = pool(cfg)
    if not arguments.rules_only:
        with owned(arguments.out, f"lock-{share[0]}"):
            collect_answers(cfg, samples, arguments.out, share)
    if share[1] > 1 and not arguments.rules_only:
        print(f"share {arguments.share} is answered", flush=True)
        log_written(arguments.out)
        return 0
    with owned(arguments.out, "lock-rules"):
        chosen = apply_rules(cfg, samples, arguments.out)
    kept = sum(found.verdict == "kept" for found in chosen)
    bad = [found.id for found in chosen if found.verdict == UNDECODABLE]
    complaint = too_many_bad(bad, len(chosen), cfg.video.max_bad_fraction)
    if complaint:
        print(f"error: {complaint}", file=sys.stderr)
    print(f"kept {kept} of {counted(len(chosen), 'sample')}; see report.html", flush=True)
    log_written(arguments.out)
    return 1 if complaint else 0


def _check_pool(path: str) -> None:
    """Raise ConfigError if the file holds no list of sources."""
    from megatron_vrl.config.loader import read_mix

    try:
        read_mix(path)
    except ValueError as error:
        raise ConfigError(f"--pool {error}: correct it.") from None


def _share(text: str) -> tuple[int, int]:
    which, _, of = text.partition("/")
    if not (which.isdigit() and of.isdigit() and int(which) < int(of)):
        raise ConfigError(f"--share {text!r} is not I/N with I from 0 to N - 1.")
    return int(which), int(of)


if __name__ == "__main__":
    run_program(main)
