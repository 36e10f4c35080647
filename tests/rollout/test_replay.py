"""Stored rollouts: exact records, look-up by sample and seed, and refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.config import RunConfig
from megatron_vrl.errors import ConfigError, DataError, RolloutError
from megatron_vrl.rollout.records import encode, read_rollouts, record_of, short_floats
from megatron_vrl.rollout.replay import ReplayEngine, ReplayFiles, ReplayFuture, check_replay
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.storage.compressed import FrameFile
from megatron_vrl.types import RewardComponent, Rollout, Sample, ScoredGroup, VideoClip
from tests.tiny import prompt, video

SPEC = SamplingSpec(n=2, temperature=0.9, top_p=1.0, max_tokens=8, seed=7)


def scored(number: int, version: int = 0) -> ScoredGroup:
    rng = np.random.default_rng(number)
    shown = replace(prompt([video((2, 4, 4), 1.0, number)], number), id=f"s{number}")
    return ScoredGroup(
        sample=Sample(
            id=shown.id,
            task="temporal_grounding",
            media=(VideoClip("v.mp4"),),
            duration_s=10.0,
            query="a square",
            rationale="",
            intervals_s=((1.0, 2.0),),
            options=(),
            option="",
        ),
        prompt=shown,
        rollouts=tuple(
            Rollout(
                token_ids=rng.integers(0, 90, 3 + index),
                logprobs=-rng.exponential(1, 3 + index).astype(np.float32),
                text='say "it"\n\u2028 twice',
                finish="stop",
                weight_version=version,
                newest_version=version,
                seed=SPEC.for_prompt(number).seed + index,
            )
            for index in range(SPEC.n)
        ),
        components={"format": RewardComponent(np.array([1.0, np.nan]), 0.5)},
    )


def store(path: Path, *groups: ScoredGroup, trainer: int = 0) -> None:
    """One step of a rank, begun at the trainer's version."""
    file = FrameFile(path)
    records = [record_of(g, None, "invalid", SPEC, trainer + 1, trainer) for g in groups]
    file.append([encode(record) for record in records])
    file.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store(tmp_path / "rank-0000.jsonl.zst", scored(0), scored(2))
    store(tmp_path / "rank-0000.jsonl.zst", scored(4, version=1), trainer=1)
    store(tmp_path / "rank-0001.jsonl.zst", scored(1))
    return tmp_path


def ask(
    folder: Path,
    *numbers: int,
    version: int = 0,
    importance_weights: bool = False,
    spec: SamplingSpec = SPEC,
) -> tuple[ReplayEngine, list[ReplayFuture]]:
    engine = ReplayEngine(ReplayFiles(folder), importance_weights)
    engine.sync(version, 1)
    prompts = [scored(number).prompt for number in numbers]
    return engine, engine.submit(prompts, [spec.for_prompt(number) for number in numbers])


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_nine_digits_keep_every_number_of_32_bits(values: list[float]) -> None:
    exact = np.array(values, dtype=np.float32)
    stored = json.loads(json.dumps(short_floats(exact)))
    assert np.array(stored, dtype=np.float32).tobytes() == exact.tobytes()


def test_rollouts_are_replayed_exactly(folder: Path) -> None:
    _, asked = ask(folder, 2, 1, 0)
    for number, answers in zip((2, 1, 0), asked, strict=True):
        assert answers.done()
        for found, made in zip(answers.result(), scored(number).rollouts, strict=True):
            for name in Rollout.__slots__:
                there, here = getattr(found, name), getattr(made, name)
                assert np.array_equal(there, here) and type(there) is type(here)
            assert found.token_ids.dtype == np.int64 and found.logprobs.dtype == np.float32


def test_other_programs_read_the_groups(folder: Path) -> None:
    rows = list(read_rollouts(folder))
    assert [(row["step"], row["sample"]) for row in rows] == [
        (1, "s0"),
        (1, "s2"),
        (2, "s4"),
        (1, "s1"),
    ]
    (_, second) = rows[0]["answers"]
    assert (second["reward"], second["components"]) == (None, {"format": None})


def test_groups_become_ready_at_the_version_that_took_them(folder: Path) -> None:
    engine, (first, later) = ask(folder, 0, 4)
    assert (first.done(), later.done()) == (True, False)
    engine.sync(1, 1)
    assert later.done()


