"""Selection between epochs: when, what is asked, what a restarted run does again. Engine, videos
and checkpoints stand in; tests/jobs/test_reselection_job.py has the real ones."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from megatron_vrl.config import Data, Parallel, Rewards, RolloutConfig, Selection, load_config
from megatron_vrl.context import RunContext
from megatron_vrl.data.pool import Pool
from megatron_vrl.errors import ConfigError, DataError, RolloutError, VideoError
from megatron_vrl.observe.clock import Clock
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.rewards.manager import RewardManager
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.trainer import reselect
from megatron_vrl.trainer.reselect import DataSelection, check_reselection
from megatron_vrl.trainer.sample_stream import ordered
from megatron_vrl.trainer.state import RunState
from megatron_vrl.types import Prompt, Rollout, Sample, VideoClip
from tests.data.test_mix import sample
from tests.running import CONFIG
from tests.tiny import prompt, video

SOURCE = {"json_path": "a", "data_folder": "b"}
NUM, UNREADABLE, DULL = 10, 3, {1, 4, 8}  # to the dull ones all answers are alike


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


class Run:
    """One process of a run in `tmp_path`: a stream that stands at `place` of a pool of ten."""

    def __init__(
        self,
        mesh: Mesh,
        out_dir: Path,
        state: RunState,
        *,
        calls: int = 99,
        data: dict[str, Any] | None = None,
        **selection: Any,
    ) -> None:
        self.asked: list[list[int]] = []
        self.messages: list[str] = []
        self.saved: list[int] = []
        self.calls = calls
        keys: dict[str, Any] = {"answers": 2, "every_epochs": 1} | selection
        cfg = SimpleNamespace(
            run=SimpleNamespace(seed=1, out_dir=str(out_dir)),
            data=Data.model_validate({"train": [SOURCE], **(data or {})}),
            selection=Selection(**keys),
            rollout=RolloutConfig(prompts_per_step=4),
            rewards=Rewards(),
            checkpoint=SimpleNamespace(every_steps=50),
        )
        self.state = state
        samples = [replace(sample(i), media=(VideoClip(f"{i}.mp4"),)) for i in range(NUM)]
        self.pool = Pool(cfg.data.train, [samples], [np.arange(NUM)])
        self.stream = ordered(self.pool, cfg.data, 1)
        self.stream.restore(state.stream)
        ctx = SimpleNamespace(
            cfg=cfg,
            mesh=mesh,
            clock=Clock(),
            prompts=SimpleNamespace(load=self.load),
            embed=list,
            rollout_manager=SimpleNamespace(generate=self.generate),
            reward_manager=RewardManager(cfg.rewards),
        )
        self.reselection = DataSelection(
            cast(RunContext, ctx), state, self.pool, self.stream, self.messages.append
        )

    @staticmethod
    def load(samples: list[Sample]) -> list[VideoError | Prompt]:
        bad = VideoError("is cut off", "cut_off")
        shown = prompt([video((1, 2, 2), 1.0, 0)], 0)
        return [
            bad if one.first_path == f"{UNREADABLE}.mp4" else replace(shown, id=one.first_path)
            for one in samples
        ]

    def generate(
        self, prompts: list[Prompt], spec: SamplingSpec, numbers: list[int]
    ) -> list[list[Rollout]]:
        if len(self.asked) == self.calls:
            raise RolloutError("killed")
        self.asked.append(list(numbers))
        assert [p.id for p in prompts] == [f"{number}.mp4" for number in numbers]
        ends = [(2, 2) if number in DULL else (2, 9) for number in numbers]
        return [[_answer(end) for end in pair] for pair in ends]


def _answer(end: int) -> Rollout:
    answer = {"start_time": "1.0", "end_time": str(float(end))}
    return Rollout(
        token_ids=np.arange(3),
        logprobs=np.zeros(3, dtype=np.float32),
        text=f"<think>t</think><answer>{json.dumps(answer)}</answer>",
        finish="stop",
        weight_version=0,
        newest_version=0,
        seed=0,
    )


@pytest.fixture(autouse=True)
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps at which the run was saved."""
    steps: list[int] = []
    monkeypatch.setattr(reselect, "save", lambda ctx, state: steps.append(state.step))
    monkeypatch.setattr(reselect, "finish_saving", lambda ctx: None)
    return steps


