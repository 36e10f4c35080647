"""Evaluation, selection and one question on one real engine: a tiny model and synthetic clips."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from megatron_vrl.config import load_config
from megatron_vrl.config.inference import inference_files
from megatron_vrl.errors import ConfigError, DataError
from megatron_vrl.evaluation.ask import Question, as_text, ask
from megatron_vrl.evaluation.benchmark import items_of, questions, read_predictions
from megatron_vrl.evaluation.generate import Answerer, InferenceConfig, inference_config
from megatron_vrl.evaluation.predict import predict, too_many_bad
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.observe.timeline_strip import MARK, timeline_strip
from megatron_vrl.selection.rules import KEPT
from megatron_vrl.selection.select import apply_rules, collect_answers, pool
from megatron_vrl.types import MEDIA_PLACE, ImageFile, VideoClip
from megatron_vrl.video import VideoReader
from tests.running import CONFIG, ROOT, run_python

pytestmark = pytest.mark.slow
Start = Callable[[InferenceConfig, int], Answerer]
SMALL = ("rollout.kv_cache_mib=64", "video.decoder=pyav", "evaluation.max_response_tokens=16")


@pytest.fixture(scope="module")
def folder(quickstart: Path, monkeypatch_module: pytest.MonkeyPatch) -> Path:
    monkeypatch_module.chdir(quickstart)
    return quickstart


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def cfg(folder: Path) -> InferenceConfig:
    return inference_config("runs/quickstart/model-hf", SMALL, str(CONFIG))


@pytest.fixture(scope="module")
def engine(cfg: InferenceConfig) -> Iterator[Start]:
    """Return a start function that gives one engine to all tests, whatever the limits are.

    vLLM's process groups are destroyed at the end: other modules start engines in this process.
    """
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    answerer = Answerer(cfg, 64)
    yield lambda config, longest: answerer
    destroy_model_parallel()
    destroy_distributed_environment()


def never(config: InferenceConfig, longest: int) -> Answerer:
    raise AssertionError("everything is answered: no engine is needed")


def test_every_question_is_answered_once_and_a_stopped_run_resumes(
    folder: Path, cfg: InferenceConfig, engine: Start, tmp_path: Path
) -> None:
    data = folder / "runs/quickstart/data"
    annotations = json.loads((data / "annotations/heldout_temporal_grounding.json").read_text())
    name = next(iter(annotations))
    annotations |= {"absent": annotations[name]}
    (tmp_path / "a.json").write_text(json.dumps(annotations))
    samples = questions("charades_sta", str(tmp_path / "a.json"), str(data / "videos"), "strict")
    first = predict(cfg, samples, tmp_path / "out", {"protocol": "strict"}, engine)
    path = tmp_path / "out" / "predictions.jsonl"
    whole = path.read_text()
    assert [p.id for p in first] == [s.id for s in samples]
    path.write_text(whole[: len(whole) // 2])  # killed in the middle of a line
    again = predict(cfg, samples, tmp_path / "out", {"protocol": "strict"}, engine)
    assert {p.id: p for p in again} == {p.id: p for p in first}
    assert predict(cfg, samples, tmp_path / "out", {"protocol": "strict"}, never) == again
    with pytest.raises(ConfigError, match="made with another protocol"):
        predict(cfg, samples, tmp_path / "out", {"protocol": "temporal_r1"}, never)
    items = items_of("charades_sta", samples, read_predictions(path, samples), "strict")
    assert len(items) == len(samples)
    failures = [item.failure for item in items]
    assert failures[-1] == "undecodable" and "absent.mp4" in items[-1].reason
    assert set(failures[:-1]) <= {"cut_off", "unparsable"}  # the weights are random


class Interrupted:
    """An answerer that receives SIGINT after two answers."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer

    def answer(self, *arguments: Any) -> Iterator[Any]:
        return self._until_interrupted(self._answerer.answer(*arguments))

    def answer_greedily(self, *arguments: Any) -> Iterator[Any]:
        return self._until_interrupted(self._answerer.answer_greedily(*arguments))

    def _until_interrupted(self, answers: Iterable[Any]) -> Iterator[Any]:
        for number, answered in enumerate(answers):
            if number % 3 == 2:
                raise KeyboardInterrupt
            yield answered


