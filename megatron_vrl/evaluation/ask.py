"""Ask a checkpoint one question about one video: the parsed answer, and a strip of frames."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vrl.errors import VideoError
from megatron_vrl.evaluation.generate import Answerer, InferenceConfig
from megatron_vrl.observe.timeline_strip import timeline_strip
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import Rollout, Sample, VideoClip


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
    """Return the checkpoint's answer as JSON values, and write the strip of frames to `picture`.

    Raises VideoError if the video cannot be read, before an engine starts.
    """
    longest = cfg.evaluation.max_response_tokens
    answerer = start(cfg, longest)
    video = answerer.decode(question.video)
    sample = Sample(
        id=question.video,
        task=question.task,
        media=(VideoClip(question.video),),
        duration_s=video.duration_s,
        query=question.text,
        rationale="",
        intervals_s=(),
        options=question.options,
        option="",
    )
    ((_, answer),) = answerer.answer_greedily([sample], longest, 1)
    if isinstance(answer, VideoError):
        raise answer
    result = _parsed(sample, answer)
    intervals_s = result.get("intervals_s") or list(filter(None, [result["interval_s"]]))
    picture.parent.mkdir(parents=True, exist_ok=True)
    timeline_strip(video.frames, video.timestamps_s, video.duration_s, intervals_s).save(picture)
    return result | {"strip": str(picture)}


def _parsed(sample: Sample, rollout: Rollout) -> dict[str, Any]:
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
        **({"intervals_s": parsed.intervals_s} if parsed.intervals_s else {}),
        "option": parsed.option or None,
        **({} if parsed.value is None else {"value": parsed.value}),
        "failure": (parsed.failure and (cut or parsed.failure)) or None,
    }


def as_text(result: dict[str, Any]) -> str:
    """Return the result of `ask` as lines for a terminal."""
    lines = [f"thinking: {result['thinking']}"] if result["thinking"] else []
    if result["option"]:
        lines.append(f"option:   {result['option']}")
    if "value" in result:
        lines.append(f"answer:   {result['value']}")
    for start_s, end_s in result.get("intervals_s") or filter(None, [result["interval_s"]]):
        lines.append(f"interval: {start_s:.1f} s to {end_s:.1f} s of {result['duration_s']:.1f} s")
    if result["failure"]:
        lines.append(f"not read: {result['failure']}; it answered {result['response']!r:.200}")
    return "\n".join(lines)
