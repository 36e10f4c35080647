"""Clock: wall time of a step by phase. Also peak memory of the process.

GPU work is asynchronous: a phase that only launches kernels looks short, and the phase that waits
for their result looks long.
"""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import record_function


class Clock:
    """Adds up wall time by phase: `with clock("rollout"): ...`.

    In nested phases, time counts for the inner phase only. Time outside of all phases counts as
    "other". So the phases returned by `take` add up to the time since the previous `take`. Phases
    appear as ranges in profiler traces.

    Example: "update" for 5 s, of which 2 s in a nested "logprobs", then 1 s of nothing, gives
    {"update": 3.0, "logprobs": 2.0, "other": 1.0}.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._phase, self._since = "other", time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time of the `with` block for `phase`."""
        outer = self._phase
        self._switch(phase)
        try:
            with record_function(phase):
                yield
        finally:
            self._switch(outer)

    def take(self) -> dict[str, float]:
        """Return seconds by phase since the last call, and reset."""
        self._switch(self._phase)
        taken, self._seconds = self._seconds, {}
        return taken

    def _switch(self, phase: str) -> None:
        """Add the time since the last switch to the current phase, then make `phase` current."""
        now = time.perf_counter()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB
