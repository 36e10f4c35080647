"""Mistakes that show in a whole run of the main job: one sentence, and nothing lost."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_vrl.config import load_config
from megatron_vrl.trainer.state import RunState
from tests.running import CONFIG, sentence_of, train_in


def test_a_resumed_run_removes_the_rows_that_it_writes_again() -> None:
    assert RunState().next_row is None
    assert RunState(stage="sft", step=4).next_row == ("sft", 5)
    assert RunState(stage="grpo").next_row == ("grpo", 1)
    stage, step = RunState(stage="done").next_row  # type: ignore[misc]
    assert stage == "grpo" and step > 10**9  # none of them


@pytest.fixture
def copy(quickstart: Path, tmp_path: Path) -> Path:
    """The quickstart's folder again, with videos and annotations that may be spoiled."""
    run = tmp_path / "runs" / "quickstart"
    shutil.copytree(quickstart / "runs" / "quickstart" / "data", run / "data")
    for name in ("model-hf", "model-megatron"):
        (run / name).symlink_to(quickstart / "runs" / "quickstart" / name)
    return tmp_path


@pytest.mark.slow
def test_a_missing_video_stops_a_run_without_tolerance_and_is_replaced_in_another(
    copy: Path,
) -> None:
    from megatron_vrl.data.mix import SampleStream, load

    cfg = yaml.safe_load(CONFIG.read_text())
    sources = load_config(CONFIG).data.train
    sources = [s.model_copy(update={"json_path": str(copy / s.json_path)}) for s in sources]
    order = SampleStream(load(sources, cfg["run"]["seed"]), cfg["run"]["seed"]).take(6)
    video = copy / order[5].first_path  # of the third step
    assert order[5].first_path not in {sample.first_path for sample in order[:4]}
    run = copy / "runs" / "quickstart"

    aside = copy / "aside.mp4"
    video.rename(aside)
    done = train_in(copy, "video.max_bad_fraction=0")
    assert done.stderr.count("there was no update") == 1  # only of the first step
    assert sentence_of(done) == (
        "error: 1 of the 6 samples drawn have bad videos, over video.max_bad_fraction=0.0: 1 "
        f"missing (first {order[5].first_path}); see quarantine.jsonl, check the data with "
        "tools/check_data.py, or raise the limit."
    )
    rows = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows if '"phase": "grpo"' in row] == [1, 2]
    assert (run / "checkpoints" / "latest").read_text() == "grpo-0-000002"

    video.write_bytes(aside.read_bytes()[:2000])
    done = train_in(copy)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = (run / "metrics.jsonl").read_text().splitlines()
    assert whole[: len(rows)] == rows
    of_grpo = [json.loads(row) for row in whole if '"phase": "grpo"' in row]
    assert [row["step"] for row in of_grpo] == [1, 2, 3]
    assert [row["data/bad_samples"] for row in of_grpo] == [0, 0, 1]
    [bad] = map(json.loads, (run / "quarantine.jsonl").read_text().splitlines())
    assert (bad["step"], bad["sample"], bad["video"]) == (3, order[5].id, order[5].first_path)
    assert bad["reason"].startswith(f"{order[5].first_path} cannot be opened as a video")


@pytest.mark.slow
def test_full_disk_ends_all_ranks(copy: Path) -> None:
    """Rank 0 alone writes metrics; the other must not be left waiting."""
    run = copy / "runs" / "quickstart"
    (run / "metrics.jsonl").symlink_to("/dev/full")
    line = sentence_of(train_in(copy, ranks=2))
    assert "The disk is full: runs/quickstart/metrics.jsonl cannot grow" in line


@pytest.mark.slow
def test_annotation_with_wrong_fields_names_file_and_record(copy: Path) -> None:
    path = copy / "runs/quickstart/data/annotations/heldout_temporal_grounding.json"
    records = json.loads(path.read_text())
    name = list(records)[1]
    del records[name]["sentences"]
    path.write_text(json.dumps(records))
    line = sentence_of(train_in(copy, ranks=2))
    assert line.endswith(f"{path.name}: record '{name}': field 'sentences' is missing.")


@pytest.mark.slow
def test_a_folder_without_the_videos_is_one_sentence_while_a_checkpoint_is_written(
    copy: Path,
) -> None:
    """The checkpoint before GRPO is in flight: its writer must not end in a traceback."""
    sources = yaml.safe_load(CONFIG.read_text())["data"]["train"]
    train = json.dumps([source | {"data_folder": "nowhere"} for source in sources])
    done = train_in(copy, "data.evaluation={}", f"data.train={train}", "observe.wandb=offline")
    line = sentence_of(done)
    assert "samples drawn have bad videos, over video.max_bad_fraction" in line
    assert done.stderr.splitlines()[-1] == line
    lines = [line for line in done.stderr.splitlines() if line.startswith("Quarantined ")]
    assert "nowhere" in lines[0] and len(lines) == len(set(lines)) <= 50
    assert all(" more: " in line for line in lines[1:])
    assert (copy / "runs/quickstart/checkpoints/latest").read_text() == "grpo-0-000000"
