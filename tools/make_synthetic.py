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
from functools import partial
from pathlib import Path
from typing import Any

from synthetic.annotations import annotation_files
from synthetic.clips import SPLITS, TASKS, Clip, apportion, plan
from synthetic.pixels import write_clip

from megatron_vrl.errors import ConfigError, counted
from megatron_vrl.observe.progress import log_written
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import run_program


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
