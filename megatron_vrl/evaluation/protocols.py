"""Benchmarks: which questions, which numbers, and how an answer to one becomes a record.

Every number but one is the mean of a value of each question. An answer that could not be read or
was not given counts 0, so that n questions go in and n are divided by; why there was no answer is
counted apart. A question without a truth to score by (open-ended, no interval within the video) is
counted as unscorable and in no mean. `r1@t`, `iou@t` and `iop@t` count values >= t; IoU and IoP
take the best of several true intervals (as NExT-GQA's own script does). `accuracy_gqa` counts right
options whose interval has IoP >= 0.5. The exception is ActivityNet-RTL's `miou_by_video` and
`p@0.5_by_video`, means over videos of means over their questions, as LITA's script has them.
Shares, not percent.

The project's protocol reads answers strictly and cuts both the true and the answered interval at
the video's ends; the seed's neither clips nor orders (megatron_vrl/evaluation/temporal_r1.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from megatron_vrl.errors import DataError, counted
from megatron_vrl.evaluation import temporal_r1
from megatron_vrl.rewards.temporal_iou import iou
from megatron_vrl.tasks import TASKS, can_be_asked
from megatron_vrl.types import Interval, VideoSample

Protocol = Literal["strict", "temporal_r1"]
THRESHOLDS = (0.3, 0.5, 0.7)
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    form: str  # a row of `megatron_vrl.data.formats.training.READERS`
    metrics: tuple[str, ...]
    by_video: bool = False


_GROUNDING = ("miou", "r1@0.3", "r1@0.5", "r1@0.7")
_GQA = ("accuracy", "miou", "miop", "iou@0.3", "iou@0.5", "iop@0.3", "iop@0.5", "accuracy_gqa")

BENCHMARKS: dict[str, Benchmark] = {
    "charades_sta": Benchmark(form="charades_sta", metrics=_GROUNDING),
    "activitynet": Benchmark(form="charades_sta", metrics=_GROUNDING),
    "activitynet_rtl": Benchmark(form="activitynet_rtl", metrics=_GROUNDING, by_video=True),
    "nextgqa": Benchmark(form="next_gqa", metrics=_GQA),
    "mvbench": Benchmark(form="mvbench", metrics=("accuracy",)),
    "tempcompass": Benchmark(form="tempcompass", metrics=("accuracy",)),
    "video_mme": Benchmark(form="video_mme", metrics=("accuracy",)),
    "mmvu": Benchmark(form="mmvu", metrics=("accuracy",)),
    "tvgbench": Benchmark(form="tvgbench", metrics=_GROUNDING),
}
UNSCORABLE = "unscorable"
FAILURES = {
    "unparsable": "answered, but not in a form that can be read",
    "cut_off": "cut at the length limit before an answer",
    "undecodable": "the video could not be read",
    "missing": "no prediction was given",
    UNSCORABLE: "the question has no truth to score by",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question with what was answered."""

    sample: VideoSample
    response: str = ""
    failure: str = ""  # a row of FAILURES, "" for an answer that was read
    reason: str = ""  # of the failure, in words
    interval_s: Interval | None = None
    option: str = ""
    values: Mapping[str, float] = field(default_factory=dict)  # metric -> value of this question

    def record(self) -> dict[str, Any]:
        """Ready for JSON."""
        sample = self.sample
        return {
            "id": sample.id,
            "video": sample.video,
            "labels": list(sample.labels),
            "response": self.response,
            "failure": self.failure or None,
            "reason": self.reason or None,
            "interval_s": self.interval_s,
            "option": self.option or None,
            "true_intervals_s": sample.intervals_s,
            "true_option": sample.option or None,
            "values": dict(self.values),
        }


def judged(
    sample: VideoSample, response: str | None, protocol: Protocol, *, cut_off: bool, problem: str
) -> Item:
    """`response` None: there is none, since the video was not read (`problem`) or it is missing."""
    if not can_be_asked(sample):
        return Item(
            sample=sample,
            response=response or "",
            failure=UNSCORABLE,
            reason=FAILURES[UNSCORABLE],
        )
    if response is None:
        kind = "undecodable" if problem else "missing"
        return _failed(Item(sample=sample, failure=kind, reason=problem or FAILURES[kind]))
    interval_s, option, reason = _read(sample, response, protocol)
    failure = ("cut_off" if cut_off else "unparsable") if reason else ""
    return Item(
        sample=sample,
        response=response,
        failure=failure,
        reason=reason,
        interval_s=interval_s,
        option=option,
        values=_values(sample, interval_s, option, protocol),
    )


