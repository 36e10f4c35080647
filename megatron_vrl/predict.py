"""A checkpoint's answers to a benchmark, kept as they come so that a stopped run goes on.

OUT/predictions.jsonl grows by a line for each answer, beside OUT/settings.json with all that the
answers depend on: the same call goes on after the last whole line, one with other settings is
refused. A video that cannot be read is a line without a response.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_vrl.benchmark import Prediction, prediction_of
from megatron_vrl.errors import ConfigError, VideoError
from megatron_vrl.inference import Answerer, Answers, InferenceConfig
from megatron_vrl.observe.files import full_disk_named, read_rows, write_file
from megatron_vrl.rollout.requests import SamplingSpec
from megatron_vrl.tasks import can_be_asked
from megatron_vrl.types import VideoSample

SEED_DEFAULTS: dict[str, dict[str, Any]] = {  # of the released evaluation: its prompt and budget
    "data": {"system_prompt": "seed", "question": "seed"},
    "video": {"min_pixels": 4 * 28 * 28, "total_pixels": 2048 * 28 * 28},
}
SAMPLES_AT_A_TIME = 128  # bounds the decoded frames in memory


def predict(
    cfg: InferenceConfig,
    samples: Sequence[VideoSample],
    out: Path,
    settings: dict[str, Any],
    start: Callable[[InferenceConfig, int], Answerer] = Answerer,
) -> list[Prediction]:
    """Greedy answers to every question that can be asked, as far as `out` does not have them.

    An engine is started when something is left to answer.
    """
    out.mkdir(parents=True, exist_ok=True)
    check_settings(out / "settings.json", {**settings, **cfg.model_dump(mode="json")})
    path = out / "predictions.jsonl"
    rows = read_rows(path)
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))  # without a torn last line
    done = {row["id"] for row in rows}
    left = [s for s in samples if s.id not in done and can_be_asked(s)]
    if left:
        longest = cfg.evaluation.max_response_tokens
        spec = SamplingSpec(n=1, temperature=0.0, top_p=1.0, max_tokens=longest, seed=0)
        answerer = start(cfg, longest)
        with path.open("a", encoding="utf-8") as file:
            for sample, answers in answerer.answer(left, spec, SAMPLES_AT_A_TIME):
                with full_disk_named(path):
                    file.write(json.dumps(_row(sample, answers)) + "\n")
                    file.flush()
    return [prediction_of(json.dumps(row), str(path)) for row in read_rows(path)]


def _row(sample: VideoSample, answers: Answers) -> dict[str, Any]:
    if isinstance(answers, VideoError):
        return {"id": sample.id, "response": None, "problem": str(answers)}
    (answer,) = answers
    return {
        "id": sample.id,
        "response": answer.text,
        "finish": answer.finish,
        "tokens": len(answer.token_ids),
    }


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Raises ConfigError if `path` holds others; else writes them there."""
    if path.exists():
        before = json.loads(path.read_text())
        changed = sorted(key for key in settings if before.get(key) != settings[key])
        if changed:
            raise ConfigError(
                f"{path.parent} holds predictions made with another {', '.join(changed)}: choose "
                "another --out, or remove it to start over."
            )
    write_file(path, json.dumps(settings, indent=1) + "\n")
