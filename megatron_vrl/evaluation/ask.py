"""Ask a checkpoint one question about videos and images: the parsed answer, and a picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_vrl.data.media_limits import limits_of
from megatron_vrl.errors import ConfigError, VideoError
from megatron_vrl.evaluation.generate import Answerer, InferenceConfig
from megatron_vrl.observe.samples import picture_of
from megatron_vrl.observe.timeline_strip import timeline_strip
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import EncodedVideo, Interval, Media, Rollout, Sample, Visual


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    media: tuple[Media, ...]  # in the order shown; () for text alone
    text: str
    task: str  # a row of TASKS
    options: tuple[str, ...] = ()


def ask(
    cfg: InferenceConfig,
    question: Question,
    picture: Path,
    start: Callable[[InferenceConfig, int], Answerer] = Answerer,
) -> dict[str, Any]:
    """Return the checkpoint's answer as JSON values, and write the frames and images to `picture`.

    Nothing is written for text alone. Raises VideoError if a file cannot be read, and ConfigError
    if there are more files than the configuration allows, before an engine starts.
    """
    longest = cfg.evaluation.max_response_tokens
    answerer = start(cfg, longest)
    visuals = answerer.read(question.media)
    videos = [visual for visual in visuals if isinstance(visual, EncodedVideo)]
    sample = Sample(
        id=question.media[0].path if question.media else "the question",
        task=question.task,
        media=question.media,
        duration_s=videos[0].duration_s if len(videos) == 1 else 0.0,
        query=question.text,
        rationale="",
        intervals_s=(),
        options=question.options,
        option="",
    )
    if sentence := limits_of(cfg.data).problem(sample):
        raise ConfigError(f"The question cannot be asked: {sentence}")
    ((_, answer),) = answerer.answer_greedily([sample], longest, 1)
    if isinstance(answer, VideoError):
        raise answer
    result = _parsed(sample, answer)
    if not visuals:
        return result
    intervals_s = result.get("intervals_s") or list(filter(None, [result["interval_s"]]))
    picture.parent.mkdir(parents=True, exist_ok=True)
    _picture(visuals, intervals_s).save(picture)
    return result | {"strip": str(picture)}


def _picture(visuals: Sequence[Visual], intervals_s: Sequence[Interval]) -> Image.Image:
    """Return the media; a video alone has the intervals on a time axis."""
    first = visuals[0]
    if len(visuals) == 1 and isinstance(first, EncodedVideo):
        return timeline_strip(first.frames, first.timestamps_s, first.duration_s, intervals_s)
    return picture_of(visuals)


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