def _read(
    sample: VideoSample, response: str, protocol: Protocol
) -> tuple[Interval | None, str, str]:
    """(interval, option, why one of them is missing)."""
    task = TASKS[sample.task]
    if protocol == "strict" or task.truth.intervals == task.truth.option:
        parsed = task.parse(response, sample)
        return parsed.interval_s, parsed.option, parsed.failure
    if task.truth.intervals:
        interval_s, failure = temporal_r1.read_interval(response)
        return interval_s, "", failure
    option, failure = temporal_r1.read_option(response)
    return None, option, failure


def _values(
    sample: VideoSample, interval_s: Interval | None, option: str, protocol: Protocol
) -> dict[str, float]:
    """Return metric -> value of one answer; the metric is the mean of these values."""
    values: dict[str, float] = {}
    truth = TASKS[sample.task].truth
    if truth.option:
        values["accuracy"] = float(option == sample.option)
    if truth.intervals:
        measure = temporal_r1.hull_iou if protocol == "temporal_r1" else iou
        truths = sample.intervals_s
        best = max((measure(interval_s, t) for t in truths), default=0.0) if interval_s else 0.0
        inside = max((_iop(interval_s, t) for t in truths), default=0.0) if interval_s else 0.0
        values |= {"miou": best, "miop": inside}
        for threshold in THRESHOLDS:
            values[f"r1@{threshold}"] = values[f"iou@{threshold}"] = float(best >= threshold)
            values[f"iop@{threshold}"] = float(inside >= threshold)
        if truth.option:
            values["accuracy_gqa"] = values["accuracy"] * values["iop@0.5"]
    return values


def _failed(item: Item) -> Item:
    return Item(
        sample=item.sample,
        failure=item.failure,
        reason=item.reason,
        values=_values(item.sample, None, "", "strict"),
    )


def _iop(answer: Interval, truth: Interval) -> float:
    overlap = min(answer[1], truth[1]) - max(answer[0], truth[0])
    return max(0.0, overlap) / (answer[1] - answer[0]) if answer[0] < answer[1] else 0.0


def summary(benchmark: Benchmark, items: Sequence[Item], seed: int = 0) -> dict[str, Any]:
    """All numbers of an evaluation, ready for JSON; `metrics` has {value, low, high} by name.

    Raises DataError if no question can be scored.
    """
    metrics: dict[str, Any] = {}
    scored = [item for item in items if item.failure != UNSCORABLE]
    if not scored:
        raise DataError(
            f"None of {counted(len(items), 'question')} can be scored; check the annotations."
        )
    for name in benchmark.metrics:
        values = np.array([item.values[name] for item in scored])
        low, high = interval_of_mean(values, seed)
        metrics[name] = {"value": float(values.mean()), "low": low, "high": high}
    if benchmark.by_video:
        metrics["miou_by_video"] = {"value": _by_video(scored, "miou")}
        metrics["p@0.5_by_video"] = {"value": _by_video(scored, "r1@0.5")}
    return {
        "num_questions": len(items),
        "scored": len(scored),
        "answered": sum(not item.failure for item in items),
        "failures": {kind: sum(i.failure == kind for i in items) for kind in FAILURES},
        "metrics": metrics,
        "labels": _by_label(scored, benchmark.metrics[0]),
    }


def interval_of_mean(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the mean over questions (Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _by_video(items: Sequence[Item], name: str) -> float:
    videos: dict[str, list[float]] = {}
    for item in items:
        videos.setdefault(item.sample.video, []).append(item.values[name])
    return float(np.mean([np.mean(values) for values in videos.values()]))


def _by_label(items: Sequence[Item], name: str) -> dict[str, dict[str, float]]:
    """Label -> mean of the benchmark's first metric, and how many questions it has."""
    labels: dict[str, list[float]] = {}
    for item in items:
        for label in item.sample.labels:
            labels.setdefault(label, []).append(item.values[name])
    return {
        label: {name: float(np.mean(values)), "num_questions": len(values)}
        for label, values in sorted(labels.items())
    }
