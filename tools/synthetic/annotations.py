"""Annotations of the synthetic clips, exact or misaligned."""

from dataclasses import replace
from typing import Any

from synthetic.clips import DURATION_S, NUM_OPTIONS, Clip


def misaligned(clip: Clip, jitter: float) -> Clip:
    """Return the clip with intervals moved by U(-jitter, jitter) x their length, whole seconds.

    What a move leaves of an interval inside the clip stays; a move that leaves nothing is drawn
    again.
    """
    import numpy as np

    rng = np.random.default_rng((*clip.seed, 2))
    shapes = []
    for shape in clip.shapes:
        start, end = shape.interval_s
        while True:
            by = rng.uniform(-jitter, jitter) * (end - start)
            moved = max(0, round(start + by)), min(DURATION_S, round(end + by))
            if moved[0] < moved[1]:
                break
        shapes.append(replace(shape, interval_s=moved))
    return replace(clip, shapes=tuple(shapes))


def grounding_record(clip: Clip) -> dict[str, Any]:
    """Return annotations in the format of Charades-STA: a sentence and an interval per shape."""
    return {
        "duration": float(DURATION_S),
        "timestamps": [[float(s) for s in shape.interval_s] for shape in clip.shapes],
        "sentences": [f"the {shape.colour} {shape.kind} is visible" for shape in clip.shapes],
    }


def question_record(clip: Clip) -> dict[str, Any]:
    """Return the annotations in the format of NExT-GQA; multiple choice has no "glue"."""
    asked = clip.shapes[0]
    letters = "ABCDEF"[:NUM_OPTIONS]
    record = {
        "id": f"{clip.name}_0",
        "video": f"{clip.name}.mp4",
        "question": f"which colour is the {asked.kind}?",
        "options": [f"({x}) {text}" for x, text in zip(letters, clip.options, strict=True)],
        "duration": DURATION_S,
        "glue": [[float(s) for s in asked.interval_s]],
        "type": "colour",
        "answer": f"({letters[clip.options.index(asked.colour)]})",
    }
    if clip.task == "multiple_choice":
        del record["glue"]
    return record


def annotation_files(clips: list[Clip], jitter: float = 0.0) -> dict[str, Any]:
    """Return file name -> content. `jitter` misaligns the annotations of the split `train`."""
    files: dict[str, Any] = {}
    for clip in clips:
        split = clip.name.split("_")[0]
        name = f"{split}_{clip.task}.json"
        if jitter and split == "train":
            clip = misaligned(clip, jitter)
        if clip.task == "temporal_grounding":
            files.setdefault(name, {})[clip.name] = grounding_record(clip)
        else:
            files.setdefault(name, []).append(question_record(clip))
    return files
