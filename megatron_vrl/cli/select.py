"""Select training samples by the standard deviation of their rewards.

    mvrl select --config RUN.yaml [--pool POOL.yaml] --out DIR [--rules-only] [--shard I/N]
                [section.key=value ...]

The command generates selection.answers answers to every sample of the pool with the checkpoint,
prompts, videos and rewards of the run, keeps the samples whose rewards give a learning signal, and
records why the others were dropped. POOL is a YAML file with `datasets`, a list of sources; without
it the pool is the run's data.train. Train on the kept samples with data.selection=DIR/kept.jsonl.

Prompts and videos follow RUN.yaml, not the checkpoint's inference.yaml as in `mvrl ask` and
`mvrl evaluate`: a selection made with other prompts or frames would not fit the run that trains.

DIR/answers-*.jsonl keep every raw answer. The same command resumes a stopped selection. When all
answers are there, and with --rules-only, it applies the rules of section `selection` (and the
weights of `rewards`) without inference. --shard 0/4 answers a quarter of the pool, so that four
processes can divide the pool; afterwards call the command once with --rules-only. One process at a
time may answer a shard or apply the rules. The rules are in docs/selection.md. Exit code 1:
everything is written, but more than video.max_bad_fraction of the samples have a video that cannot
be read; 2: a mistake, in one sentence.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vrl.errors import ConfigError, counted
from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program

if TYPE_CHECKING:
    from megatron_vrl.config import RunConfig


def make_parser() -> OverrideParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="YAML of the run that will train")
    add("--pool", default="", metavar="FILE", help="YAML with datasets (default: data.train)")
    add("--out", required=True, type=Path, metavar="DIR", help="folder of answers and selection")
    add("--rules-only", action="store_true", help="apply the rules to stored answers")
    add("--shard", default="0/1", metavar="I/N", help="answer the I-th of N shards of the pool")
    parser.add_overrides()
    return parser


def main() -> int:
    arguments = make_parser().parse_intermixed_args()
    from megatron_vrl.config import load_config

    if arguments.pool:
        _check_pool(arguments.pool)
    pool_override = [f"data.train={json.dumps(arguments.pool)}"] if arguments.pool else []
    cfg = load_config(arguments.config, [*arguments.overrides, *pool_override])
    return _select(arguments, cfg, _parse_shard(arguments.shard))


def _select(arguments: argparse.Namespace, cfg: "RunConfig", shard: tuple[int, int]) -> int:
    from megatron_vrl.observe.progress import log_written
    from megatron_vrl.observe.silence_logs import silence_libraries

    silence_libraries()
    from megatron_vrl.process.run_lock import owned
    from megatron_vrl.selection.select import apply_rules, collect_answers, pool

    out: Path = arguments.out
    samples = pool(cfg)
    if not arguments.rules_only:
        with owned(out, f"lock-{shard[0]}"):
            collect_answers(cfg, samples, out, shard)
        if shard[1] > 1:
            print(f"shard {arguments.shard} is answered", flush=True)
            log_written(out)
            return 0
    with owned(out, "lock-rules"):
        candidates = apply_rules(cfg, samples, out)
    kept = sum(candidate.verdict == "kept" for candidate in candidates)
    warning = _too_many_bad_videos(cfg, candidates)
    if warning:
        print(f"error: {warning}", file=sys.stderr)
    print(f"kept {kept} of {counted(len(candidates), 'sample')}; see report.html", flush=True)
    log_written(out)
    return 1 if warning else 0


def _too_many_bad_videos(cfg: "RunConfig", candidates: list[Any]) -> str:
    """Return a sentence if too many videos cannot be read, else ""."""
    from megatron_vrl.evaluation.predict import too_many_bad
    from megatron_vrl.selection.rules import UNDECODABLE

    bad = [c.id for c in candidates if c.verdict == UNDECODABLE]
    return too_many_bad(bad, len(candidates), cfg.video.max_bad_fraction)


def _check_pool(path: str) -> None:
    """Raise ConfigError if the file holds no list of sources."""
    from megatron_vrl.config.loader import read_mix

    try:
        read_mix(path)
    except ValueError as error:
        raise ConfigError(f"--pool {error}: correct it.") from None


def _parse_shard(text: str) -> tuple[int, int]:
    """Return (I, N) of the text "I/N". Raise ConfigError if it has another form."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ConfigError(f"--shard {text!r} is not I/N with I from 0 to N - 1.")
    return int(index), int(count)


if __name__ == "__main__":
    run_program(main)