def test_a_second_sync_of_one_version_makes_all_groups_ready(folder: Path) -> None:
    engine, (later, missing) = ask(folder, 4, 9)
    assert engine.no_live_workers and not later.done() and not missing.done()
    engine.sync(0, 1)
    assert later.done() and missing.done()
    engine.sync(1, 1)
    assert not missing.done()


def test_missing_rollouts_name_their_sample(folder: Path) -> None:
    _, (missing,) = ask(folder, 9)
    with pytest.raises(
        RolloutError, match=r"holds no rollouts of sample s9 with seed \d+: generate"
    ):
        missing.result()
    _, (other_seed,) = ask(folder, 0, spec=replace(SPEC, seed=8))
    with pytest.raises(RolloutError, match="holds no rollouts of sample s0 "):
        other_seed.result()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"n": 3}, "rollout.group_size=2, not 3"),
        ({"temperature": 1.0}, "rollout.temperature=0.9, not 1.0"),
        ({"max_tokens": 4}, "rollout.max_response_tokens=8, not 4"),
    ],
)
def test_rollouts_of_another_spec_are_refused(
    folder: Path, change: dict[str, Any], key: str
) -> None:
    _, (asked,) = ask(folder, 0, spec=replace(SPEC, **change))
    with pytest.raises(RolloutError, match=f"sample s0 in .* were generated with {key}"):
        asked.result()


def test_rollouts_of_another_video_are_refused(folder: Path) -> None:
    engine, _ = ask(folder)
    other = replace(scored(0).prompt, visuals=(video((2, 4, 4), 1.0, 5),))
    (asked,) = engine.submit([other], [SPEC.for_prompt(0)])
    with pytest.raises(RolloutError, match=r"sample s0 in .* belong to another prompt"):
        asked.result()


def test_old_rollouts_need_importance_weights(folder: Path) -> None:
    _, (asked,) = ask(folder, 0, version=3)
    with pytest.raises(RolloutError, match="sample s0 are of weights 0, and the trainer has 3"):
        asked.result()
    _, (importance_weights,) = ask(folder, 0, version=3, importance_weights=True)
    assert [rollout.weight_version for rollout in importance_weights.result()] == [0, 0]


def test_a_group_that_is_stored_twice_is_refused(folder: Path) -> None:
    shutil.copy(folder / "rank-0001.jsonl.zst", folder / "rank-0002.jsonl.zst")
    with pytest.raises(DataError, match=r"sample s1 with seed .* twice"):
        ReplayFiles(folder)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    file = FrameFile(tmp_path / "other.jsonl.zst")
    file.append([b'{"id": 3}'])
    with pytest.raises(DataError, match="holds a line that is not a group of rollouts"):
        ReplayFiles(tmp_path)


def test_configs_that_replay_cannot_serve_are_refused(folder: Path) -> None:
    def check(
        rollout: dict[str, Any] | None = None,
        **sections: Any,
    ) -> None:
        rollout = {"placement": "replay", "replay_dir": str(folder)} | (rollout or {})
        run, model = {"out_dir": str(folder / "out")}, {"checkpoint": "c"}
        check_replay(RunConfig(**{"run": run, "model": model, "rollout": rollout, **sections}))

    check()
    check({"placement": "colocated", "replay_dir": "nowhere"})
    for wrong, sentence in (
        ({"rollout": {"replay_dir": ""}}, "needs rollout.replay_dir"),
        ({"rollout": {"replay_dir": "nowhere"}}, "nowhere holds no stored rollouts"),
        ({"data": {"evaluation": {"dev": []}}}, "data.evaluation is set"),
        ({"sft": {"steps": 1, "stop_metric": "m"}}, "sft.stop_metric is set"),
        ({"grpo": {"evaluate_every": 2}}, "grpo.evaluate_every is set"),
    ):
        with pytest.raises((ConfigError, DataError), match=sentence):
            check(**wrong)
    (folder / "out").mkdir()
    (folder / "out" / "rollouts").symlink_to(folder)
    with pytest.raises(ConfigError, match="where this run writes its rollouts"):
        check()
