"""Estimate memory and seconds of a step on GPUs that need not be here.

    mvrl plan CONFIG [--gpus N] [--gpu h200] [--search] [--json] [section.key=value ...]

The command checks every rule of the parallel layout. It counts the bytes in a GPU's memory for each
pipeline stage and the tokens and FLOPs of a step, and estimates the seconds of each phase and what
bounds it. A layout that is not possible or does not fit is refused with the reason (exit code 2),
and the nearest layout that fits is named. --search ranks the layouts of that many GPUs by the
seconds of a step. Sizes are the most that CONFIG allows; --prompt-tokens and --response-tokens set
typical sizes instead. What is counted, and how well the estimates hold: docs/planner.md.
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from megatron_vrl.errors import EXIT_CODE, ConfigError, counted
from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program

if TYPE_CHECKING:
    from megatron_vrl.config import RunConfig

GPU_NAMES = ("a100", "a100-40", "h100", "h200", "b200", "l40s")  # GPUS of planner.hardware


def make_parser() -> OverrideParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("config", metavar="CONFIG", help="YAML, see configs/")
    add("--gpus", type=int, metavar="N", help="number of GPUs (default: parallel.processes)")
    gpus = f"{', '.join(GPU_NAMES)}, or a measured machine's .json (default: h100)"
    add("--gpu", default="h100", help=gpus)
    add("--mfu", type=float, help="fraction of peak FLOP/s that matrix products reach")
    add("--prompt-tokens", type=int, metavar="P", help="typical size, instead of the most")
    add("--response-tokens", type=int, metavar="R", help="typical size, instead of the most")
    add("--clip-seconds", type=float, metavar="S", help="seconds of a video in its file")
    add("--search", action="store_true", help="rank the layouts that fit")
    add("--json", action="store_true", help="print JSON: bytes, FLOPs, seconds")
    parser.add_overrides()
    return parser


def main() -> int:
    arguments = make_parser().parse_intermixed_args()
    from megatron_vrl.config import load_config

    cfg = load_config(arguments.config, arguments.overrides)
    values, text = _search(arguments, cfg) if arguments.search else _plan(arguments, cfg)
    print(json.dumps(values, indent=1) if arguments.json else text)
    for sentence in values["refused"]:
        print(f"error: {sentence}", file=sys.stderr)
    return EXIT_CODE if values["refused"] else 0


def _plan(arguments: argparse.Namespace, cfg: "RunConfig") -> tuple[dict[str, Any], str]:
    """Return the plan of one layout, as JSON values and as text."""
    from megatron_vrl.planner.plan import make_plan, refusals
    from megatron_vrl.planner.render import (
        candidate_values,
        format_nearest,
        format_plan,
        heading,
        values,
    )
    from megatron_vrl.planner.search import nearest_layout

    arch, request = architecture_of(cfg), _request(arguments, cfg)
    refused = refusals(cfg, arch, request.gpu, request.gpus)
    found: dict[str, Any] = {**heading(cfg, arch, request), "memory_bytes": {}, "refused": refused}
    text = ""
    if not refused:
        plan = make_plan(cfg, arch, request)
        found, text = values(cfg, arch, request, plan), format_plan(cfg, arch, request, plan)
    if found["refused"]:
        near = nearest_layout(cfg, arch, request)
        found["nearest"] = candidate_values(near) if near else None
        text += "\n" * bool(text) + format_nearest(found["nearest"])
    return found, text


def _search(arguments: argparse.Namespace, cfg: "RunConfig") -> tuple[dict[str, Any], str]:
    """Return the layouts that fit, fastest first, as JSON values and as a table."""
    from megatron_vrl.planner.render import candidate_values, heading, search_table
    from megatron_vrl.planner.search import rank_layouts

    arch, request = architecture_of(cfg), _request(arguments, cfg)
    found, tried = rank_layouts(cfg, arch, request)
    refused = (
        [] if found else [f"No layout of {counted(request.gpus, 'GPU')} fits; {tried} were tried."]
    )
    values = heading(cfg, arch, request) | {
        "tried": tried,
        "layouts": [candidate_values(each) for each in found],
        "refused": refused,
    }
    return values, search_table(found, tried)


def architecture_of(cfg: "RunConfig") -> Any:
    """Return the architecture of the checkpoint, or of model.architecture where it is absent."""
    from megatron_vrl.checkpoint import layout

    return layout.architecture_of(cfg.model.checkpoint, cfg.model.architecture)


def _request(arguments: argparse.Namespace, cfg: "RunConfig") -> Any:
    """Return the planner's PlanRequest. Raise ConfigError for values out of range."""
    from megatron_vrl.planner.hardware import find_gpu
    from megatron_vrl.planner.plan import PlanRequest
    from megatron_vrl.planner.speed import DEFAULT_MFU

    parallel = cfg.parallel
    if arguments.gpus is not None and arguments.gpus < 1:
        raise ConfigError(f"--gpus {arguments.gpus} is none at all: give 1 or more.")
    if arguments.mfu is not None and not 0 < arguments.mfu <= 1:
        raise ConfigError(f"--mfu {arguments.mfu} is no fraction: give one above 0, at most 1.")
    gpus = arguments.gpus or parallel.processes
    return PlanRequest(
        gpu=find_gpu(arguments.gpu),
        gpus=gpus or parallel.tensor * parallel.context * parallel.pipeline,
        mfu=arguments.mfu or DEFAULT_MFU,
        prompt=arguments.prompt_tokens,
        response=arguments.response_tokens,
        clip_s=arguments.clip_seconds,
    )


if __name__ == "__main__":
    run_program(main)
