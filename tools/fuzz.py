#!/usr/bin/env python3
"""Fuzz the parsers of untrusted input, guided by coverage, and print how many inputs were tried.

    fuzz.py [TARGET ...] [--inputs 100000] [--seconds 600] [--corpus DIR]

Each target runs in a process of its own until it has had its inputs or its seconds, or raises
anything but the program's own error. Such an input is a finding: it is printed with its traceback
and kept in the corpus as finding-*, and the exit code is 1. --corpus keeps the inputs that reached
new code, and a later call goes on from them.

It needs atheris: pip install atheris.
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_vrl.errors import ConfigError, counted
from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program

NAMES = (
    "answers",
    "reward_input",
    "annotations",
    "config",
    "worker_messages",
    "stored_rollouts",
    "model_config",
    "safetensors_header",
)


def make_parser() -> OverrideParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("targets", nargs="*", metavar="TARGET", help=f"default all: {', '.join(NAMES)}")
    add("--inputs", type=int, default=100_000, metavar="N", help="of a target (default 100000)")
    add("--seconds", type=int, default=600, metavar="S", help="of a target, at most (default 600)")
    add("--corpus", type=Path, metavar="DIR", help="folder of inputs, one folder for each target")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    arguments = make_parser().parse_args()
    if unknown := set(arguments.targets) - set(NAMES):
        raise ConfigError(f"{unknown.pop()!r} is not a target: give some of {', '.join(NAMES)}.")
    if importlib.util.find_spec("atheris") is None:
        raise ConfigError("atheris is not installed: run pip install atheris.")
    if arguments.child:
        from fuzzing.child import fuzz

        fuzz(arguments.targets[0], arguments.corpus, arguments.inputs, arguments.seconds)
    with tempfile.TemporaryDirectory() as folder:
        corpus = arguments.corpus or Path(folder)
        found = [
            run(name, corpus / name, arguments.inputs, arguments.seconds)
            for name in arguments.targets or NAMES
        ]
    total, findings = sum(tried for tried, _ in found), sum(bad for _, bad in found)
    print(f"in all: {total:,} inputs, {counted(findings, 'finding')}")
    return int(any(bad for _, bad in found))


def run(name: str, corpus: Path, inputs: int, seconds: int) -> tuple[int, bool]:
    """Fuzz one target in a process; return the number of inputs, and whether one is a finding."""
    corpus.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, name, "--child", "--corpus", str(corpus)]
    command += ["--inputs", str(inputs), "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    tried = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
    if not tried:
        raise ConfigError(f"The process of {name} ended early: {done.stderr[-2000:]}")
    covered = re.findall(r" cov: (\d+)", done.stderr)
    is_bad = done.returncode != 0
    if is_bad:
        print(_reason(done.stderr))
    print(
        f"{name}: {int(tried[-1]):,} inputs, {covered[-1] if covered else 0} branches, "
        f"{'a finding' if is_bad else 'nothing found'}",
        flush=True,
    )
    return int(tried[-1]), is_bad


def _reason(printed: str) -> str:
    """Return the traceback of a finding and the file that holds its input."""
    _, _, traceback = printed.rpartition("=== Uncaught Python exception: ===")
    return traceback.partition("stat::")[0][-6000:].strip()


if __name__ == "__main__":
    run_program(main)