def test_an_interrupt_reports_what_is_kept_and_the_same_call_resumes(
    folder: Path, cfg: InferenceConfig, engine: Start, tmp_path: Path
) -> None:
    data = folder / "runs/quickstart/data"
    annotations = str(data / "annotations/train_temporal_grounding.json")
    samples = questions("charades_sta", annotations, str(data / "videos"), "strict")[:5]
    assert len(samples) == 5
    out = tmp_path / "out"
    for kept in (2, 4):
        with pytest.raises(KeyboardInterrupt) as stopped:
            predict(cfg, samples, out, {}, lambda *_: cast(Answerer, Interrupted(engine(cfg, 0))))
        path = out / "predictions.jsonl"
        assert str(stopped.value) == f" {path} keeps {kept} of 5 answers; the same command goes on."
    assert [p.id for p in predict(cfg, samples, out, {}, engine)] == [s.id for s in samples]
    run = load_config(CONFIG, ["model.checkpoint=runs/quickstart/model-hf", *SMALL])
    with pytest.raises(KeyboardInterrupt, match="Nothing was answered yet; the same command begin"):
        collect_answers(
            run, pool(run), out, start=lambda *_: cast(Answerer, Interrupted(engine(cfg, 0)))
        )


def test_a_question_is_asked_again_when_its_video_can_be_read(
    folder: Path, cfg: InferenceConfig, engine: Start, tmp_path: Path
) -> None:
    clips = sorted((folder / "runs/quickstart/data/videos").glob("*.mp4"))[:2]
    record = {"timestamps": [[0, 2]], "sentences": ["a red square"], "duration": 10.0}
    (tmp_path / "a.json").write_text(json.dumps({"one": record, "two": record}))
    samples = questions("charades_sta", str(tmp_path / "a.json"), str(tmp_path), "strict")
    with pytest.raises(DataError, match=r"None of the 2 videos is there .*: correct --videos"):
        predict(cfg, samples, tmp_path / "out", {}, never)
    shutil.copy(clips[0], tmp_path / "one.mp4")
    (tmp_path / "two.mp4").write_bytes(b"no film")
    first = predict(cfg, samples, tmp_path / "out", {}, engine)
    assert [bool(p.problem) for p in first] == [False, True]
    assert predict(cfg, samples, tmp_path / "out", {}, never) == first
    engine(cfg, 0)._prompts._reader = VideoReader(
        cfg.video, PIXELS
    )  # as a later process has; one remembers
    shutil.copy(clips[1], tmp_path / "two.mp4")
    second = predict(cfg, samples, tmp_path / "out", {}, engine)
    assert [p.id for p in second] == [p.id for p in first] and second[0] == first[0]
    assert isinstance(second[1].response, str)


@pytest.mark.parametrize(("bad", "is_reported"), [(0, False), (1, False), (2, True)])
def test_too_large_a_fraction_of_bad_videos_is_reported(bad: int, is_reported: bool) -> None:
    assert bool(too_many_bad(["x cannot be read"] * bad, 20, 0.05)) == is_reported


