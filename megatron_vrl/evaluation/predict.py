"""Greedy answers of a checkpoint to a benchmark, written one by one so that a call can resume.

Each answer is a line of OUT/predictions.jsonl. OUT/settings.json holds the settings that the
answers depend on. The same call resumes after the last whole line; a call with other settings is
refused. A question whose video cannot be read gets a line without a response, and is asked again
when a later call can read the video.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_vrl.checkpoint.layout import hf_dir_of, pixels_of
from megatron_vrl.config import RunConfig
from megatron_vrl.context import media_reader
from megatron_vrl.errors import ConfigError, DataError, VideoError, counted
from megatron_vrl.evaluation.benchmark import prediction_of
from megatron_vrl.evaluation.generate import Answerer, InferenceConfig
from megatron_vrl.evaluation.protocols import Prediction, scorable
from megatron_vrl.observe.progress import progress_bar
from megatron_vrl.process.entry import told_if_interrupted
from megatron_vrl.process.run_lock import check_owned
from megatron_vrl.storage.files import full_disk_named, kept_rows, read_rows, write_file
from megatron_vrl.types import Rollout, Sample

TEMPORAL_R1_DEFAULTS: dict[
    str, dict[str, Any]
] = {  # of the released evaluation: its prompt and budget
    "data": {"system_prompt": "temporal_r1", "question": "temporal_r1"},
    "video": {"min_pixels": 4 * 28 * 28, "total_pixels": 2048 * 28 * 28},
}
SAMPLES_AT_A_TIME = 128  # bounds the decoded frames in memory


def predict(
    cfg: InferenceConfig,
    samples: Sequence[Sample],
    out: Path,
    settings: dict[str, Any],
    start: Callable[[InferenceConfig, int], Answerer] = Answerer,
) -> list[Prediction]:
    """Answer every scorable question that `out` does not have; return all answers.

    An engine starts only if a question is left. Raises UserError, before an engine starts if no
    video of `samples` exists.
    """
    check_videos(samples, "--videos")
    out.mkdir(parents=True, exist_ok=True)
    check_settings(out / "settings.json", {**settings, **cfg.model_dump(mode="json")})
    path = out / "predictions.jsonl"
    rows = read_rows(path)
    bad = {row["id"] for row in rows if row.get("problem")}
    again = readable(cfg, [sample for sample in samples if sample.id in bad])
    rows = [row for row in rows if row["id"] not in again]
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))  # without a torn last line
    done = {row["id"] for row in rows}
    left = [s for s in samples if s.id not in done and scorable(s)]
    if left:
        longest = cfg.evaluation.max_response_tokens
        total, before = len(rows) + len(left), len(rows)
        with (
            told_if_interrupted(lambda: kept_rows(path, total, "answer")),
            path.open("a", encoding="utf-8") as file,
            progress_bar("evaluate", total, "questions", before) as bar,
        ):
            answerer = start(cfg, longest)
            for sample, answer in answerer.answer_greedily(left, longest, SAMPLES_AT_A_TIME):
                check_owned(out)
                with full_disk_named(path):
                    file.write(json.dumps(_row(sample, answer)) + "\n")
                    file.flush()
                bar.update()
    return [prediction_of(row, str(path)) for row in read_rows(path)]


def check_videos(samples: Sequence[Sample], origin: str) -> None:
    """Raise DataError if not one local video exists. `origin` names what gave their folder."""
    paths = list(dict.fromkeys(one.path for sample in samples for one in sample.media))
    if paths and not any("://" in path or Path(path).is_file() for path in paths):
        raise DataError(
            f"None of the {counted(len(paths), 'video')} is there (the first is {paths[0]}): "
            f"correct {origin}."
        )


def readable(cfg: InferenceConfig | RunConfig, samples: Sequence[Sample]) -> set[str]:
    """Return the ids of the samples whose videos and images can be decoded now."""
    ids: set[str] = set()
    if samples:
        directory = hf_dir_of(cfg.model.checkpoint)
        pixels = pixels_of(cfg.model.checkpoint)
        reader = media_reader(cfg.video, cfg.data, pixels, directory)
        for start in range(0, len(samples), SAMPLES_AT_A_TIME):
            block = samples[start : start + SAMPLES_AT_A_TIME]
            media = [medium for sample in block for medium in sample.media]
            read = zip(media, reader.read(media), strict=True)
            bad = {medium for medium, visual in read if isinstance(visual, VideoError)}
            ids |= {sample.id for sample in block if not bad.intersection(sample.media)}
    return ids


def too_many_bad(problems: Sequence[str], count: int, most: float) -> str:
    """Return a sentence if more than the fraction `most` of `count` samples have `problems`."""
    if len(problems) <= most * count:
        return ""
    return (
        f"{len(problems)} of {counted(count, 'sample')} have videos that cannot be read, over "
        f"video.max_bad_fraction={most} (the first: {problems[0]}). Correct the videos and give "
        "the same command again, or raise the limit."
    )


def _row(sample: Sample, answer: Rollout | VideoError) -> dict[str, Any]:
    """Return the line of predictions.jsonl for one question."""
    if isinstance(answer, VideoError):
        return {"id": sample.id, "response": None, "problem": str(answer)}
    return {
        "id": sample.id,
        "response": answer.text,
        "finish": answer.finish,
        "tokens": len(answer.token_ids),
    }


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings to `path`. Raises ConfigError if the file has other settings."""
    if path.exists():
        before = json.loads(path.read_text())
        changed = sorted(key for key in settings if before.get(key) != settings[key])
        if changed:
            raise ConfigError(
                f"{path.parent} holds predictions made with another {', '.join(changed)}: choose "
                "another --out, or remove it to start over."
            )
    write_file(path, json.dumps(settings, indent=1) + "\n")
