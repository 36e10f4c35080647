"""The synthetic set: what the annotations say is what the decoded pixels show."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from synthetic.annotations import annotation_files
from synthetic.clips import COLOURS, DURATION_S, EASY, FPS, KINDS, TASKS, apportion, plan
from synthetic.pixels import bounced

from megatron_vrl.config import Source
from megatron_vrl.data.formats.training import read
from megatron_vrl.types import Sample

TOOL = Path(__file__).parents[2] / "tools/make_synthetic.py"
SPLITS = ("sft", "train", "dev", "heldout", "ood")
FORMS = {
    "temporal_grounding": "charades_sta",
    "multiple_choice": "multiple_choice",
    "grounded_qa": "next_gqa",
}
ARGUMENTS = [f"--split={split}=4" for split in SPLITS] + [
    "--num=20",
    "--mix=temporal_grounding=2",
    "--mix=multiple_choice=1",
    "--mix=grounded_qa=1",
]


def make(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), f"--out={out}", *ARGUMENTS, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def annotations(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "annotations").iterdir()}


def apart(first: Path, second: Path) -> float:
    """Mean difference of two clips' pixels, grey levels. An encoder may choose differently on
    another processor; what it was given may not differ."""
    return float(abs(frames(first).astype(int) - frames(second)).mean())


def samples(folder: Path, split: str) -> list[Sample]:
    all_samples = []
    form: Any
    for task, form in FORMS.items():
        source = Source(
            json_path=str(folder / f"annotations/{split}_{task}.json"),
            data_folder=str(folder / "videos"),
            format=form,
        )
        all_samples += read(source)
    return all_samples


def frames(path: str | Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def seen_seconds(video: np.ndarray) -> list[int]:
    """Seconds in which the picture differs from the clip's usual one, the empty background.

    A shape may be visible for 6 of 16 s and moves, so each pixel's median is background.
    """
    changed = abs(video.astype(int) - np.median(video, axis=0)).max(axis=-1) > 40
    share = changed.mean(axis=(1, 2)).reshape(DURATION_S, FPS)
    assert ((share > 0.02).all(1) | (share < 0.01).all(1)).all()  # whole seconds only
    seconds: list[int] = np.flatnonzero(share[:, 0] > 0.02).tolist()
    return seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "set"
    done = make(out)
    assert done.returncode == 0, done.stderr
    return out


def test_the_readers_take_every_file(folder: Path) -> None:
    for split in SPLITS:
        found = samples(folder, split)
        assert Counter(sample.task for sample in found) == {
            "temporal_grounding": 2,
            "multiple_choice": 1,
            "grounded_qa": 1,
        }
        assert all(Path(sample.first_path).is_file() for sample in found)
        assert all(sample.duration_s == DURATION_S for sample in found)


def test_every_clip_is_h264_of_the_annotated_length(folder: Path) -> None:
    paths = sorted((folder / "videos").iterdir())
    assert len(paths) == 20
    for path in paths:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height) == (112, 112) and stream.average_rate == FPS
            assert sum(1 for _ in container.decode(video=0)) == DURATION_S * FPS


def test_pixels_change_exactly_in_the_annotated_interval(folder: Path) -> None:
    for sample in samples(folder, "sft") + samples(folder, "heldout"):
        for start, end in sample.intervals_s:
            assert seen_seconds(frames(sample.first_path)) == list(range(int(start), int(end)))


def test_the_asked_colour_is_the_one_on_screen(folder: Path) -> None:
    asked = [sample for sample in samples(folder, "sft") if sample.options]
    assert asked
    for sample in asked:
        video = frames(sample.first_path).astype(int)
        shape = abs(video - np.median(video, axis=0)).max(axis=-1) > 60
        shown = np.median(video[shape], axis=0)
        names = list(sample.options)
        nearest = min(names, key=lambda name: abs(np.array(COLOURS[name]) - shown).sum())
        assert nearest == sample.options[ord(sample.option) - ord("A")]


def test_no_two_splits_share_a_clip(folder: Path) -> None:
    names = [Path(sample.first_path).name for split in SPLITS for sample in samples(folder, split)]
    assert len(names) == len(set(names)) == 20
    pictures = [path.read_bytes() for path in (folder / "videos").iterdir()]
    assert len(set(pictures)) == 20


@pytest.mark.slow
def test_same_arguments_same_clips_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "again", "--workers=1").returncode == 0
    assert make(tmp_path / "other", "--seed=2").returncode == 0
    assert annotations(tmp_path / "again") == annotations(folder)
    assert annotations(tmp_path / "other") != annotations(folder)
    for clip in (folder / "videos").iterdir():
        assert clip.read_bytes() == (tmp_path / "again/videos" / clip.name).read_bytes()
        assert apart(clip, tmp_path / "other/videos" / clip.name) > 2


def test_a_half_made_set_is_completed_and_a_whole_one_reused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "set")
    clip, whole = "videos/sft_00001.mp4", digests(folder)
    (tmp_path / "set" / clip).unlink()
    (tmp_path / "set/annotations/dev_grounded_qa.json").unlink()
    done = make(tmp_path / "set")
    assert "1 clip encoded" in done.stdout
    assert done.stderr.splitlines()[-1] == f"Written: {tmp_path / 'set'}"
    assert digests(tmp_path / "set") | {clip: ""} == whole | {clip: ""}
    assert apart(folder / clip, tmp_path / "set" / clip) < 0.5
    completed = digests(tmp_path / "set")
    assert "reused" in make(tmp_path / "set").stdout
    assert digests(tmp_path / "set") == completed


def test_refusals_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out, argument, names in [
        (folder, "--seed=9", "other arguments"),
        (tmp_path, "--seed=1", "not empty"),
        (tmp_path / "new", "--split=test=4", "--split 'test=4'"),
        (tmp_path / "new", "--split=sft=many", "--split 'sft=many'"),
        (tmp_path / "new", "--workers=0", "--workers 0"),
    ]:
        done = make(out, argument)
        assert done.returncode == 2
        assert re.match("error: .+", done.stderr) and done.stderr.count("\n") == 1
        assert names in done.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("objects", [1, 2])
def test_planned_clips_have_valid_shapes_and_intervals(objects: int) -> None:
    clips = plan(dict.fromkeys(SPLITS, 40), {"grounded_qa": 1.0}, seed=3, objects=objects)
    for clip in clips:
        assert len({(s.kind, s.colour) for s in clip.shapes}) == len(clip.shapes) == objects
        assert clip.shapes[0].colour in clip.options and len(set(clip.options)) == 4
        for shape in clip.shapes:
            start, end = shape.interval_s
            assert 0 <= start < end <= DURATION_S and 2 <= end - start <= 6
            for index in range(DURATION_S * FPS):
                for place, step in zip(shape.start_px, shape.step_px, strict=True):
                    centre = bounced(place + index * step, shape.radius_px)
                    assert shape.radius_px - 1e-6 <= centre <= 112 - shape.radius_px + 1e-6
    easy = {s.colour for clip in clips if not clip.name.startswith("ood") for s in clip.shapes}
    hard = {s.colour for clip in clips if clip.name.startswith("ood") for s in clip.shapes}
    assert easy == set(EASY.colours) and hard - easy and hard <= set(COLOURS)
    assert {s.kind for clip in clips for s in clip.shapes} == set(KINDS)


@pytest.mark.parametrize("total", [0, 1, 7, 4000])
def test_apportioned_counts_add_up(total: int) -> None:
    shares = {"a": 0.55, "b": 0.25, "c": 0.2}
    counts = apportion(total, shares)
    assert sum(counts.values()) == total
    assert all(abs(counts[name] - total * share) < 1 for name, share in shares.items())


def test_the_two_object_set_asks_about_both(tmp_path: Path) -> None:
    assert make(tmp_path / "two", "--objects=2").returncode == 0
    records = json.loads((tmp_path / "two/annotations/train_temporal_grounding.json").read_text())
    for record in records.values():
        assert len(set(record["sentences"])) == len(record["timestamps"]) == 2


def test_jitter_misaligns_the_labels_of_the_pool_alone() -> None:
    """The figures are those of 480 grounding clips: tIoU of a label with the truth, and recall."""
    clips = plan({"sft": 10, "train": 800, "heldout": 10}, TASKS, seed=1, objects=1)
    exact, moved = annotation_files(clips), annotation_files(clips, jitter=0.75)
    assert {name for name in exact if exact[name] != moved[name]} == {
        "train_temporal_grounding.json",
        "train_grounded_qa.json",
    }
    overlaps = []
    for name, record in exact["train_temporal_grounding.json"].items():
        [[start, end]] = record["timestamps"]
        [[low, high]] = moved["train_temporal_grounding.json"][name]["timestamps"]
        assert 0 <= low < high <= DURATION_S and low % 1 == high % 1 == 0
        overlap = max(0.0, min(end, high) - max(start, low))
        overlaps.append(overlap / (max(end, high) - min(start, low)))
    assert 0.5 < np.mean(overlaps) < 0.6
    assert 0.45 < np.mean([overlap >= 0.5 for overlap in overlaps]) < 0.6
    assert moved == annotation_files(clips, jitter=0.75)
