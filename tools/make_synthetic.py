#!/usr/bin/env python3
"""Make a small labelled video set: coloured shapes that appear, move and vanish, as H.264 files.

The set has everything that a run needs, without a download. A clip lasts 16 s at 4 frames/s and
112x112 px. Each shape is visible in one interval of whole seconds, so that one frame per second,
taken anywhere inside the second, shows exactly the annotated span. A clip belongs to one task:

    DIR/videos/{split}_{number}.mp4
    DIR/annotations/{split}_temporal_grounding.json   format of Charades-STA
    DIR/annotations/{split}_grounded_qa.json          format of NExT-GQA
    DIR/annotations/{split}_multiple_choice.json      format of NExT-GQA without "glue"

Splits: `sft` (warm-up), `train` (GRPO), `dev` (ends the warm-up), `heldout`, and `ood`, whose
colours, shapes, speed and texture occur in no other split. Clips have no sound, cuts or camera
motion, and the options of a question are in one fixed order of colours: a model of a million
parameters has to learn the set within minutes. Equal arguments give equal pixels and annotations. A
second call completes or reuses the files that it finds.

--jitter F misaligns the annotations of `train`, as labels from narration are: each interval moves
by up to F times its length, both ends together, in whole seconds.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vrl.errors import ConfigError, counted
from megatron_vrl.observe.progress import log_written
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import run_program

if TYPE_CHECKING:  # numpy and av are imported where they are used: --help answers at once
    import numpy as np
    from numpy.typing import NDArray

DURATION_S = 16
FPS = 4
SIDE_PX = 112
INTERVAL_S = (2, 6)  # shortest and longest visible span
RADIUS_PX = (28.0, 44.0)  # large: smaller ones keep a warm-up on its plateau, configs/LOG.md
SPLITS = {"sft": 0.54, "train": 0.25, "dev": 0.06, "heldout": 0.10, "ood": 0.05}  # shares of --num
TASKS = {"temporal_grounding": 0.6, "multiple_choice": 0.2, "grounded_qa": 0.2}  # default --mix
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 40),
    "white": (235, 235, 235),  # this and the next only in `ood`
    "purple": (170, 60, 200),
}
KINDS = ("square", "circle", "triangle", "cross")  # the last only in `ood`
NUM_OPTIONS = 4


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Look of the clips of a split."""

    colours: tuple[str, ...]
    kinds: tuple[str, ...]
    speed_px: float  # fastest motion, per frame
    noise: float  # standard deviation of the background's texture, grey levels


EASY = Domain(colours=tuple(COLOURS)[:4], kinds=KINDS[:3], speed_px=1.5, noise=5.0)
HARD = Domain(colours=tuple(COLOURS), kinds=KINDS, speed_px=3.75, noise=10.0)


@dataclass(frozen=True, kw_only=True)
class Shape:
    kind: str
    colour: str
    interval_s: tuple[int, int]
    radius_px: float
    brightness: float
    start_px: tuple[float, float]  # x, y of the centre in frame 0
    step_px: tuple[float, float]  # motion per frame


@dataclass(frozen=True, kw_only=True)
class Clip:
    name: str
    task: str
    noise: float
    shapes: tuple[Shape, ...]  # questions with options ask for the first
    options: tuple[str, ...]
    seed: tuple[int, ...]  # of the background


# ---- what is in a clip


def plan(sizes: dict[str, int], mix: dict[str, float], seed: int, objects: int) -> list[Clip]:
    """Return all clips of the set. Pixels of a clip depend on `seed`, split and number alone."""
    clips = []
    for code, (split, size) in enumerate(sizes.items()):
        tasks = [task for task, count in apportion(size, mix).items() for _ in range(count)]
        domain = HARD if split == "ood" else EASY
        for number, task in enumerate(tasks):
            name = f"{split}_{number:05d}"
            clips.append(plan_clip(name, task, domain, objects, (seed, code, number)))
    return clips


def plan_clip(name: str, task: str, domain: Domain, objects: int, seed: tuple[int, ...]) -> Clip:
    import numpy as np

    rng = np.random.default_rng((*seed, 0))
    colours = [str(colour) for colour in rng.permutation(domain.colours)]
    kinds = [str(kind) for kind in rng.permutation(domain.kinds)]
    shapes = tuple(
        plan_shape(rng, kind, colour, domain.speed_px)
        for kind, colour in zip(kinds[:objects], colours[:objects], strict=True)
    )
    options = tuple(sorted(colours[:NUM_OPTIONS], key=list(COLOURS).index))
    return Clip(
        name=name, task=task, noise=domain.noise, shapes=shapes, options=options, seed=(*seed, 1)
    )


