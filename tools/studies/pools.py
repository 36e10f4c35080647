"""Data of the study: one set of clips, and for each condition and seed a pool with its labels.

The splits sft, dev, heldout and ood are those of the quickstart, byte for byte, with exact labels.
A pool is a random part of the split `train`, which is as large as the largest pool. The seed of an
experiment decides which clips a pool has, how their labels are moved and which are wrong.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from make_synthetic import write_json
from synthetic.annotations import annotation_files, misaligned
from synthetic.clips import DURATION_S, INTERVAL_S, SPLITS, TASKS, Clip, apportion, plan

from megatron_vrl.errors import ConfigError, UserError
from studies.settings import LARGEST_POOL, Condition

FORMATS = {
    "temporal_grounding": "charades_sta",
    "grounded_qa": "next_gqa",
    "multiple_choice": "multiple_choice",
}


def split_sizes(num: int) -> dict[str, int]:
    """Return the clips of each split, for a quickstart of `num` clips with a larger `train`."""
    sizes = apportion(num, SPLITS)
    return sizes | {"train": round(LARGEST_POOL * sizes["train"])}


def pool_clips(num: int, objects: int, condition: Condition, seed: int) -> list[Clip]:
    """Return the clips of a pool with their true labels.

    Raises ConfigError if the set has too few.
    """
    clips = train_clips(num, objects)
    size = condition.count or round(condition.samples * len(clips) / LARGEST_POOL)
    drawn: list[Clip] = []
    for number, (task, count) in enumerate(apportion(size, TASKS).items()):
        of_task = [clip for clip in clips if clip.task == task]
        if count > len(of_task):
            raise ConfigError(
                f"A pool of {size} samples needs {count} clips of {task}, and the set has "
                f"{len(of_task)}: raise --num {num}."
            )
        order = np.random.default_rng([seed, 3, number]).permutation(len(of_task))
        drawn += [of_task[index] for index in sorted(order[:count])]
    if condition.is_grounding_only:
        drawn = [clip for clip in drawn if clip.task == "temporal_grounding"]
    return drawn


@cache
def train_clips(num: int, objects: int) -> tuple[Clip, ...]:
    """Return the clips of the split `train`, as tools/make_synthetic.py makes them."""
    planned = plan(split_sizes(num), TASKS, 1, objects)
    return tuple(clip for clip in planned if clip.name.startswith("train_"))


def labelled(clips: Sequence[Clip], condition: Condition, seed: int) -> list[Clip]:
    """Return the clips with the labels of the condition: misaligned, or some of them wrong."""
    if condition.jitter:
        clips = [
            replace(clip, shapes=misaligned(of_seed(clip, seed), condition.jitter).shapes)
            for clip in clips
        ]
    count = round(condition.wrong * len(clips))
    wrong = set(np.random.default_rng([seed, 4]).permutation(len(clips))[:count].tolist())
    return [mislabelled(c, seed) if number in wrong else c for number, c in enumerate(clips)]


def of_seed(clip: Clip, seed: int) -> Clip:
    """Return the clip with a random stream of its own for each seed of the study."""
    return replace(clip, seed=(*clip.seed, seed))


def mislabelled(clip: Clip, seed: int) -> Clip:
    """Return the clip with another interval, and in a question with options another answer.

    The interval has the distribution of make_synthetic. The question stays as it is.
    """
    rng = np.random.default_rng((*clip.seed, seed, 5))
    shapes = []
    for shape in clip.shapes:
        interval_s = shape.interval_s
        while interval_s == shape.interval_s:
            length = int(rng.integers(INTERVAL_S[0], INTERVAL_S[1] + 1))
            start = int(rng.integers(0, DURATION_S - length + 1))
            interval_s = start, start + length
        shapes.append(replace(shape, interval_s=interval_s))
    if clip.task != "temporal_grounding":  # its sentences name the colour
        others = [colour for colour in clip.options if colour != shapes[0].colour]
        shapes[0] = replace(shapes[0], colour=others[rng.integers(len(others))])
    return replace(clip, shapes=tuple(shapes))


def label_quality(clips: Sequence[Clip], labels: Sequence[Clip]) -> dict[str, float]:
    """Return the number of clips, and how far their labels agree with the truth.

    "label_miou": mean IoU of the intervals; "label_accuracy": fraction of right options, if the
    pool has questions with options.
    """
    pairs = list(zip(clips, labels, strict=True))
    ious = [
        interval_iou(true.interval_s, given.interval_s)
        for clip, label in pairs
        for true, given in zip(clip.shapes, label.shapes, strict=True)
        if clip.task != "multiple_choice"
    ]
    right = [
        clip.shapes[0].colour == label.shapes[0].colour
        for clip, label in pairs
        if clip.task != "temporal_grounding"
    ]
    options = {"label_accuracy": float(np.mean(right))} if right else {}
    return {"clips": len(clips), "label_miou": float(np.mean(ious)), **options}


def interval_iou(first: tuple[int, int], second: tuple[int, int]) -> float:
    shared = max(0, min(first[1], second[1]) - max(first[0], second[0]))
    return shared / (first[1] - first[0] + second[1] - second[0] - shared)


def write_pool(home: Path, labels: Sequence[Clip], videos: Path) -> list[dict[str, str]]:
    """Write the annotations of a pool to `home`, and return its sources."""
    home.mkdir(parents=True, exist_ok=True)
    for name, content in annotation_files(list(labels)).items():
        write_json(home / name, content)
    tasks = {clip.task for clip in labels}
    return sources(home, "train", videos, [task for task in FORMATS if task in tasks])


def sources(
    annotations: Path, split: str, videos: Path, tasks: Iterable[str] = FORMATS
) -> list[dict[str, str]]:
    """Return the sources of a split, as in the section `data` of a config."""
    return [
        {
            "json_path": str(annotations / f"{split}_{task}.json"),
            "data_folder": str(videos),
            "format": FORMATS[task],
        }
        for task in tasks
    ]


def common_data(out: Path) -> dict[str, Any]:
    """Return data.sft of the cold start and data.evaluation of every job."""
    annotations, videos = out / "data/annotations", out / "data/videos"
    dev = sources(annotations, "dev", videos, ("temporal_grounding",))
    evaluation = {"dev": dev} | {
        split: sources(annotations, split, videos) for split in ("heldout", "ood")
    }
    return {
        "data.sft": sources(annotations, "sft", videos),
        "data.evaluation": evaluation,
    }


def kept_clips(labels: Sequence[Clip], selection: Path) -> list[Clip]:
    """Return the clips with a question that tools/select_data.py kept.

    Raises UserError if there is none.
    """
    rows = (selection / "kept.jsonl").read_text().splitlines()
    kept = [json.loads(row)["id"] for row in rows]
    if not kept:
        raise UserError(
            f"The selection in {selection} kept no sample: its model earns no reward that varies."
        )
    return [clip for clip in labels if any(name.startswith(clip.name) for name in kept)]
