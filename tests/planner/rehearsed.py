"""Rehearsals of models of the real widths with few layers, all in one process.

Run as `rehearsed.py CASES.json OUT.json`, alone: the fake GPU is loaded before torch. A case is
[config, layers of the language model, rank, overrides].
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_vrl.process import fake_gpu

fake_gpu.install()

from megatron_vrl.cli.plan import architecture_of  # noqa: E402
from megatron_vrl.config import load_config  # noqa: E402
from megatron_vrl.models.families import family_of  # noqa: E402
from megatron_vrl.planner.workload import row_multiple, step_sizes, worst_batches  # noqa: E402
from megatron_vrl.rehearsal.rehearse import default_micro_batches, rehearse  # noqa: E402


def rehearsed(
    folder: Path, config: str, layers: int, rank: int, overrides: list[str]
) -> dict[str, Any]:
    """Return the counts of `rank` for the first of the planner's micro-batches."""
    cfg = load_config(Path(config), overrides)
    sizes = json.loads(Path(cfg.model.architecture).read_text())
    (sizes.get("text_config") or sizes)["num_hidden_layers"] = layers
    tower = {"depth": 2, "fullatt_block_indexes": [1]}
    if "deepstack_visual_indexes" in sizes["vision_config"]:
        tower = {"depth": 4, "deepstack_visual_indexes": [0, 1, 2]}
    sizes["vision_config"] |= tower
    small = folder / "small.json"
    small.write_text(json.dumps(sizes))
    cfg = load_config(Path(config), [*overrides, f"model.architecture={small}"])
    arch = architecture_of(cfg)
    family = family_of(arch)
    batch = next(
        worst_batches(cfg, family, step_sizes(cfg, family), row_multiple(cfg), given=False)
    )
    count = default_micro_batches(cfg)
    return asdict(rehearse(cfg, arch, batch, rank, cfg.parallel.processes, count))


if __name__ == "__main__":
    given, out = map(Path, sys.argv[1:])
    rows = [rehearsed(out.parent, *case) for case in json.loads(given.read_text())]
    out.write_text(json.dumps(rows))
