"""OUT/rollouts of one rank: a run that goes on neither loses nor repeats a group."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from megatron_vrl.config import Parallel, RolloutConfig
from megatron_vrl.context import RunContext
from megatron_vrl.observe.clock import Clock
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.rollout.records import read_rollouts
from megatron_vrl.trainer.experience import RolloutBatch, training_group
from megatron_vrl.trainer.rollout_files import RolloutFiles
from megatron_vrl.types import Experience
from tests.trainer.test_experience import scored


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


@pytest.fixture
def parts(mesh: Mesh, tmp_path: Path) -> RunContext:
    cfg = SimpleNamespace(
        run=SimpleNamespace(out_dir=str(tmp_path), seed=3), rollout=RolloutConfig()
    )
    return cast(RunContext, SimpleNamespace(mesh=mesh, cfg=cfg, clock=Clock()))


def rollout_batch(step: int) -> RolloutBatch:
    groups = [
        scored(f"a{step}", [0.0, 1.0]),
        scored(f"b{step}", [1.0, 1.0]),
        scored(f"c{step}", [np.nan, 1.0]),
    ]
    experiences = [Experience(scored=g, advantages=np.array([-1.0, 1.0])) for g in groups[:2]]
    return RolloutBatch(
        groups=groups,
        experiences=experiences,
        kept=experiences[:1],
        dummy_group=training_group(experiences[0]),
        invalid=(f"c{step}",),
        rounds=1,
        failures={},
    )


def rows(parts: RunContext) -> list[tuple[int, int, str]]:
    folder = f"{parts.cfg.run.out_dir}/rollouts"
    return [(row["step"], row["version"], row["sample"]) for row in read_rollouts(folder)]


def write(files: RolloutFiles, *steps: int) -> None:
    for step in steps:
        files.write(rollout_batch(step), step, version=10 + step)


def test_every_group_is_written_with_what_became_of_it(parts: RunContext) -> None:
    write(RolloutFiles(parts, steps_done=0), 1)
    found = list(read_rollouts(f"{parts.cfg.run.out_dir}/rollouts"))
    assert [row["status"] for row in found] == ["kept", "zero_variance", "invalid"]
    values = [[(a["reward"], a["advantage"]) for a in row["answers"]] for row in found]
    assert values == [
        [(0.0, -1.0), (1.0, 1.0)],
        [(1.0, -1.0), (1.0, 1.0)],
        [(None, None), (1.0, None)],
    ]
    assert parts.clock.take()["store"] > 0


def test_steps_after_the_checkpoint_are_taken_back_on_every_ranks_file(
    parts: RunContext, tmp_path: Path
) -> None:
    write(RolloutFiles(parts, steps_done=0), 1, 2, 3)
    path = tmp_path / "rollouts" / "rank-0000.jsonl.zst"
    whole = rows(parts)
    path.rename(path.with_name("rank-0007.jsonl.zst"))  # of a rank that is no more
    write(RolloutFiles(parts, steps_done=2), 3)
    assert sorted(rows(parts)) == sorted(whole)
    RolloutFiles(parts, steps_done=0)
    assert rows(parts) == []


def test_a_run_killed_while_it_wrote_goes_on(parts: RunContext, tmp_path: Path) -> None:
    write(RolloutFiles(parts, steps_done=0), 1, 2)
    path = tmp_path / "rollouts" / "rank-0000.jsonl.zst"
    whole = rows(parts)
    path.write_bytes(path.read_bytes()[:-5])
    assert rows(parts) == [row for row in whole if row[0] == 1]  # read as far as it goes
    write(RolloutFiles(parts, steps_done=1), 2)
    assert rows(parts) == whole


def test_nothing_is_written_where_that_is_not_wanted(parts: RunContext, tmp_path: Path) -> None:
    parts.cfg.rollout = RolloutConfig(save=False)
    write(RolloutFiles(parts, steps_done=0), 1)
    assert not (tmp_path / "rollouts").exists()
