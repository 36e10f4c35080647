"""Readers of multiple-choice benchmarks of long videos, and of Video-MME with subtitles.

  lvbench              {key, type, video_info {duration_minutes}, qa [{uid, question, answer "C",
                       question_type [...]}]}, one video a line: video_info.meta.jsonl. The text of
                       a question ends with its options; the video of key X is X.mp4
  mlvu                 [{video, duration, question, candidates, answer (its text),
                       question_type}], the folder of the files 1_plotQA.json ... of the dev set, or
                       one of them; videos are in a folder named after the file
  video_mme_subtitles  the rows of `video_mme`, with the subtitles of video X in subtitle/X.srt
                       beside the file of annotations; a video without that file has none

Sources: the data set card of LVBench and its reader in VLMEvalKit (vlmeval/dataset/lvbench.py in
MCG-NJU/TimeLens2 a5ce450), JUNJIE99/MLVU fd060c1 (data, evaluation), lmms-eval 75571cf
(tasks/videomme/utils.py).

The text of the subtitles precedes the question. It holds all subtitles of the video, where
lmms-eval can also take only those at its sampled frames; which ones belong to published numbers is
unknown. LVBench publishes no file names, since its videos are downloaded by key. MLVU's files
8_sub_scene and 9_summary ask for free texts and need a language model as judge: their questions
have no options. Not supported: MLVU's test set, whose answers are not in its file.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from string import ascii_uppercase

from pydantic import Field, TypeAdapter

from megatron_vrl.config import Source
from megatron_vrl.data.formats.benchmarks import VideoMme, video_mme
from megatron_vrl.data.formats.records import (
    HeaderDuration,
    Name,
    Options,
    Reader,
    Record,
    Seconds,
    choice_sample,
    option_texts,
    video_file,
    video_path,
)
from megatron_vrl.errors import DataError
from megatron_vrl.types import Sample, VideoClip

SUBTITLES = "This video's subtitles are listed below:\n{text}\n{question}"
NO_SUBTITLES = "No subtitles available"
NO_LETTER = "@"  # of a question whose answer is no candidate: as in MLVU's script, none is right
_TIMES = re.compile(r"\d+:\d\d:\d\d[,.]\d+ --> \d+:\d\d:\d\d[,.]\d+")
_MARK = re.compile(r"\(([A-Z])\)")
_TAG = re.compile(r"<[^>]*>")


class LvBenchQuestion(Record):
    """Question of LVBench. Options are lines of `question`."""

    uid: Name | int
    question: str
    answer: str
    question_type: list[str] = Field(default_factory=list)


class LvBenchInfo(Record):
    """Length of an LVBench video."""

    duration_minutes: Seconds | None = None


class LvBench(Record):
    """Video of LVBench with its questions."""

    key: Name
    type: str
    video_info: LvBenchInfo = LvBenchInfo()
    qa: list[LvBenchQuestion]


class Mlvu(Record):
    """Question of MLVU, multiple choice or open-ended."""

    video: str
    duration: Seconds
    question: str
    question_type: str
    answer: str
    candidates: Options | None = None


def lvbench(
    records: Iterable[tuple[int, LvBench]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[Sample]:
    """Yield one sample per question, with the id `uid`."""
    for _, record in records:
        for asked in record.qa:
            question, options = _in_text(asked, source)
            yield choice_sample(
                source,
                str(asked.uid),
                video=video_file(record.key),
                duration_s=60 * (record.video_info.duration_minutes or 0.0),
                question=question,
                options=options,
                answer=asked.answer,
                labels=(
                    f"type/{record.type}",
                    *(f"ability/{kind}" for kind in asked.question_type),
                ),
            )


def mlvu(
    records: Iterable[tuple[str, list[Mlvu]]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[Sample]:
    """Yield one sample per record of every file. An open-ended question has no options."""
    seen: Counter[str] = Counter()
    for file, of_task in records:
        for record in of_task:
            candidates = tuple(text.strip() for text in record.candidates or ())
            index = seen[record.video]
            seen[record.video] += 1
            yield Sample(
                id=f"{record.video}/{index}",
                task="multiple_choice",
                media=(VideoClip(video_path(f"{file}/{record.video}", source, record.video)),),
                duration_s=record.duration,
                query=record.question.strip(),
                rationale=record.answer.strip(),
                intervals_s=(),
                options=candidates,
                option=_letter_of(record) if candidates else "",
                labels=(f"task/{record.question_type}",),
            )


def video_mme_subtitles(
    records: Iterable[tuple[int, VideoMme]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[Sample]:
    """Yield one sample per record; the subtitles are part of its question."""
    folder = Path(source.json_path).parent / "subtitle"
    if not folder.is_dir():
        raise DataError(
            f"{folder} is missing: unpack Video-MME's subtitle.zip beside {source.json_path}."
        )
    texts: dict[str, str] = {}

    def with_subtitles() -> Iterator[tuple[int, VideoMme]]:
        for index, record in records:
            video = record.videoID
            if video not in texts:
                texts[video] = _subtitles(folder / f"{video}.srt")
            question = SUBTITLES.format(text=texts[video], question=record.question)
            yield index, record.model_copy(update={"question": question})

    yield from video_mme(with_subtitles(), source, header_duration_s)


LONG_VIDEO_READERS: dict[str, Reader] = {
    "lvbench": Reader(schema=TypeAdapter(list[LvBench]), samples=lvbench, is_list=False),
    "mlvu": Reader(
        schema=TypeAdapter(dict[str, list[Mlvu]]), samples=mlvu, is_list=False, by_file=True
    ),
    "video_mme_subtitles": Reader(
        schema=TypeAdapter(list[VideoMme]), samples=video_mme_subtitles, is_list=True
    ),
}


def _in_text(asked: LvBenchQuestion, source: Source) -> tuple[str, list[str]]:
    """Return (question, options) of a question whose text ends with its options.

    The options are its last lines, or follow the marks (A), (B), ... within a line.
    """
    lines = [line.strip() for line in asked.question.strip().splitlines()]
    for first in range(1, len(lines) - 1):
        options = lines[first:]
        if option_texts(options) != tuple(options):
            return "\n".join(lines[:first]), options
    question, *parts = _MARK.split(asked.question.strip())  # letter, text, letter, text, ...
    letters, texts = parts[::2], [text.strip() for text in parts[1::2]]
    if len(texts) > 1 and "".join(letters) == ascii_uppercase[: len(letters)]:
        return question.strip(), texts
    raise DataError(
        f"{source.json_path}: record {asked.uid!r}: field 'question' is {asked.question!r:.80}, "
        "expected its options (A), (B), ... after the question."
    )


def _letter_of(record: Mlvu) -> str:
    """Return the letter of the last candidate that equals the answer, as MLVU's script does."""
    equal = [index for index, text in enumerate(record.candidates or ()) if text == record.answer]
    return ascii_uppercase[equal[-1]] if equal else NO_LETTER


def _subtitles(path: Path) -> str:
    """Return the text of an .srt file, one subtitle a line, without numbers, times and tags."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return NO_SUBTITLES
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The subtitles {path} cannot be read: {error}.") from None
    said: list[str] = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        lines = block.strip().split("\n")
        at = next((i for i, line in enumerate(lines) if _TIMES.match(line.strip())), len(lines))
        said.append(" ".join(_TAG.sub("", line).strip() for line in lines[at + 1 :]).strip())
    return "\n".join(line for line in said if line) or NO_SUBTITLES
