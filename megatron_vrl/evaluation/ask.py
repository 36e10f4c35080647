"""One question about one video, asked as in training: the answer, its reading, and a picture."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vrl.errors import VideoError
from megatron_vrl.evaluation.generate import Answerer, InferenceConfig
from megatron_vrl.observe.timeline_strip import timeline_strip
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import Rollout, VideoSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    video: str
    text: str
    task: str  # a row of TASKS
    options: tuple[str, ...] = ()


def ask(
    cfg: InferenceConfig,
    question: Question,
    picture: Path,
    start: Callable[[InferenceConfig, int], Answerer] = Answerer,
) -> dict[str, Any]:
    """What the checkpoint answers, ready for JSON; the strip of frames is written to `picture`.

    Raises VideoError if the video cannot be read, before an engine starts.
    """
    longest = cfg.evaluation.max_response_tokens
    answerer = start(cfg, longest)
    video = answerer.show(question.video)
    sample = VideoSample(
        id=question.video,
        task=question.task,
        video=question.video,
        duration_s=video.duration_s,
        query=question.text,
        rationale="",
        intervals_s=(),
        options=question.options,
        option="",
    )
    spec = SamplingSpec(n=1, temperature=0.0, top_p=1.0, max_tokens=longest, seed=0)
    ((_, answers),) = answerer.answer([sample], spec, 1)
    if isinstance(answers, VideoError):
        raise answers
    found = _found(sample, answers[0])
    intervals_s = [found["interval_s"]] if found["interval_s"] else []
    picture.parent.mkdir(parents=True, exist_ok=True)
    timeline_strip(video.frames, video.timestamps_s, video.duration_s, intervals_s).save(picture)
    return found | {"strip": str(picture)}


def _found(sample: VideoSample, rollout: Rollout) -> dict[str, Any]:
    parsed = TASKS[sample.task].parse(rollout.text, sample)
    thinking = rollout.text.partition("<think>")[2].rpartition("</think>")[0]
    cut = "the answer was cut at the length limit" if rollout.finish == "length" else ""
    return {
        "task": sample.task,
        "question": sample.query,
        "duration_s": sample.duration_s,
        "response": rollout.text,
        "thinking": thinking.strip(),
        "interval_s": parsed.interval_s,
        "option": parsed.option or None,
        "failure": (parsed.failure and (cut or parsed.failure)) or None,
    }


def told(found: dict[str, Any]) -> str:
    """The same for a person."""
    lines = [f"thinking: {found['thinking']}"] if found["thinking"] else []
    if found["option"]:
        lines.append(f"option:   {found['option']}")
    if found["interval_s"]:
        start_s, end_s = found["interval_s"]
        lines.append(f"interval: {start_s:.1f} s to {end_s:.1f} s of {found['duration_s']:.1f} s")
    if found["failure"]:
        lines.append(f"not read: {found['failure']}; it answered {found['response']!r:.200}")
    return "\n".join(lines)
