"""The arithmetic of the comparison of SFT and GRPO: steps, pools, intervals, tables with holes."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from studies.arms import equal_steps, with_evaluations
from studies.bootstrap import interval
from studies.pools import (
    kept_clips,
    label_quality,
    labelled,
    pool_clips,
    split_sizes,
    write_pool,
)
from studies.results import Results
from studies.settings import ARMS, CONDITIONS
from studies.tables import read_records, write_results
from studies.timing import combined, given_seconds

from megatron_vrl.config import Source
from megatron_vrl.data.formats.training import read_whole
from megatron_vrl.errors import ConfigError, UserError

NUM = 400


def test_equal_steps_take_equal_seconds() -> None:
    seconds = {"sft": 0.25, "grpo": 2.0}
    budget = {"sft": 170, "grpo": 90}  # 42.5 s + 180 s
    assert equal_steps(budget, seconds, "sft") == 890
    assert equal_steps(budget, seconds, "grpo") == 111
    assert equal_steps({"grpo": 90}, seconds, "grpo") == 90


def test_only_the_ratio_of_the_seconds_matters() -> None:
    budget = {"sft": 170, "grpo": 90}
    steps = {equal_steps(budget, {"sft": s, "grpo": 8 * s}, "sft") for s in (0.1, 1.0, 7.0)}
    assert steps == {890}


@pytest.mark.parametrize("steps", [1, 3, 9, 170, 674])
def test_the_last_step_is_evaluated(steps: int) -> None:
    taken, every = with_evaluations(steps)
    assert taken % every == 0 and abs(taken - steps) <= every / 2


def test_the_load_of_a_round_cancels() -> None:
    calm = {"sft": 0.2, "grpo": 1.0, "grpo_kl": 1.2}
    busy = {kind: 5 * value for kind, value in calm.items()}
    assert combined([calm, busy, busy]) == pytest.approx(busy)
    assert combined([calm, calm, busy]) == pytest.approx(calm)


def test_seconds_are_given_by_kind() -> None:
    assert given_seconds("sft=0.2,grpo=1.1") == {"sft": 0.2, "grpo": 1.1, "grpo_kl": 1.1}
    for text in ("sft=0.2", "sft=0,grpo=1", "sft", "sft=a,grpo=1", "sft=1,grpo=1,other=1"):
        with pytest.raises(ConfigError, match="--seconds-per-step"):
            given_seconds(text)


# ---- pools


def test_pools_have_their_sizes_and_the_other_splits_are_the_quickstarts() -> None:
    assert split_sizes(3200) == {"sft": 1728, "train": 2400, "dev": 192, "heldout": 320, "ood": 160}
    sizes = {name: len(pool_clips(NUM, 1, CONDITIONS[name], 1)) for name in CONDITIONS}
    assert sizes == {
        "exact": 100,
        "jitter": 100,
        "small64": 64,
        "small256": 256,
        "large": 300,
        "wrong": 100,
        "wrong_selected": 100,
        "retention": 60,
    }


def test_a_seed_draws_its_own_pool_and_labels() -> None:
    jitter = CONDITIONS["jitter"]
    first, again, other = (pool_clips(NUM, 1, jitter, seed) for seed in (1, 1, 2))
    assert first == again and first != other
    assert labelled(first, jitter, 1) == labelled(first, jitter, 1) != labelled(first, jitter, 2)


def test_labels_are_exact_misaligned_or_wrong() -> None:
    clips = pool_clips(NUM, 1, CONDITIONS["exact"], 1)
    assert labelled(clips, CONDITIONS["exact"], 1) == clips
    assert label_quality(clips, labelled(clips, CONDITIONS["exact"], 1))["label_miou"] == 1
    misaligned = label_quality(clips, labelled(clips, CONDITIONS["jitter"], 1))
    assert 0.45 < misaligned["label_miou"] < 0.65
    changed = labelled(clips, CONDITIONS["wrong"], 1)
    wrong = [(c, w) for c, w in zip(clips, changed, strict=True) if c != w]
    assert len(wrong) == 40
    accuracy = label_quality(clips, changed)["label_accuracy"]
    assert accuracy == 1 - sum(c.task != "temporal_grounding" for c, _ in wrong) / 40
    for clip, label in wrong:
        assert label.shapes[0].interval_s != clip.shapes[0].interval_s
        asks_for_option = clip.task != "temporal_grounding"
        assert (label.shapes[0].colour != clip.shapes[0].colour) == asks_for_option
        assert label.shapes[0].colour in clip.options or not asks_for_option


def test_a_selected_pool_has_the_clips_of_the_kept_samples(tmp_path: Path) -> None:
    """Ids are those that the readers of a pool's sources give."""
    clips = pool_clips(NUM, 1, CONDITIONS["small64"], 1)
    sources = write_pool(tmp_path / "pool", clips, tmp_path / "videos")
    ids = [s.id for source in sources for s in read_whole(Source.model_validate(source))]
    assert len(ids) == 64
    kept = tmp_path / "kept.jsonl"
    kept.write_text("".join(json.dumps({"id": name}) + "\n" for name in ids[::2]))
    names = {clip.name for clip in kept_clips(clips, tmp_path)}
    assert names == {name[: len(clips[0].name)] for name in ids[::2]} and len(names) == 32
    kept.write_text("")
    with pytest.raises(UserError, match="kept no sample"):
        kept_clips(clips, tmp_path)