@pytest.mark.parametrize(
    ("tool", "arguments", "sentence"),
    [
        (
            "evaluate.py",
            (
                "--benchmark",
                "mvbench",
                "--annotations",
                "a",
                "--videos",
                "vid",
                "--checkpoint",
                "c",
            ),
            "error: --videos vid is not a folder: correct it.",
        ),
        (
            "ask.py",
            ("--checkpoint", "c", "--video", "no.mp4", "--question", "q"),
            "error: --video no.mp4 is not a file: correct it.",
        ),
    ],
)
def test_missing_inputs_are_reported_before_the_model_loads(
    tmp_path: Path, tool: str, arguments: tuple[str, ...], sentence: str
) -> None:
    done = run_python(ROOT / "tools" / tool, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (2, sentence)


def test_a_selection_resumes_and_new_rules_apply(
    folder: Path, engine: Start, tmp_path: Path
) -> None:
    overrides = (*SMALL, "selection.answers=2", "rollout.max_response_tokens=8")
    run = load_config(CONFIG, ["model.checkpoint=runs/quickstart/model-hf", *overrides])
    samples = pool(run)
    collect_answers(run, samples, tmp_path, start=engine)
    path = tmp_path / "answers-0.jsonl"
    whole = path.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["id"] for row in rows] == [sample.id for sample in samples]
    assert all(len(row["answers"]) == 2 for row in rows)
    assert {"text", "components", "interval_s", "option", "failure", "tokens"} <= set(
        rows[0]["answers"][0]
    )
    path.write_text(whole[: len(whole) // 2])
    collect_answers(run, samples, tmp_path, start=engine)
    texts = [[answer["text"] for answer in row["answers"]] for row in rows]
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert [[answer["text"] for answer in row["answers"]] for row in again] == texts
    collect_answers(run, samples, tmp_path, start=never)
    chosen = apply_rules(run, samples, tmp_path)
    assert len(chosen) == len(samples) and not any(c.verdict == KEPT for c in chosen)
    rows[0]["answers"][0]["components"]["temporal_iou"] = 1.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    apply_rules(run, samples, tmp_path)
    (kept,) = (tmp_path / "kept.jsonl").read_text().splitlines()
    assert json.loads(kept)["id"] == samples[0].id
    assert json.loads((tmp_path / "summary.json").read_text())["kept"] == 1
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_one_question(folder: Path, cfg: InferenceConfig, engine: Start, tmp_path: Path) -> None:
    video = next((folder / "runs/quickstart/data/videos").glob("*.mp4"))
    shutil.copy(video, tmp_path / "clip.mp4")
    question = Question(
        media=(VideoClip(str(tmp_path / "clip.mp4")),), text="a red square", task="grounded_qa"
    )
    found = ask(cfg, question, tmp_path / "strip.png", engine)
    assert found["failure"] and found["interval_s"] is None  # the weights are random
    assert "not read" in as_text(found)
    assert Image.open(tmp_path / "strip.png").width == 1280


def test_ask_shows_any_media_or_none(
    cfg: InferenceConfig, engine: Start, folder: Path, tmp_path: Path
) -> None:
    """The engine refuses a prompt that it reads otherwise than the trainer."""
    video = next((folder / "runs/quickstart/data/videos").glob("*.mp4"))
    Image.new("RGB", (80, 60), "red").save(tmp_path / "one.png")
    image = ImageFile(str(tmp_path / "one.png"))
    asked = Question(
        media=(image, VideoClip(str(video)), image),
        text=f"Is {MEDIA_PLACE} in {MEDIA_PLACE} or like {MEDIA_PLACE}?",
        task="multiple_choice",
        options=("yes", "no"),
    )
    found = ask(cfg, asked, tmp_path / "mixed.png", engine)
    assert found["response"] and Image.open(tmp_path / "mixed.png").height > 240
    alone = replace(asked, media=(), text="Is it?")
    assert "strip" not in ask(cfg, alone, tmp_path / "none.png", engine)
    few = cfg.model_copy(update={"data": cfg.data.model_copy(update={"max_images": 1})})
    with pytest.raises(ConfigError, match=r"it has 2 images, over data\.max_images=1"):
        ask(few, asked, tmp_path / "none.png", engine)
    assert not (tmp_path / "none.png").exists()


def test_ask_needs_no_config(folder: Path, tmp_path: Path) -> None:
    """A model of 4,096 positions, fewer than the default prompt and answer."""
    video = next((folder / "runs/quickstart/data/videos").glob("*.mp4"))
    shutil.copy(video, tmp_path / "clip.mp4")
    done = run_python(
        *(ROOT / "tools/ask.py", "--checkpoint", folder / "runs/quickstart/model-hf", "--json"),
        *("--video", "clip.mp4", "--question", "a red square", "evaluation.max_response_tokens=8"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["question"] == "a red square" and (tmp_path / found["strip"]).exists()
    assert done.stderr.splitlines()[-1] == f"Written: {found['strip']}"


def test_ask_uses_the_exports_prompt_and_video_settings(folder: Path, tmp_path: Path) -> None:
    """Asked with the defaults, the clip and the longest answer do not fit; no engine starts."""
    model = tmp_path / "export"
    shutil.copytree(folder / "runs/quickstart/model-hf", model)
    video = next((folder / "runs/quickstart/data/videos").glob("*.mp4"))
    arguments = ("--checkpoint", model, "--video", video, "--question", "<|video_pad|>", "--json")
    refused = run_python(ROOT / "tools/ask.py", *arguments, "video.decoder=pyav", cwd=tmp_path)
    assert refused.returncode == 2
    (sentence,) = refused.stderr.splitlines()
    assert "the answer may take 2048, the model reads 4096: pass the training config" in sentence
    for name, text in inference_files(load_config(CONFIG)).items():
        (model / name).write_text(text)
    done = run_python(ROOT / "tools/ask.py", *arguments, "rollout.kv_cache_mib=64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["question"] == "<|video_pad|>"


def test_a_checkpoint_for_text_is_refused_before_an_engine_starts(
    folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "text"
    shutil.copytree(folder / "runs/quickstart/model-hf", model)
    (model / "chat_template.json").unlink()
    run = tmp_path / "run"
    asked = ("--checkpoint", model, "--video", __file__, "--question", "when?")
    (tmp_path / "one.jsonl").write_text('{"id": "a", "question": "q", "response": "r"}\n')
    scored = ("--checkpoint", model, "--samples", "one.jsonl", "--out", "out.jsonl")
    for command in (
        (ROOT / "tools/ask.py", *asked),
        (ROOT / "tools/score_responses.py", *scored),
        ("-m", "megatron_vrl.cli.train", "--config", CONFIG,
         f"model.checkpoint={model}", "--dry-run"),
        ("-m", "megatron_vrl.cli.train", "--config", CONFIG, f"model.checkpoint={model}",
         f"run.out_dir={run}", "parallel.processes=1"),
    ):  # fmt: skip
        done = run_python(*command, cwd=tmp_path)
        assert done.returncode == 2, done.stderr[-3000:]
        (sentence,) = done.stderr.splitlines()
        assert sentence.startswith(f"error: {model}: its chat template does not render a message")
    assert not (run / "config.yaml").exists()


def test_the_strip_marks_the_interval() -> None:
    frames = np.zeros((4, 28, 56, 3), np.uint8)
    image = timeline_strip(frames, np.arange(4, dtype=np.float64), 4.0, [(1.0, 3.0)])
    row = np.array(image)[86]  # in the bar under pictures of 80 px
    marked = np.flatnonzero((row == [int(MARK[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=1))
    assert (marked.min(), marked.max()) == (320, 960)


def test_every_interval_of_a_set_is_shown() -> None:
    result: dict[str, Any] = {"thinking": "", "option": None, "interval_s": None}
    result |= {"intervals_s": ((6.0, 10.0), (20.0, 24.0)), "duration_s": 30.0, "failure": None}
    assert as_text(result).splitlines() == [
        "interval: 6.0 s to 10.0 s of 30.0 s",
        "interval: 20.0 s to 24.0 s of 30.0 s",
    ]
    one = result | {"intervals_s": (), "interval_s": (6.0, 10.0)}
    assert as_text(one) == "interval: 6.0 s to 10.0 s of 30.0 s"