def at_the_end_of_an_epoch() -> RunState:
    return RunState(stage="grpo", step=3, stream=12, version=3)


def drawn(run: Run, num: int) -> list[str]:
    return [one.id for one in run.stream.take(num)]


def test_no_selection_before_its_epoch_or_when_off(mesh: Mesh, tmp_path: Path) -> None:
    settings: list[tuple[dict[str, Any], int]]
    settings = [({"every_epochs": 0}, 25), ({}, 9), ({"every_epochs": 3}, 29)]
    for keys, stream in settings:
        run = Run(mesh, tmp_path, RunState(stage="grpo", step=3, stream=stream), **keys)
        run.reselection.make_if_due()
        assert run.asked == [] and run.state.selections == []
    assert not list(tmp_path.iterdir())


def test_the_next_epochs_draw_kept_samples_and_the_next_selection_answers_all(
    mesh: Mesh, tmp_path: Path, saved: list[int]
) -> None:
    run = Run(mesh, tmp_path, at_the_end_of_an_epoch())
    run.state.step = 4  # after three it was saved: it was restored from there
    run.reselection.make_if_due()
    assert run.asked == [[0, 1, 2], [4, 5, 6, 7], [8, 9]] and saved == [4]
    kept = {f"v/{i}" for i in range(NUM)} - {f"v/{i}" for i in (UNREADABLE, *DULL)}
    assert run.messages == [
        "From epoch 1 on 6 of 10 samples, without 3 little spread and good, 1 undecodable; see "
        f"{tmp_path}/selection/epoch-0001."
    ]
    for epoch in (1, 2):
        assert run.stream.epoch == epoch
        assert set(drawn(run, 6)) == kept
    run.reselection.make_if_due()
    assert run.state.selections == [[1, 12], [3, 24]]
    assert run.asked[3:] == run.asked[:3]  # of the whole pool
    again = Run(mesh, tmp_path, replace(run.state, stream=24))
    assert again.asked == [] and drawn(again, 20) == drawn(run, 20)
    in_flight = [again.stream.at(place) for place in range(12, 18)]  # perhaps
    assert {one.id for one in in_flight if isinstance(one, Sample)} == kept


def test_a_resumed_selection_answers_the_rest_and_keeps_equal_samples(
    mesh: Mesh, tmp_path: Path
) -> None:
    whole = Run(mesh, tmp_path / "whole", at_the_end_of_an_epoch())
    whole.reselection.make_if_due()
    killed = Run(mesh, tmp_path / "killed", at_the_end_of_an_epoch(), calls=2)
    with pytest.raises(RolloutError, match="killed"):
        killed.reselection.make_if_due()
    folder = tmp_path / "killed" / "selection" / "epoch-0001"
    with (folder / "answers-0.jsonl").open("a") as file:
        file.write('{"id": "v/8", "ta')  # torn
    going_on = Run(mesh, tmp_path / "killed", at_the_end_of_an_epoch())
    going_on.reselection.make_if_due()
    assert killed.asked + going_on.asked == whole.asked
    for name in ("answers-0.jsonl", "kept.jsonl", "stats.jsonl", "summary.json"):
        ours = (folder / name).read_text()
        assert ours == (tmp_path / "whole/selection/epoch-0001" / name).read_text()
    assert drawn(going_on, 20) == drawn(whole, 20)
    complete = Run(mesh, tmp_path / "killed", at_the_end_of_an_epoch())  # not saved since
    complete.reselection.make_if_due()
    assert complete.asked == [] and complete.state == going_on.state