def test_a_pool_larger_than_its_set_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"raise --num 100\."):
        pool_clips(100, 1, CONDITIONS["small256"], 1)


# ---- intervals


def test_an_interval_of_one_seed_is_that_of_a_plain_bootstrap() -> None:
    """All 3^3 resamples of three questions, by hand."""
    values = np.array([[0.0, 0.3, 1.0]])
    means = [sum(drawn) / 3 for drawn in product(values[0], repeat=3)]
    expected = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    assert interval(values) == pytest.approx(expected.tolist(), abs=1e-9)


def test_an_interval_of_many_questions_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(size=(1, 400))
    margin = 1.96 * values.std() / 20
    low, high = interval(values)
    assert low == pytest.approx(values.mean() - margin, abs=0.006)
    assert high == pytest.approx(values.mean() + margin, abs=0.006)


def test_seeds_are_resampled_too() -> None:
    """Two seeds without variance inside: a resample has both, or one of them twice."""
    assert interval(np.array([[0.0] * 50, [1.0] * 50])) == pytest.approx((0.0, 1.0))


def test_questions_are_the_same_in_every_seed() -> None:
    """A question that all seeds answer alike does not become several questions."""
    question = np.random.default_rng(2).normal(size=(1, 60))
    alone, thrice = interval(question), interval(np.repeat(question, 3, axis=0))
    assert thrice == pytest.approx(alone, abs=0.02)


# ---- results and tables


def finished_arm(
    out: Path, condition: str, arm: str, seed: int, ious: Sequence[float], **more: Any
) -> None:
    """Write what an arm leaves: its record and its answers to grounding and other questions."""
    home = out / "jobs" / condition / f"seed-{seed}" / arm
    (home / "evaluations").mkdir(parents=True)
    rows = [("temporal_grounding", {"format": 1.0, "temporal_iou": iou}) for iou in ious]
    rows += [("multiple_choice", {"format": 1.0, "accuracy": 1.0})]
    rows += [("grounded_qa", {"format": 0.0, "accuracy": 0.0, "temporal_iou": 0.5})]
    lines = [json.dumps({"task": task, "components": parts}) for task, parts in rows]
    for split in ("heldout", "ood"):
        (home / f"evaluations/sft-{split}.jsonl").write_text("\n".join(lines) + "\n")
    record = {
        "condition": condition,
        "arm": arm,
        "seed": seed,
        "steps": "10",
        "seconds": 2.0 * seed,
        "rate": None,
        "home": str(home.relative_to(out)),
        "stage": "sft",
        "pool": {"clips": 100, "label_miou": 0.55, "label_accuracy": 1.0},
        **more,
    }
    file = out / "records" / condition / f"seed-{seed}" / f"{arm}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))


def test_a_table_has_holes_where_nothing_ran(tmp_path: Path) -> None:
    finished_arm(tmp_path, "jitter", "sft", 1, [0.4, 0.6], rate=5e-4)
    finished_arm(tmp_path, "jitter", "sft", 2, [0.4, 0.6], rate=5e-4)
    finished_arm(tmp_path, "jitter", "sft_grpo", 1, [0.5, 0.7], steps="170 + 90")
    table = write_results(tmp_path, [1, 2, 3])
    rows = {line.split(" | ")[0]: line for line in table.splitlines()}
    sft = rows["| " + ARMS["sft"]]
    assert sft.count("50.0 (40.0 to 60.0) | 50.0 | 100.0 | 0.0 | 75.0 |") == 2  # both splits
    assert sft.endswith("| 10 | 3 | 0.0005 | 2 (3 not run) |")
    assert rows["| " + ARMS["sft_grpo"]].endswith("| 170 + 90 | 2 |  | 1 (2, 3 not run) |")
    assert rows["| " + ARMS["grpo"]].count("not run") == 10
    assert table.count("*not run*") == len(CONDITIONS) - 1
    assert "(100 clips; labels against the truth: mIoU 55.0, accuracy 100)" in table
    study = json.loads((tmp_path / "study.json").read_text())
    assert len(study["arms"]) == 3
    assert study["arms"][0]["metrics"]["ood"]["QA mIoU"] == 0.5


def test_differences_are_paired_and_with_the_best_sft(tmp_path: Path) -> None:
    """Questions differ by 0.9, arms by 0.1 in each: the paired interval has no width."""
    for seed in (1, 2):
        finished_arm(tmp_path, "jitter", "sft", seed, [0.0, 0.8])
        finished_arm(tmp_path, "jitter", "more_sft", seed, [0.05, 0.9])
        finished_arm(tmp_path, "jitter", "sft_grpo", seed, [0.1, 0.9])
    results = Results(tmp_path, read_records(tmp_path))
    assert results.best_sft("jitter") == "more_sft"
    assert results.comparisons("jitter") == [("sft_grpo", "more_sft"), ("sft_grpo", "sft")]
    found = results.difference("jitter", ("sft_grpo", "sft"), "heldout", "mIoU")
    assert found == pytest.approx({"mean": 0.1, "low": 0.1, "high": 0.1})


def test_an_sft_arm_with_fewer_seeds_is_not_the_best(tmp_path: Path) -> None:
    finished_arm(tmp_path, "exact", "sft", 1, [0.5])
    finished_arm(tmp_path, "exact", "sft", 2, [0.5])
    finished_arm(tmp_path, "exact", "more_sft", 1, [1.0])
    assert Results(tmp_path, read_records(tmp_path)).best_sft("exact") == "sft"
