"""Annotation files of a run, parsed once in a process.

The start-up check and the run itself need the same samples. `Datasets` keeps what the check parsed.
Sources whose records have no duration are an exception: the check opens no video and passes a
function that invents durations, so these sources are parsed again with the real ones.
"""

from collections.abc import Sequence

from megatron_vrl.config import Source
from megatron_vrl.data.formats.records import HeaderDuration
from megatron_vrl.data.media_limits import DEFAULT_LIMITS, MediaLimits
from megatron_vrl.data.mix import load, open_pool
from megatron_vrl.data.pool import Pool, is_indexed
from megatron_vrl.types import Sample

Key = tuple[str, ...]  # the sources as JSON


class Datasets:
    """Samples and pools of a process by their sources. Raises what `load` and `open_pool` raise."""

    def __init__(self, seed: int, limits: MediaLimits = DEFAULT_LIMITS) -> None:
        """`seed` decides what `sampling_strategy: random:N` keeps."""
        self._seed, self._limits = seed, limits
        self._samples: dict[Key, list[Sample]] = {}
        self._pools: dict[Key, Pool] = {}

    def load(self, sources: Sequence[Source], header_duration_s: HeaderDuration) -> list[Sample]:
        """Return the samples of all sources in their order."""
        key = _key(sources)
        if key in self._samples:
            return self._samples[key]
        duration_s = _Counted(header_duration_s)
        samples = load(sources, self._seed, duration_s, self._limits)
        if not duration_s.calls:
            self._samples[key] = samples
        return samples

    def open_pool(self, sources: Sequence[Source], header_duration_s: HeaderDuration) -> Pool:
        """Return the pool of all sources. `header_duration_s` may be called when one is drawn."""
        key = _key(sources)
        if key in self._pools:
            return self._pools[key]
        duration_s = _Counted(header_duration_s)
        pool = open_pool(sources, self._seed, duration_s, self._limits)
        if not duration_s.calls and not any(map(is_indexed, sources)):
            self._pools[key] = pool
        return pool


class _Counted:
    """Function that counts its calls."""

    def __init__(self, function: HeaderDuration) -> None:
        self._function, self.calls = function, 0

    def __call__(self, path: str) -> float:
        self.calls += 1
        return self._function(path)


def _key(sources: Sequence[Source]) -> Key:
    """Return the sources as a dictionary key."""
    return tuple(source.model_dump_json() for source in sources)
