"""Patch that lets a CUDA build of torchvision import beside a CPU build of torch.

vLLM's Qwen2-VL video processor uses torchvision's transforms, which are plain Python. Package
registries carry torchvision for CUDA only, and `import torchvision` fails there because the schemas
of two compiled ops are missing. Declaring the schemas is enough. The ops stay uncallable, and
nothing here calls them. A CUDA build of torch needs no patch and gets none.

`launch/install.sh` calls `install_hook` at the start of every Python of its environment, so that
vLLM and transformers import torchvision in the processes that they start. Seen with torchvision
0.28.0.
"""

import functools
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any


@functools.cache
def declare_missing_ops() -> Any:
    """Declare the two ops once per process, before the first `import torchvision`.

    Return the library object. The cache keeps it alive, since its schemas end with it.
    """
    import torch

    if torch.version.cuda is not None:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


class _Hook(MetaPathFinder):
    """Import hook that finds no module, and declares the ops at the import of torchvision."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare_missing_ops()


def install_hook() -> None:
    """Declare the ops when torchvision is first imported, and do nothing until then."""
    sys.meta_path.insert(0, _Hook())