def test_samples_are_drawn_by_the_runs_own_rewards(mesh: Mesh, tmp_path: Path) -> None:
    """The answers to a dull sample are alike, so its weight is 0 up to the formula's 1e-8."""
    by_std = {"sample_weight_std_power": 1.0}
    keys: dict[str, Any] = {"data": by_std, "min_std": 0, "min_mean": 0}
    run = Run(mesh, tmp_path, at_the_end_of_an_epoch(), **keys)
    run.reselection.make_if_due()
    assert len(run.messages) == 1 and "9 of 10" in run.messages[0]
    first = drawn(run, 9)
    assert {f"v/{i}" for i in DULL}.isdisjoint(first) and len(set(first)) == 6
    again = Run(mesh, tmp_path, replace(run.state, stream=12), **keys)
    assert again.asked == [] and drawn(again, 9) == first
    assert drawn(run, 20) == drawn(again, 20)


def test_an_incomplete_block_is_answered_again_as_a_whole(mesh: Mesh, tmp_path: Path) -> None:
    """Its other prompts alone would be another batch, which kernels may round otherwise."""
    whole = Run(mesh, tmp_path, at_the_end_of_an_epoch())
    whole.reselection.make_if_due()
    answers = tmp_path / "selection" / "epoch-0001" / "answers-0.jsonl"
    complete = answers.read_text()
    for lines in range(complete.count("\n")):
        answers.write_text("".join(complete.splitlines(keepends=True)[:lines]))
        again = Run(mesh, tmp_path, at_the_end_of_an_epoch())
        again.reselection.make_if_due()
        assert again.asked == whole.asked[lines // 4 :]  # of four prompts a block, the last of two
        assert answers.read_text() == complete


def test_answers_of_other_weights_or_of_another_count_are_not_used(
    mesh: Mesh, tmp_path: Path
) -> None:
    first = Run(mesh, tmp_path, at_the_end_of_an_epoch())
    first.reselection.make_if_due()
    cooler: dict[str, Any] = {"temperature": 0.5}
    for state, keys in (
        (replace(at_the_end_of_an_epoch(), version=4), {}),
        (replace(at_the_end_of_an_epoch(), version=4), cooler),
    ):
        other = Run(mesh, tmp_path, state, **keys)
        other.reselection.make_if_due()
        assert other.asked == first.asked
    Run(mesh, tmp_path, replace(at_the_end_of_an_epoch(), stream=8))  # an earlier checkpoint
    assert list((tmp_path / "selection").iterdir()) == []


def test_an_empty_selection_ends_the_run_and_other_rules_resume_it(
    mesh: Mesh, tmp_path: Path
) -> None:
    run = Run(mesh, tmp_path, at_the_end_of_an_epoch(), min_std=0.9)
    with pytest.raises(DataError, match=r"keeps none .*epoch-0001: lower selection\.min_std=0\.9"):
        run.reselection.make_if_due()
    assert run.state.selections == []
    other = Run(mesh, tmp_path, at_the_end_of_an_epoch(), min_std=0.1)
    other.reselection.make_if_due()
    assert other.asked == [] and other.state.selections == [[1, 12]]


def test_a_deleted_selection_is_reported(mesh: Mesh, tmp_path: Path) -> None:
    state = replace(at_the_end_of_an_epoch(), selections=[[1, 12]])
    with pytest.raises(DataError, match=r"epoch-0001/kept\.jsonl cannot be read"):
        Run(mesh, tmp_path, state)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rollout.placement=replay", "new questions, which rollout.placement=replay cannot answer"),
        ("data.curriculum=easy_first", "and data.curriculum=easy_first orders it by older records"),
    ],
)
def test_impossible_settings_are_refused(override: str, sentence: str) -> None:
    cfg = load_config(CONFIG, ["selection.every_epochs=2", override])
    with pytest.raises(ConfigError) as refused:
        check_reselection(cfg)
    assert sentence in str(refused.value)
    check_reselection(load_config(CONFIG, [override]))
