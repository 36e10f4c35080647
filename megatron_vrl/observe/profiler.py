"""Traces of chosen steps, operation by operation: `OUT/traces/grpo-000003-rank0000.json.gz`.

By torch.profiler; ui.perfetto.dev and chrome://tracing open them. A step's phases, those of
metrics.jsonl, stand in it as ranges. What other processes do, workers or decoders, is not in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile

from megatron_vrl.config import Observe


class StepProfiler:
    def __init__(self, out_dir: Path, cfg: Observe, rank: int) -> None:
        self._folder = out_dir / "traces"
        self._steps = frozenset(cfg.profile_steps) if rank in cfg.profile_ranks else frozenset()
        self._rank = rank

    @contextmanager
    def __call__(self, phase: str, step: int) -> Iterator[None]:
        """Around the work of a step, from 1, without its report, evaluation and checkpoint."""
        if step not in self._steps:
            yield
            return
        with profile() as trace:  # of all that this machine has: CPU, and GPU where there is one
            yield
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{phase}-{step:06}-rank{self._rank:04}.json.gz"
        trace.export_chrome_trace(str(self._folder / name))
