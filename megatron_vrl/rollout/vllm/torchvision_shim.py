"""Let a CUDA build of torchvision import next to a CPU build of torch.

vLLM's Qwen2-VL video processor uses torchvision's transforms, which are plain Python. The registry
ships torchvision for CUDA only; there `import torchvision` stops because the schemas of two
compiled ops are missing. Declaring them is enough. The ops themselves stay uncallable: nothing
here uses them. Left out: real CUDA installations, where torchvision loads by itself.

`launch/install.sh` calls `install_hook` at the start of every Python of its environment, so that
stock vLLM and transformers work there too, in whatever processes they start.
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

    The library is returned so that the cache keeps it alive: its schemas die with it.
    """
    import torch

    if torch.version.cuda is not None:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


class _Hook(MetaPathFinder):
    """Finds nothing; sees `import torchvision` coming."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare_missing_ops()


def install_hook() -> None:
    """Declare the ops when torchvision is about to be imported; costs nothing until then."""
    sys.meta_path.insert(0, _Hook())
