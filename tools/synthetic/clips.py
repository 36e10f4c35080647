"""Content of the synthetic clips: which shapes, where and when. Nothing is drawn here."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # numpy is imported where it is used: --help answers at once
    import numpy as np

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
