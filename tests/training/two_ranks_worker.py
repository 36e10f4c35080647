"""Run by torchrun on two ranks: what each got is written to OUT/RANK.json.

Usage: two_ranks_worker.py OUT
"""

import json
import sys
from pathlib import Path

from megatron_vrl.config import Batch, Parallel
from megatron_vrl.errors import VideoError
from megatron_vrl.parallel.mesh import agreed, init_mesh
from megatron_vrl.training.batches import plan_batches
from tests.tiny import GROUPS


def main() -> None:
    mesh = init_mesh(Parallel(), seed=1)
    mine = GROUPS[:3] if mesh.rank == 0 else GROUPS[3:4]
    budget = Batch(tokens=1)  # every group is a micro-batch of its own
    planned = plan_batches(mine, mine[0], budget, mesh)
    result = {
        "weights": [batch.weight.tolist() for batch in planned],
        "targets": [batch.target.tolist() for batch in planned],
    }
    try:
        with agreed(mesh):
            if mesh.rank == 1:
                raise VideoError("b.mp4 is empty.")
    except VideoError as error:
        result["error"] = str(error)
    with agreed(mesh):  # and both are still there
        result["survived"] = True
    (Path(sys.argv[1]) / f"{mesh.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
