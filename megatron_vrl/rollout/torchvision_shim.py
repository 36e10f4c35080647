"""Let a CUDA build of torchvision import next to a CPU build of torch.

vLLM's Qwen2-VL video processor uses torchvision's transforms, which are plain Python. The registry
ships torchvision for CUDA only; there `import torchvision` stops because the schemas of two
compiled ops are missing. Declaring them is enough. The ops themselves stay uncallable: nothing
here uses them. Left out: real CUDA installations, where torchvision loads by itself.
"""

import functools

import torch


@functools.cache
def declare_missing_ops() -> torch.library.Library | None:
    """Declare the two ops once per process, before the first `import torchvision`.

    The library is returned so that the cache keeps it alive: its schemas die with it.
    """
    if torch.version.cuda is not None:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
