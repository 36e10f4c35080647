"""Benchmarks: metrics of a benchmark, and the record of one answered question.

A metric is the mean over questions of one value per question, as a fraction of 1. A missing or
unreadable answer counts 0, and the reason is counted in `failures`. A question without a truth
(open-ended, or without any interval) is unscorable and in no mean.

    r1@t, iou@t, iop@t     fraction of questions with IoU or IoP of at least t; the best of several
                           true intervals counts, as in NExT-GQA's script
    accuracy_gqa           fraction of questions with the right option and IoP of at least 0.5
    map, map@0.5, map@0.75, map_short, map_middle, map_long
                           mean average precision of QVHighlights (average_precision.py); an answer
                           in text is one window, or a window for each interval of a set
    set_iou, set_f1, count_accuracy
                           of questions that ask for every interval (`multi_segment`): IoU and F1 in
                           seconds of the answered and the true set, and the fraction with the right
                           number of intervals. The metrics above take the first interval
    m_avg                  MLVU: mean over its tasks of the accuracy
    miou_by_video,         ActivityNet-RTL: means over videos of the means over a video's questions,
    p@0.5_by_video         as in LITA's script

The protocol decides how answers are read and which truth they are compared with:

    strict         The parser of the rewards reads the answer. The answered and the true interval
                   are compared as they are, also beyond the video. For each answer that the parser
                   reads, the values are those of the official script of the benchmark.
    clipped        The parser of the rewards reads the answer. Both intervals are cut to the video,
                   as in training. A question without a true interval inside the video is
                   unscorable.
    free_text      As strict. An answer that the parser refuses is read as free text (free_text.py).
    temporal_r1    The released parser of Temporal-R1 reads the answer (temporal_r1.py). Nothing is
                   cut.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from megatron_vrl.errors import DataError, counted
from megatron_vrl.evaluation import free_text, temporal_r1
from megatron_vrl.evaluation.average_precision import Window, average_precisions
from megatron_vrl.rewards.interval_sets import length, merge, overlap, set_iou
from megatron_vrl.rewards.temporal_iou import iou
from megatron_vrl.tasks import TASKS
from megatron_vrl.tasks.multi_segment_grounding import MULTI_SEGMENT_GROUNDING
from megatron_vrl.types import Interval, Parsed, Sample

Protocol = Literal["strict", "clipped", "free_text", "temporal_r1"]
THRESHOLDS = (0.3, 0.5, 0.7)
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Annotation format and metrics of a benchmark."""

    form: str  # a row of `megatron_vrl.data.formats.training.READERS`
    metrics: tuple[str, ...]
    by_video: bool = False  # adds the means by video
    above: bool = False  # r1@t counts IoU > t, not >= t
    by_task: bool = False  # adds m_avg over the labels "task/..."


