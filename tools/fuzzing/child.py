"""The process that fuzzes one target. atheris ends it, with an exit code that says how."""

import sys
from pathlib import Path
from typing import NoReturn

import atheris


def fuzz(name: str, corpus: Path, inputs: int, seconds: int) -> NoReturn:
    """Call the target `inputs` times, or for `seconds`. Inputs that reach new code are kept."""
    with atheris.instrument_imports(include=["megatron_vrl"]):
        from fuzzing.targets import TARGETS
    target = TARGETS[name]
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [f"-runs={inputs}", f"-max_total_time={seconds}", "-print_final_stats=1"]
    options += [f"-artifact_prefix={corpus}/finding-", "-max_len=65536", "-timeout=20"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], target.run)
    atheris.Fuzz()
    raise SystemExit