def plan_shape(rng: "np.random.Generator", kind: str, colour: str, speed_px: float) -> Shape:
    length = int(rng.integers(INTERVAL_S[0], INTERVAL_S[1] + 1))
    start = int(rng.integers(0, DURATION_S - length + 1))
    radius = float(rng.uniform(*RADIUS_PX))
    x, y = rng.uniform(radius, SIDE_PX - radius, 2).tolist()
    angle, speed = rng.uniform(0, 2 * math.pi), rng.uniform(0, speed_px)
    return Shape(
        kind=kind,
        colour=colour,
        interval_s=(start, start + length),
        radius_px=radius,
        brightness=float(rng.uniform(0.85, 1.05)),
        start_px=(x, y),
        step_px=(speed * math.cos(angle), speed * math.sin(angle)),
    )


def apportion(total: int, shares: dict[str, float]) -> dict[str, int]:
    """Return whole counts in the ratio of `shares` that add up to `total` (largest remainders).

    A share that would get none takes one from the largest, as far as `total` reaches: a small set
    has all splits and tasks too.
    """
    exact = {name: total * share / sum(shares.values()) for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    for name in [name for name, share in shares.items() if share and not counts[name]]:
        largest = max(counts, key=lambda name: counts[name])
        if counts[largest] > 1:
            counts[largest] -= 1
            counts[name] += 1
    return counts


# ---- its pixels


def write_clip(clip: Clip, folder: Path) -> None:
    """Encode one clip. The file appears when it is complete."""
    import av

    final = folder / f"{clip.name}.mp4"
    partial_file = final.with_suffix(".part")
    # x264's output depends on the number of threads, and with mbtree on memory it did not write.
    options = {"preset": "veryfast", "crf": "20", "threads": "1", "x264-params": "mbtree=0"}
    with av.open(str(partial_file), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width = stream.height = SIDE_PX
        stream.pix_fmt = "yuv420p"
        for image in draw(clip):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    os.replace(partial_file, final)


def draw(clip: Clip) -> Iterator["NDArray[np.uint8]"]:
    """Yield the frames in order, [112, 112, 3] RGB."""
    import numpy as np

    rows, columns = np.mgrid[:SIDE_PX, :SIDE_PX].astype(np.float32)
    background = draw_background(np.random.default_rng(clip.seed), clip.noise)
    for index in range(DURATION_S * FPS):
        image = background.copy()
        for shape in clip.shapes:
            if shape.interval_s[0] <= index / FPS < shape.interval_s[1]:
                colour = np.array(COLOURS[shape.colour]) * shape.brightness
                image[covered(shape, index, rows, columns)] = colour.clip(0, 255)
        yield image


def draw_background(rng: "np.random.Generator", noise: float) -> "NDArray[np.uint8]":
    """Return a dim colour with grey noise in cells of 4 px, one pixel each at 28x28 px."""
    import numpy as np

    cells = SIDE_PX // 4
    texture = rng.normal(0, noise, (cells, cells, 1)).repeat(4, 0).repeat(4, 1)
    return (rng.uniform(20, 60, 3) + texture).clip(0, 255).astype(np.uint8)


def covered(shape: Shape, index: int, rows: Any, columns: Any) -> Any:
    """Return the mask [112, 112] of the pixels that the shape covers in frame `index`."""
    radius = shape.radius_px
    x, y = (
        bounced(start + index * step, radius)
        for start, step in zip(shape.start_px, shape.step_px, strict=True)
    )
    right, down = columns - x, rows - y
    reach = abs(right).clip(abs(down))  # distance from the centre in the maximum norm
    if shape.kind == "square":
        return reach <= 0.886 * radius  # the circle's area
    if shape.kind == "circle":
        return right**2 + down**2 <= radius**2
    if shape.kind == "triangle":
        return (down <= radius) & (down >= 2 * abs(right) - radius)
    return (reach <= radius) & (abs(right).clip(max=abs(down)) <= radius / 3)  # cross


def bounced(place: float, radius: float) -> float:
    """Return the position on a straight path that is reflected at the borders."""
    span = SIDE_PX - 2 * radius
    return radius + span - abs((place - radius) % (2 * span) - span)


# ---- its annotation


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


# ---- the set on disk


def make_set(out: Path, clips: list[Clip], spec: dict[str, Any], workers: int) -> int:
    """Write the missing files; return how many clips were encoded.

    Raises ConfigError if `out` holds something else.
    """
    claim(out, spec)
    present = {path.name for path in (out / "videos").iterdir()}
    missing = [clip for clip in clips if f"{clip.name}.mp4" not in present]
    if missing:
        encode(missing, out / "videos", workers)
    for name, content in annotation_files(clips, spec.get("jitter", 0.0)).items():
        write_json(out / "annotations" / name, content)
    return len(missing)


def claim(out: Path, spec: dict[str, Any]) -> None:
    """Record the arguments in an empty directory; refuse a directory that holds another set."""
    note = out / "synthetic.json"
    if note.exists():
        held = json.loads(note.read_text())
        if held != spec:
            raise ConfigError(
                f"{out} holds a set made with other arguments, {held}; "
                "give another --out or remove it."
            )
    elif out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no synthetic set; give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(note, spec)
    for folder in ("videos", "annotations"):
        (out / folder).mkdir(exist_ok=True)


def encode(clips: list[Clip], folder: Path, workers: int) -> None:
    from tqdm import tqdm

    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the pool: Ctrl-C ends this process
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        signal.signal(signal.SIGINT, heard)
        done = pool.imap_unordered(partial(write_clip, folder=folder), clips, chunksize=8)
        seconds = 0.1 if sys.stderr.isatty() else 30.0  # between lines of the bar
        for _ in tqdm(done, total=len(clips), unit="clip", desc=str(folder), mininterval=seconds):
            pass


def write_json(path: Path, content: Any) -> None:
    partial_file = path.with_suffix(".part")
    partial_file.write_text(json.dumps(content, indent=1))
    os.replace(partial_file, path)


# ---- the command


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = tool_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the set")
    parser.add_argument(
        "--num", type=int, default=4000, help=f"number of clips, divided by {SPLITS}"
    )
    parser.add_argument(
        "--split", action="append", default=[], metavar="NAME=CLIPS", help="size of one split"
    )
    parser.add_argument(
        "--mix", action="append", default=[], metavar="TASK=SHARE", help=f"default: {TASKS}"
    )
    parser.add_argument("--seed", type=int, default=1, help="random seed of the clips (default: 1)")
    parser.add_argument("--objects", type=int, choices=(1, 2), default=1, help="shapes per clip")
    parser.add_argument(
        "--jitter", type=float, default=0.0, metavar="F", help="misalign the labels of `train`"
    )
    parser.add_argument("--workers", type=int, default=2, help="number of encoding processes")
    return parser.parse_args(arguments)


def chosen(pairs: list[str], flag: str, known: dict[str, Any], number: type) -> dict[str, Any]:
    """Return the checked `NAME=NUMBER` pairs of one flag."""
    values = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            values[name] = number(text)
        except ValueError:
            raise ConfigError(f"{flag} {pair!r} is not of the form NAME=NUMBER.") from None
        if name not in known or values[name] < 0:
            raise ConfigError(f"{flag} {pair!r}: give one of {', '.join(known)} and a number >= 0.")
    return values


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    mix = chosen(args.mix, "--mix", TASKS, float) or TASKS
    sizes = apportion(args.num, SPLITS) | chosen(args.split, "--split", SPLITS, int)
    if min(args.num, args.workers) < 1 or args.seed < 0 or sum(mix.values()) <= 0:
        raise ConfigError(
            f"--num {args.num}, --workers {args.workers} and --mix {mix} must be "
            f"positive, --seed {args.seed} not negative."
        )
    if not 0 <= args.jitter < math.inf:
        raise ConfigError(f"--jitter {args.jitter} is not a number from 0 on: give 0.75, say.")
    spec = {"sizes": sizes, "mix": mix, "seed": args.seed, "objects": args.objects}
    spec |= {"jitter": args.jitter} if args.jitter else {}
    clips = plan(sizes, mix, args.seed, args.objects)
    encoded = make_set(args.out, clips, spec, args.workers)
    state = f"{counted(encoded, 'clip')} encoded" if encoded else "complete already, reused"
    splits = ", ".join(f"{name} {size}" for name, size in sizes.items())
    print(f"{state}; {splits}", flush=True)
    log_written(args.out)


if __name__ == "__main__":
    run_program(main)