_GROUNDING = ("miou", "r1@0.3", "r1@0.5", "r1@0.7")
_RETRIEVAL = (
    *("r1@0.5", "r1@0.7", "miou", "map", "map@0.5", "map@0.75"),
    *("map_short", "map_middle", "map_long"),
)
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
    "tvgbench": Benchmark(form="tvgbench", metrics=_GROUNDING, above=True),
    "timelens_charades": Benchmark(form="timelens_bench", metrics=_GROUNDING),
    "timelens_activitynet": Benchmark(form="timelens_bench", metrics=_GROUNDING),
    "timelens_qvhighlights": Benchmark(form="timelens_bench", metrics=_GROUNDING),
    "qvhighlights": Benchmark(form="qvhighlights", metrics=_RETRIEVAL),
    "video_mme_subtitles": Benchmark(form="video_mme_subtitles", metrics=("accuracy",)),
    "lvbench": Benchmark(form="lvbench", metrics=("accuracy",)),
    "mlvu": Benchmark(form="mlvu", metrics=("accuracy",), by_task=True),
}
SET_METRICS = ("set_iou", "set_f1", "count_accuracy")  # of questions for every interval
UNSCORABLE = "unscorable"
FAILURES = {
    "unparsable": "answered, but not in a form that can be read",
    "cut_off": "cut at the length limit before an answer",
    "undecodable": "the video could not be read",
    "missing": "no prediction was given",
    UNSCORABLE: "the question has no truth to score by",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Answer to one question: a text, or intervals with scores."""

    id: str
    response: str | None  # None: the video could not be read, or there are only windows
    cut_off: bool = False
    problem: str = ""  # with the video
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question with its answer and scores."""

    sample: Sample
    response: str = ""
    failure: str = ""  # a row of FAILURES, "" for an answer that was read
    reason: str = ""  # explanation of the failure
    interval_s: Interval | None = None
    option: str = ""
    values: Mapping[str, float] = field(default_factory=dict)  # metric -> value of this question

    def record(self) -> dict[str, Any]:
        """Return the item as a row of items.jsonl."""
        sample = self.sample
        return {
            "id": sample.id,
            "video": sample.first_path,
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


def scorable(sample: Sample) -> bool:
    """Return whether the sample has a ground truth to score answers with."""
    return TASKS[sample.task].truth.is_in(sample)


def judged(
    sample: Sample, prediction: Prediction, benchmark: Benchmark, protocol: Protocol
) -> Item:
    """Return the scored item of the prediction for a question."""
    response, windows = prediction.response, prediction.windows
    if not scorable(sample):
        return Item(
            sample=sample,
            response=response or "",
            failure=UNSCORABLE,
            reason=FAILURES[UNSCORABLE],
        )
    if response is None and not windows:
        kind = "undecodable" if prediction.problem else "missing"
        return Item(
            sample=sample,
            failure=kind,
            reason=prediction.problem or FAILURES[kind],
            values=_values(sample, (), "", benchmark, protocol),
        )
    option, reason = "", ""
    if response is not None:
        intervals_s, option, reason = _read(sample, response, protocol)
        windows = tuple((*interval_s, 1.0) for interval_s in intervals_s)
    elif protocol == "clipped":
        windows = _cut(windows, sample.duration_s)
    failure = ("cut_off" if prediction.cut_off else "unparsable") if reason else ""
    return Item(
        sample=sample,
        response=response or "",
        failure=failure,
        reason=reason,
        interval_s=windows[0][:2] if windows else None,
        option=option,
        values=_values(sample, windows, option, benchmark, protocol),
    )


def _cut(windows: Sequence[Window], duration_s: float) -> tuple[Window, ...]:
    """Return the windows cut to the video, without those outside."""
    cut = [(max(0.0, start), min(end, duration_s), score) for start, end, score in windows]
    return tuple(window for window in cut if window[0] < window[1])


def _read(sample: Sample, response: str, protocol: Protocol) -> tuple[Sequence[Interval], str, str]:
    """Return the intervals, the option, and the reason if one of them is missing."""
    task = TASKS[sample.task]
    if protocol != "temporal_r1" or task.truth.intervals == task.truth.option:
        cut = protocol == "clipped"
        parsed = task.parse(response, sample if cut else replace(sample, duration_s=math.inf))
        if parsed.failure and protocol == "free_text":
            return _read_free_text(sample, response, parsed)
        return _intervals(parsed), parsed.option, parsed.failure
    if task.truth.intervals:
        interval_s, failure = temporal_r1.read_interval(response)
        return [interval_s] if interval_s else [], "", failure
    option, failure = temporal_r1.read_option(response)
    return [], option, failure


def _intervals(parsed: Parsed) -> Sequence[Interval]:
    """Return the answered intervals of a task with one interval or with a set of them."""
    return parsed.intervals_s or ([parsed.interval_s] if parsed.interval_s else [])


def _read_free_text(
    sample: Sample, response: str, parsed: Parsed
) -> tuple[Sequence[Interval], str, str]:
    """Return intervals, option, and the reason if one is missing in `parsed` and in free text.

    Free text gives one interval at most.
    """
    truth = TASKS[sample.task].truth
    if truth.record:
        return _intervals(parsed), parsed.option, parsed.failure
    interval_s, option, failures = parsed.interval_s, parsed.option, []
    if truth.intervals and interval_s is None:
        interval_s, failure = free_text.read_interval(response)
        failures.append(failure)
    if truth.option and not option:
        option, failure = free_text.read_option(response, len(sample.options))
        failures.append(failure)
    return [interval_s] if interval_s else [], option, " and ".join(filter(None, failures))


def _values(
    sample: Sample,
    windows: Sequence[Window],
    option: str,
    benchmark: Benchmark,
    protocol: Protocol,
) -> dict[str, float]:
    """Return metric -> value of one answer; the metric is the mean of these values.

    The first of `windows` is the answered interval.
    """
    values: dict[str, float] = {}
    truth = TASKS[sample.task].truth
    interval_s = windows[0][:2] if windows else None
    if truth.option:
        values["accuracy"] = float(option == sample.option)
    if truth.intervals:
        measure = temporal_r1.hull_iou if protocol == "temporal_r1" else _iou
        truths = sample.intervals_s
        best = max((measure(interval_s, t) for t in truths), default=0.0) if interval_s else 0.0
        inside = max((_iop(interval_s, t) for t in truths), default=0.0) if interval_s else 0.0
        values |= {"miou": best, "miop": inside}
        for threshold in THRESHOLDS:
            reached = best > threshold if benchmark.above else best >= threshold
            values[f"r1@{threshold}"] = values[f"iou@{threshold}"] = float(reached)
            values[f"iop@{threshold}"] = float(inside >= threshold)
        if "map" in benchmark.metrics:
            values |= average_precisions(windows, truths)
        if sample.task == MULTI_SEGMENT_GROUNDING.name:
            values |= _set_values(windows, truths)
        if truth.option:
            values["accuracy_gqa"] = values["accuracy"] * values["iop@0.5"]
    return values


def _set_values(windows: Sequence[Window], truths: Sequence[Interval]) -> dict[str, float]:
    """Return the values of SET_METRICS; the answer is the union of the windows."""
    answer_s = merge((start_s, end_s) for start_s, end_s, _ in windows if start_s < end_s)
    truth_s = merge(truths)
    if not answer_s:
        return dict.fromkeys(SET_METRICS, 0.0)
    lengths_s = length(answer_s) + length(truth_s)
    return {
        "set_iou": set_iou(answer_s, truth_s),
        "set_f1": min(1.0, 2.0 * overlap(answer_s, truth_s) / lengths_s),
        "count_accuracy": float(len(answer_s) == len(truth_s)),
    }


def _iou(answer: Interval, truth: Interval) -> float:
    """Return the IoU; 0 for an answer without length."""
    return iou(answer, truth) if answer[0] < answer[1] else 0.0


def _iop(answer: Interval, truth: Interval) -> float:
    """Return overlap / length of the answered interval."""
    overlap = min(answer[1], truth[1]) - max(answer[0], truth[0])
    return max(0.0, overlap) / (answer[1] - answer[0]) if answer[0] < answer[1] else 0.0


def summary(benchmark: Benchmark, items: Sequence[Item], seed: int = 0) -> dict[str, Any]:
    """Return summary.json of an evaluation. `metrics`: name -> {value, low, high}.

    Raises DataError if no question can be scored.
    """
    metrics: dict[str, Any] = {}
    scored = [item for item in items if item.failure != UNSCORABLE]
    if not scored:
        raise DataError(
            f"None of {counted(len(items), 'question')} can be scored; check the annotations."
        )
    asked_for_sets = any(SET_METRICS[0] in item.values for item in scored)
    for name in (*benchmark.metrics, *(SET_METRICS if asked_for_sets else ())):
        values = np.array([item.values[name] for item in scored if name in item.values])
        if len(values):  # no question may have a true interval of that length
            low, high = interval_of_mean(values, seed)
            metrics[name] = {"value": float(values.mean()), "low": low, "high": high}
    if benchmark.by_video:
        metrics["miou_by_video"] = {"value": _by_video(scored, "miou")}
        metrics["p@0.5_by_video"] = {"value": _by_video(scored, "r1@0.5")}
    labels = _by_label(scored, benchmark.metrics[0])
    if benchmark.by_task:
        of_task = [row["accuracy"] for label, row in labels.items() if label.startswith("task/")]
        metrics["m_avg"] = {"value": float(np.mean(of_task))}
    return {
        "num_questions": len(items),
        "scored": len(scored),
        "answered": sum(not item.failure for item in items),
        "failures": {kind: sum(i.failure == kind for i in items) for kind in FAILURES},
        "metrics": metrics,
        "labels": labels,
    }


def interval_of_mean(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the 95 % percentile-bootstrap interval of a mean over questions (Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _by_video(items: Sequence[Item], name: str) -> float:
    """Return the mean over videos of the mean over a video's questions."""
    videos: dict[str, list[float]] = {}
    for item in items:
        videos.setdefault(item.sample.first_path, []).append(item.values[name])
    return float(np.mean([np.mean(values) for values in videos.values()]))


def _by_label(items: Sequence[Item], name: str) -> dict[str, dict[str, float]]:
    """Return label -> mean of the benchmark's first metric and number of questions."""
    labels: dict[str, list[float]] = {}
    for item in items:
        for label in item.sample.labels:
            labels.setdefault(label, []).append(item.values[name])
    return {
        label: {name: float(np.mean(values)), "num_questions": len(values)}
        for label, values in sorted(labels.items())
    }
