"""Stored rollouts: records exact, answers found by sample and seed, and what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.config import RunConfig
from megatron_vrl.errors import ConfigError, DataError, RolloutError
from megatron_vrl.rollout.records import encode, read_rollouts, record_of, short_floats
from megatron_vrl.rollout.replay import ReplayEngine, ReplayFiles, check_stored
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.storage.compressed import FrameFile
from megatron_vrl.types import RewardComponent, Rollout, ScoredGroup, VideoSample
from tests.tiny import prompt, video

SPEC = SamplingSpec(n=2, temperature=0.9, top_p=1.0, max_tokens=8, seed=7)


def scored(number: int, version: int = 0) -> ScoredGroup:
    rng = np.random.default_rng(number)
    shown = replace(prompt([video((2, 4, 4), 1.0, number)], number), id=f"s{number}")
    return ScoredGroup(
        sample=VideoSample(
            id=shown.id,
            task="temporal_grounding",
            video="v.mp4",
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
                seed=SPEC.of_prompt(number).seed + index,
            )
            for index in range(SPEC.n)
        ),
        components={"format": RewardComponent(np.array([1.0, np.nan]), 0.5)},
    )


def store(path, *groups: ScoredGroup, trainer: int = 0) -> None:
    """One step of a rank, begun at the trainer's version."""
    file = FrameFile(path)
    records = [record_of(g, None, "invalid", SPEC, trainer + 1, trainer) for g in groups]
    file.append([encode(record) for record in records])
    file.close()


@pytest.fixture
def folder(tmp_path):
    store(tmp_path / "rank-0000.jsonl.zst", scored(0), scored(2))
    store(tmp_path / "rank-0000.jsonl.zst", scored(4, version=1), trainer=1)
    store(tmp_path / "rank-0001.jsonl.zst", scored(1))
    return tmp_path


def ask(folder, *numbers: int, version: int = 0, weighed: bool = False, spec=SPEC):
    engine = ReplayEngine(ReplayFiles(folder), weighed)
    engine.finish([], version)
    prompts = [scored(number).prompt for number in numbers]
    return engine, engine.ask(prompts, [spec.of_prompt(number) for number in numbers])


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_nine_digits_keep_every_number_of_32_bits(values):
    exact = np.array(values, dtype=np.float32)
    stored = json.loads(json.dumps(short_floats(exact)))
    assert np.array(stored, dtype=np.float32).tobytes() == exact.tobytes()


def test_answers_come_back_as_they_were(folder):
    _, asked = ask(folder, 2, 1, 0)
    for number, answers in zip((2, 1, 0), asked, strict=True):
        assert answers.done
        for found, made in zip(answers.result(), scored(number).rollouts, strict=True):
            for name in Rollout.__slots__:
                there, here = getattr(found, name), getattr(made, name)
                assert np.array_equal(there, here) and type(there) is type(here)
            assert found.token_ids.dtype == np.int64 and found.logprobs.dtype == np.float32


def test_other_programs_read_the_groups(folder):
    rows = list(read_rollouts(folder))
    assert [(row["step"], row["sample"]) for row in rows] == [
        (1, "s0"),
        (1, "s2"),
        (2, "s4"),
        (1, "s1"),
    ]
    (_, second) = rows[0]["answers"]
    assert (second["reward"], second["components"]) == (None, {"format": None})


def test_groups_are_ready_when_they_were_taken(folder):
    engine, (first, later) = ask(folder, 0, 4)
    assert (first.done, later.done) == (True, False)
    engine.finish([], 1)
    assert later.done


def test_the_same_weights_once_more_give_out_whatever_there_is(folder):
    engine, (later, missing) = ask(folder, 4, 9)
    assert engine.starved and not later.done and not missing.done
    engine.finish([], 0)
    assert later.done and missing.done
    engine.finish([], 1)
    assert not missing.done


def test_answers_that_are_not_there_name_their_sample(folder):
    _, (missing,) = ask(folder, 9)
    with pytest.raises(RolloutError, match=r"holds no answers to sample s9 with seed \d+: make"):
        missing.result()
    _, (other_seed,) = ask(folder, 0, spec=replace(SPEC, seed=8))
    with pytest.raises(RolloutError, match="holds no answers to sample s0 "):
        other_seed.result()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"n": 3}, "rollout.group_size=2, not 3"),
        ({"temperature": 1.0}, "rollout.temperature=0.9, not 1.0"),
        ({"max_tokens": 4}, "rollout.max_response_tokens=8, not 4"),
    ],
)
def test_answers_to_another_spec_are_refused(folder, change, key):
    _, (asked,) = ask(folder, 0, spec=replace(SPEC, **change))
    with pytest.raises(RolloutError, match=f"sample s0 in .* were made with {key}"):
        asked.result()


def test_answers_to_another_video_are_refused(folder):
    engine, _ = ask(folder)
    other = replace(scored(0).prompt, visuals=(video((2, 4, 4), 1.0, 5),))
    (asked,) = engine.ask([other], [SPEC.of_prompt(0)])
    with pytest.raises(RolloutError, match=r"sample s0 in .* are to another prompt"):
        asked.result()


def test_old_answers_want_importance_weights(folder):
    _, (asked,) = ask(folder, 0, version=3)
    with pytest.raises(RolloutError, match="s0 was answered by weights 0, and the trainer has 3"):
        asked.result()
    _, (weighed,) = ask(folder, 0, version=3, weighed=True)
    assert [rollout.weight_version for rollout in weighed.result()] == [0, 0]


def test_a_group_that_is_there_twice_is_refused(folder):
    shutil.copy(folder / "rank-0001.jsonl.zst", folder / "rank-0002.jsonl.zst")
    with pytest.raises(DataError, match=r"sample s1 with seed .* twice"):
        ReplayFiles(folder)


def test_lines_of_other_files_are_named(tmp_path):
    file = FrameFile(tmp_path / "other.jsonl.zst")
    file.append([b'{"id": 3}'])
    with pytest.raises(DataError, match="holds a line that is no group of rollouts"):
        ReplayFiles(tmp_path)


def test_what_stored_rollouts_cannot_do_is_said_at_the_start(folder):
    def check(rollout=None, **sections):
        rollout = {"placement": "replay", "replay_dir": str(folder)} | (rollout or {})
        run, model = {"out_dir": str(folder / "out")}, {"checkpoint": "c"}
        check_stored(RunConfig(**{"run": run, "model": model, "rollout": rollout, **sections}))

    check()
    check({"placement": "colocated", "replay_dir": "nowhere"})
    for wrong, sentence in (
        ({"rollout": {"replay_dir": ""}}, "needs rollout.replay_dir"),
        ({"rollout": {"replay_dir": "nowhere"}}, "nowhere holds no stored rollouts"),
        ({"data": {"evaluation": {"dev": []}}}, "which data.evaluation asks for"),
        ({"sft": {"steps": 1, "stop_metric": "m"}}, "which sft.stop_metric asks for"),
        ({"grpo": {"evaluate_every": 2}}, "which grpo.evaluate_every asks for"),
    ):
        with pytest.raises((ConfigError, DataError), match=sentence):
            check(**wrong)
    (folder / "out").mkdir()
    (folder / "out" / "rollouts").symlink_to(folder)
    with pytest.raises(ConfigError, match="where this run writes its own"):
        check()
