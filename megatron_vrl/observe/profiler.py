"""StepProfiler: torch profiler traces of chosen steps: `OUT/traces/grpo-000003-rank0000.json.gz`.

Open them with ui.perfetto.dev or chrome://tracing. The phases of metrics.jsonl appear as ranges.
Other processes (rollout workers, decoding processes) are not traced.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile

from megatron_vrl.config import Observe


class StepProfiler:
    """Traces the steps of `observe.profile_steps` on the ranks of `observe.profile_ranks`."""

    def __init__(self, out_dir: Path, cfg: Observe, rank: int) -> None:
        self._folder = out_dir / "traces"
        self._steps = frozenset(cfg.profile_steps) if rank in cfg.profile_ranks else frozenset()
        self._rank = rank

    @contextmanager
    def __call__(self, phase: str, step: int) -> Iterator[None]:
        """Trace the work of a step without its report, evaluation and checkpoint."""
        if step not in self._steps:
            yield
            return
        with profile() as trace:  # CPU, and GPU if there is one
            yield
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{phase}-{step:06}-rank{self._rank:04}.json.gz"
        trace.export_chrome_trace(str(self._folder / name))
