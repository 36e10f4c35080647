"""The section `video`: which frames, who decodes them, what is kept, what a bad file may cost."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from megatron_vrl.config.base import SECTION, Positive, Share


class Video(BaseModel):
    model_config = SECTION

    decoder: Literal["dali", "pyav"] = "dali"
    """Which decoder reads the files. On a CPU both give the same bytes, and `pyav` is the faster
    one for long videos: it seeks to keyframes."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where DALI decodes: `gpu` is NVDEC."""
    fps: Annotated[float, Field(gt=0)] = 2.0
    """Frames sampled per second of video (Qwen's rule)."""
    num_frames: Annotated[int, Field(ge=0)] = 0
    """Frames of every video, rounded to an even number, instead of `fps`; 0: by `fps`."""
    min_frames: Positive = 4
    max_frames: Positive = 768
    min_pixels: Positive = 128 * 28 * 28
    """Fewest pixels of one frame after resizing."""
    max_pixels: Positive = 768 * 28 * 28
    """Most pixels of one frame after resizing."""
    total_pixels: Positive = 90316800
    """Most pixels of one video: temporal steps x height x width, two frames being one step."""
    store_mib: Positive = 256
    """Memory of the store of decoded frames, per rank, MiB."""
    store_dir: str = ""
    """Directory of the store on disk, shared by ranks and runs; empty: memory only."""
    store_disk_mib: Positive = 8192
    """Limit of that directory, MiB."""
    workers: Positive = 2
    """Processes that decode, per rank; with DALI one process of so many threads."""
    prefetch: Annotated[int, Field(ge=0)] = 64
    """Videos of the next step, at most, that a rank decodes while this one trains."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """A video that takes longer is given up and its decoding process killed."""
    retries: Annotated[int, Field(ge=0)] = 1
    """How often a video that failed is tried again before it counts as bad."""
    max_bad_fraction: Share = 0.05
    """A run stops when more of the samples it drew have bad videos; before it drew 100, when more
    than this share of 100 have."""
    fetch_dir: str = ""
    """Directory for local copies of videos whose data folder is a URL; shared by ranks and runs."""
    fetch_mib: Positive = 65536
    """Limit of that directory, MiB."""
