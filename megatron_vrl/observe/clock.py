"""Where a step's seconds go, and the most memory a process ever held.

Wall time of the calling process. GPU work is not waited for: a phase that only launches kernels
looks short, and the one that reads their result pays.
"""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import record_function


class Clock:
    """`with clock("rollout"): ...` adds to that phase. Nested phases count once, for the inner one;
    time outside any is "other", so the phases of `take` add up to the time since the last one. In
    a trace they are ranges."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._phase, self._since = "other", time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer = self._phase
        self._switch(phase)
        try:
            with record_function(phase):
                yield
        finally:
            self._switch(outer)

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call; starts again from zero."""
        self._switch(self._phase)
        taken, self._seconds = self._seconds, {}
        return taken

    def _switch(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now


def peak_rss_bytes() -> int:
    """Most resident memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
