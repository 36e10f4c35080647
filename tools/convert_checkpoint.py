"""Convert checkpoints between Hugging Face and Megatron, or compare two of them bit for bit.

    convert_checkpoint.py hf-to-megatron SRC DST
    convert_checkpoint.py megatron-to-hf SRC DST
    convert_checkpoint.py verify A B

Runs in one process. A Megatron checkpoint is what training writes (`weights/`, `published/`), so
it loads in any layout. DST must not exist.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vrl.config import Model, Parallel
from megatron_vrl.errors import EXIT_CODE, CheckpointError, UserError

if TYPE_CHECKING:
    from megatron_vrl.training.policy import Policy


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("direction", choices=["hf-to-megatron", "megatron-to-hf", "verify"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.direction == "verify":
            return _verify(arguments.source, arguments.target)
        _convert(arguments.source, arguments.target, arguments.direction)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    return 0


def _convert(source: Path, target: Path, direction: str) -> None:
    if target.exists():
        raise CheckpointError(f"{target} exists already: remove it or choose another directory.")
    from megatron_vrl.model.weights import save_published
    from megatron_vrl.training.checkpoint import published_files, save_checkpoint

    policy = _loaded(source)
    template = published_files(source)
    if direction == "hf-to-megatron":
        save_checkpoint(target, policy, {}, template)
    else:
        save_published(policy.chunks, template, target)
    print(f"{target}: {policy.arch.num_parameters:,} parameters")


def _verify(first: Path, second: Path) -> int:
    import torch

    from megatron_vrl.model.weights import published_tensors

    a, b = (dict(published_tensors(_loaded(path).chunks)) for path in (first, second))
    different = sorted(
        n for n in a.keys() | b.keys() if n not in a or n not in b or not torch.equal(a[n], b[n])
    )
    if different:
        raise CheckpointError(
            f"{len(different)} of {len(a)} tensors of {first} and {second} differ, "
            f"first {different[0]}."
        )
    print(f"{len(a)} tensors are bit-equal")
    return 0


def _loaded(checkpoint: Path) -> "Policy":
    """The checkpoint's model in one process, in the type its config names."""
    import json

    from megatron_vrl.model.architecture import read_architecture
    from megatron_vrl.parallel.mesh import init_mesh
    from megatron_vrl.training.checkpoint import load_weights, published_files
    from megatron_vrl.training.policy import Policy

    directory = published_files(checkpoint)
    arch = read_architecture(directory)
    config = json.loads((directory / "config.json").read_text())
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    global _mesh
    _mesh = _mesh or init_mesh(Parallel(), seed=0)
    policy = Policy(arch, Model(checkpoint=str(checkpoint), dtype=dtype), Parallel(), _mesh)
    load_weights(checkpoint, policy)
    return policy


_mesh = None

if __name__ == "__main__":
    sys.exit(main())
